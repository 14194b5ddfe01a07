"""The overlays: each is a list of JSON patches (RFC 6902) on the base, applied here and by kustomize
alike."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

from launch.submit import manifests
from launch.submit.job import Job
from launch.submit.kube_settings import CONFIG, Feature
from launch.submit.manifests import Object
from orchestrator.config import Run

Patch = tuple[str, list[Object]]  # (kind, operations)
CLUSTER = "/spec/rayClusterSpec"


def patches(feature: Feature, job: Job, settings: CONFIG) -> list[Patch]:
    """What a feature changes in ``manifests.objects(job, settings)``."""
    if feature == "kueue":
        label = {"op": "add", "path": "/metadata/labels/kueue.x-k8s.io~1queue-name", "value": settings.queue}
        return [("RayJob", [label, {"op": "add", "path": "/spec/suspend", "value": True}])]
    if feature == "volcano":
        path = "/metadata/labels/volcano.sh~1queue-name"
        return [("RayJob", [{"op": "add", "path": path, "value": settings.queue}])]
    if feature == "gcs-ft":
        password = {"valueFrom": {"secretKeyRef": {"name": settings.redis_secret, "key": "password"}}}
        value = {"redisAddress": settings.redis_address, "redisPassword": password}
        return [("RayJob", [{"op": "add", "path": f"{CLUSTER}/gcsFaultToleranceOptions", "value": value}])]
    if feature == "rdma":
        return [("RayJob", rdma(job, settings))]
    small = replace(job, run=one_gpu(job.run))
    groups = manifests.worker_groups(small, settings.model_copy(update={"gpus_per_pod": 1}))
    return [
        ("RayJob", [{"op": "replace", "path": f"{CLUSTER}/workerGroupSpecs", "value": groups}]),
        ("ConfigMap", [{"op": "replace", "path": "/data/run.yaml", "value": small.config}]),
    ]


def rdma(job: Job, settings: CONFIG) -> list[Object]:
    """GPU pods get a device of the RDMA plugin and the right to pin memory."""
    operations: list[Object] = []
    resource = settings.rdma_resource.replace("/", "~1")
    for index, group in enumerate(manifests.worker_groups(job, settings)):
        container = group["template"]["spec"]["containers"][0]
        if "nvidia.com/gpu" not in container["resources"]["limits"]:
            continue
        base = f"{CLUSTER}/workerGroupSpecs/{index}/template/spec/containers/0"
        operations += [
            {"op": "add", "path": f"{base}/resources/{part}/{resource}", "value": "1"}
            for part in ("requests", "limits")
        ]
        operations.append(
            {"op": "add", "path": f"{base}/securityContext/capabilities/add", "value": ["IPC_LOCK"]}
        )
    return operations


def one_gpu(run: Run) -> Run:
    """Every role on the same single GPU."""
    roles = {name: role.model_copy(update={"gpus": 1}) for name, role in run.roles if role is not None}
    engine = run.engine.model_copy(
        update={
            "replicas": 1,
            "tensor_parallel": 1,
            "gpus": 1,
            "gpu_memory_fraction": 0.3,
            "autoscale": None,
        }
    )
    together = (("actor", "critic", "reward", "reference", "engine"),)
    return run.model_copy(
        update={
            "roles": run.roles.model_copy(update=roles),
            "engine": engine,
            "placement": run.placement.model_copy(update={"share": together}),
        }
    )


def render(job: Job, settings: CONFIG) -> list[Object]:
    """The base with the features of the settings."""
    found = manifests.objects(job, settings)
    for feature in settings.features:
        for kind, operations in patches(feature, job, settings):
            target = next(item for item in found if item["kind"] == kind)
            for operation in operations:
                apply(target, operation)
    return found


def apply(target: Object, operation: Object) -> None:
    """One RFC 6902 ``add`` or ``replace`` on maps and lists, in place."""
    *parents, last = (part.replace("~1", "/").replace("~0", "~") for part in operation["path"].split("/")[1:])
    node: Any = target
    for part in parents:
        node = node[int(part)] if isinstance(node, list) else node[part]
    if operation["op"] == "replace" and last not in node:
        raise KeyError(f"{operation['path']} is not there to be replaced")
    node[last] = copy.deepcopy(operation["value"])


def external(settings: CONFIG) -> list[tuple[str, str]]:
    """As ``manifests.external``, with what the features refer to."""
    redis = [("Secret", settings.redis_secret)] if "gcs-ft" in settings.features else []
    return [*manifests.external(settings), *redis]
