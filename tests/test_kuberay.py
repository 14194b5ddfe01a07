"""Manifests: equal to k8s/, strict against KubeRay's schema, scaled by role, and without secrets."""

import copy
import shutil
import subprocess
from dataclasses import replace
from typing import get_args

import pytest
import yaml

from launch.submit import features, kube_rules, kustomize, manifests
from launch.submit.job import State
from launch.submit.kube_settings import Feature
from launch.submit.targets.kuberay import Target, report
from orchestrator.config import Autoscale
from tests import kubernetes

OVERLAYS = [None, *get_args(Feature)]
WITHOUT_KUBECTL = (
    "kubectl is not here; install kubernetes-client (1.21 or newer) to render the overlays for real"
)


def rendered(overlay):
    job, settings = kustomize.inputs()
    chosen = settings.model_copy(update={"features": (overlay,) if overlay else ()})
    return features.render(job, chosen), chosen


def by_kind(documents):
    return {document["kind"]: document for document in documents}


def test_the_folder_k8s_is_what_the_renderer_writes():
    written = {
        str(file.relative_to(kustomize.K8S)): file.read_text()
        for part in ("base", "overlays")
        for file in (kustomize.K8S / part).rglob("*.yaml")
    }
    assert written == kustomize.files()


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_kubectl_renders_what_submit_sends(overlay):
    if shutil.which("kubectl") is None:
        pytest.skip(WITHOUT_KUBECTL)
    folder = kustomize.K8S / (f"overlays/{overlay}" if overlay else "base")
    output = subprocess.run(["kubectl", "kustomize", str(folder)], capture_output=True, text=True, check=True)
    assert by_kind(yaml.safe_load_all(output.stdout)) == by_kind(rendered(overlay)[0])


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_overlay_passes_the_schema_and_the_operator_and_refers_to_what_exists(overlay):
    documents, settings = rendered(overlay)
    rayjob = by_kind(documents)["RayJob"]
    assert kubernetes.errors(rayjob) == []
    cluster = {**rayjob, "kind": "RayCluster", "spec": rayjob["spec"]["rayClusterSpec"]}
    assert kubernetes.errors(cluster) == []
    assert kube_rules.operator_rules(rayjob) == []
    made = {(document["kind"], document["metadata"]["name"]) for document in documents}
    assert kubernetes.references(documents) <= made | set(features.external(settings))


def test_each_role_has_a_group_of_its_own_size():
    groups = rendered(None)[0][-1]["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    job, settings = kustomize.inputs()
    small = settings.model_copy(update={"gpus_per_pod": 1})
    # k8s/run.yaml: actor 2, engine 2, critic 2, reward 1, reference 1 GPUs; one pod holds up to eight.
    assert {g["groupName"]: g["replicas"] for g in groups} == {
        "actor": 1,
        "engine": 1,
        "critic": 1,
        "reward": 1,
        "reference": 1,
    }
    gpus = {
        g["groupName"]: g["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"]
        for g in groups
    }
    assert gpus == {"actor": "2", "engine": "2", "critic": "2", "reward": "1", "reference": "1"}
    split = {g["groupName"]: g["replicas"] for g in manifests.worker_groups(job, small)}
    assert split == {"actor": 2, "engine": 2, "critic": 2, "reward": 1, "reference": 1}


def test_a_run_that_moves_its_engines_has_a_group_that_grows():
    job, settings = kustomize.inputs()
    engine = job.run.engine.model_copy(update={"autoscale": Autoscale(max=7)})
    moving = replace(job, run=job.run.model_copy(update={"engine": engine}))
    rayjob = manifests.ray_job(moving, settings.model_copy(update={"gpus_per_pod": 2}))
    assert kubernetes.errors(rayjob) == [] and kube_rules.operator_rules(rayjob) == []
    cluster = rayjob["spec"]["rayClusterSpec"]
    assert (
        cluster["enableInTreeAutoscaling"] and "no-monitor" not in cluster["headGroupSpec"]["rayStartParams"]
    )
    bounds = {
        group["groupName"]: (group["minReplicas"], group["replicas"], group["maxReplicas"])
        for group in cluster["workerGroupSpecs"]
    }
    assert bounds.pop("engine") == (1, 1, 4)  # two engines in a pod: seven want four
    assert all(low == now == high for low, now, high in bounds.values())
    tokens = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    assert [group["template"]["spec"]["automountServiceAccountToken"] for group in tokens] == [
        True, *[False] * (len(tokens) - 1)
    ]  # fmt: skip
    kueue = settings.model_copy(update={"features": ("kueue",)})
    assert any(
        "engine.autoscale; leave one of them out" in said for said in kube_rules.job_rules(moving, kueue)
    )
    assert kube_rules.job_rules(job, kueue) == []


def test_a_renamed_key_or_a_wrong_type_anywhere_is_seen_by_the_schema():
    rayjob = rendered("rdma")[0][-1]
    free = ("labels", "annotations", "rayStartParams", "requests", "limits", "nodeSelector", "metadata")

    def paths(node, path=()):
        if isinstance(node, dict):
            for key, value in node.items():
                yield (*path, key)
                yield from paths(value, (*path, key))
        elif isinstance(node, list):
            for index, value in enumerate(node):
                yield from paths(value, (*path, index))

    tried = 0
    for path in list(paths(rayjob["spec"])):
        if any(part in free for part in path[:-1]) or path[-1] in free:
            continue
        broken = copy.deepcopy(rayjob)
        node = broken["spec"]
        for part in path[:-1]:
            node = node[part]
        node[path[-1] + "X"] = node.pop(path[-1])
        assert kubernetes.errors(broken), path
        tried += 1
    assert tried > 150


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("managedBy", "me", "the managedBy field value must be either"),
        ("managedBy", "kueue.x-k8s.io/multikueue", None),
        (
            "deletionStrategy",
            {"onSuccess": {"policy": "DeleteSelf"}},
            "requires either BOTH onSuccess and onFai",
        ),
        (
            "deletionStrategy",
            {"deletionRules": [{"policy": "DeleteSelf", "condition": {"ttlSeconds": 5}}]},
            "requires either the JobStatus or",
        ),
        (
            "deletionStrategy",
            {"deletionRules": [{"policy": "DeleteSelf", "condition": {"jobStatus": "FAILED"}}]},
            None,
        ),
    ],
)
def test_the_rules_of_the_crd_are_asked_too(field, value, said):
    rayjob = rendered(None)[0][-1]
    rayjob["spec"][field] = value
    assert [said in line for line in kubernetes.errors(rayjob)] == ([True] if said else [])


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (("metadata", "name"), "a" * 48, "DNS-1035"),
        (("spec", "submissionMode"), "HTTPMod", "submissionMode"),
        (("spec", "shutdownAfterJobFinishes"), False, "ttlSecondsAfterFinished"),
        (("spec", "clusterSelector"), {"ray.io/cluster": "x"}, "exactly one"),
        (("spec", "rayClusterSpec", "authOptions"), {"secretName": "t"}, "no authentication"),
        (("spec", "rayClusterSpec", "rayVersion"), "2.51.0", "2.52.0"),
        (("spec", "rayClusterSpec", "headGroupSpec", "rayStartParams"), {"num-cpu": "0"}, "'num-cpu'"),
        (("spec", "rayClusterSpec", "workerGroupSpecs", 0, "minReplicas"), 5, "out of order"),
        (("spec", "rayClusterSpec", "workerGroupSpecs", 0, "groupName"), "engine", "share a name"),
    ],
)
def test_what_the_operator_rejects_is_said_before(path, value, said):
    rayjob = rendered(None)[0][-1]
    node = rayjob
    for part in path[:-1]:
        node = node[part]
    node[path[-1]] = value
    assert any(said in line for line in kube_rules.operator_rules(rayjob))


@pytest.mark.parametrize(
    ("run", "settings", "said"),
    [
        ({"name": "p" * 50}, {}, "at most 47"),
        ({"name": "PPO"}, {}, "lower case"),
        ({"run_dir": "runs/x"}, {}, "not below storage_mount"),
        ({}, {"image": "quartet:ray2.59.1"}, "says Ray 2.59.1"),
        ({}, {"ray_version": "2.55.0"}, "ray_version=2.55.0"),
        ({}, {"shm_gi": 16}, "shm_gi=16"),
        ({}, {"features": ("kueue", "volcano")}, "one of them"),
    ],
)
def test_lint_names_field_and_remedy(run, settings, said):
    job, base = kustomize.inputs()
    job = type(job)(run=type(job.run)(**{**job.run.model_dump(), **run}))
    complaints = Target(base.model_copy(update=settings)).lint(job)
    assert any(said in line for line in complaints), complaints


def test_pods_are_not_root_and_have_no_rights_and_a_sized_shm():
    cluster = rendered(None)[0][-1]["spec"]["rayClusterSpec"]
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
        pod = group["template"]["spec"]
        assert pod["securityContext"]["runAsNonRoot"] and not pod["automountServiceAccountToken"]
        assert pod["containers"][0]["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        assert {"medium": "Memory", "sizeLimit": "8Gi"} in [v.get("emptyDir") for v in pod["volumes"]]


@pytest.mark.parametrize(
    ("status", "state"),
    [
        ({}, State.PENDING),
        ({"jobDeploymentStatus": "Running", "jobStatus": "RUNNING"}, State.RUNNING),
        ({"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED"}, State.SUCCEEDED),
        ({"jobDeploymentStatus": "ValidationFailed", "message": "no"}, State.FAILED),
        ({"jobDeploymentStatus": "Retrying", "jobStatus": "FAILED"}, State.PENDING),
        (
            {"jobStatus": "FAILED", "message": "Job entrypoint command failed with exit code 75, last"},
            State.STOPPED,
        ),
    ],
)
def test_the_status_of_a_rayjob_is_a_state(status, state):
    assert report({"metadata": {"name": "ppo-0"}, "status": status}).state is state
