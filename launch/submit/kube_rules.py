"""What the KubeRay operator (1.7) rejects and its schema does not say, and what would only fail later."""

from __future__ import annotations

import re
from typing import Any

from launch.submit.job import Job
from launch.submit.kube_settings import CONFIG
from launch.submit.manifests import Object

MAX_NAME = 47  # of a RayJob; the operator appends to it
DNS_1035 = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
MODES = ("K8sJobMode", "HTTPMode", "SidecarMode", "InteractiveMode")
START_PARAMS = {"num-cpus", "num-gpus", "memory", "resources", "object-store-memory", "no-monitor",
                "node-name", "redis-password", "system-config", "metrics-export-port", "dashboard-host",
                "block"}  # fmt: skip


def job_rules(job: Job, settings: CONFIG) -> list[str]:
    """About the run and the settings."""
    found = []
    if len(job.id) > MAX_NAME or not DNS_1035.fullmatch(job.id):
        found.append(
            f"name={job.run.name}: {job.id!r} ({len(job.id)} characters) must be lower case letters, "
            f"digits and '-', "
            f"start with a letter, and have at most {MAX_NAME}; set a shorter name"
        )
    if not str(job.run.run_dir).startswith(settings.storage_mount.rstrip("/") + "/"):
        found.append(
            f"run_dir={job.run.run_dir} is not below storage_mount={settings.storage_mount}, so "
            f"checkpoints end with "
            f"the pod; set run_dir={settings.storage_mount}/{job.run.name}"
        )
    tag = re.search(r"ray[-_]?(\d+\.\d+\.\d+)", settings.image)
    if tag and tag[1] != settings.ray_version:
        found.append(
            f"image={settings.image} says Ray {tag[1]}, ray_version={settings.ray_version}; make them "
            f"the same"
        )
    if settings.ray_version != type(settings).model_fields["ray_version"].default:
        found.append(
            f"ray_version={settings.ray_version}, but Quartet here runs "
            f"{type(settings).model_fields['ray_version'].default}; build the image from this checkout"
        )
    if {"kueue", "volcano"} <= set(settings.features):
        found.append("features names kueue and volcano; one of them queues the job")
    if "kueue" in settings.features and job.run.engine.autoscale:
        found.append(
            "features names kueue, which admits a fixed number of pods, and the run has engine.autoscale; "
            "leave one of them out"
        )
    smallest = min(settings.head_memory_gi, settings.memory_gi, settings.memory_per_gpu_gi)
    if settings.shm_gi >= smallest:
        found.append(
            f"shm_gi={settings.shm_gi} is part of a pod's memory, the smallest has {smallest}; lower it"
        )
    if settings.backoff_limit and job.run.rl and not job.run.rl.save_every:
        found.append(
            "backoff_limit is above 0 and rl.save_every=0: a retry would start over; set rl.save_every"
        )
    return found


def operator_rules(rayjob: Object) -> list[str]:
    """Port of the operator's validation, as far as our objects can meet it."""
    spec = rayjob["spec"]
    found: list[str] = []
    name = rayjob["metadata"]["name"]
    if len(name) > MAX_NAME or not DNS_1035.fullmatch(name):
        found.append(f"metadata.name {name!r} is no DNS-1035 label of at most {MAX_NAME} characters")
    if spec.get("submissionMode", "K8sJobMode") not in MODES:
        found.append(f"submissionMode {spec['submissionMode']!r} is not one of {', '.join(MODES)}")
    shuts = spec.get("shutdownAfterJobFinishes", False)
    if spec.get("ttlSecondsAfterFinished", 0) > 0 and not shuts:
        found.append("ttlSecondsAfterFinished needs shutdownAfterJobFinishes: true")
    if spec.get("suspend") and not shuts:
        found.append("suspend needs shutdownAfterJobFinishes: true")
    if ("rayClusterSpec" in spec) == ("clusterSelector" in spec):
        found.append("exactly one of rayClusterSpec and clusterSelector")
    if spec.get("backoffLimit", 0) > 0 and "clusterSelector" in spec:
        found.append("backoffLimit above 0 not with clusterSelector")
    return [*found, *cluster_rules(spec.get("rayClusterSpec", {}))]


def cluster_rules(cluster: Object) -> list[str]:
    found: list[str] = []
    auth = cluster.get("authOptions")
    if auth is not None and auth.get("mode") != "token":
        found.append("authOptions without mode: token is no authentication")
    if auth and version(cluster.get("rayVersion", "0")) < (2, 52, 0):
        found.append("authOptions.mode token needs rayVersion 2.52.0 or newer")
    groups = (
        [cluster["headGroupSpec"], *cluster.get("workerGroupSpecs", [])] if "headGroupSpec" in cluster else []
    )
    for group in groups:
        found += group_rules(group, fault_tolerant="gcsFaultToleranceOptions" in cluster)
    names = [group["groupName"] for group in groups[1:]]
    if len(set(names)) < len(names):
        found.append(f"worker groups share a name: {names}")
    return found


def group_rules(group: Object, *, fault_tolerant: bool) -> list[str]:
    name, params = group.get("groupName", "head"), group.get("rayStartParams", {})
    containers = group["template"]["spec"].get("containers", [])
    if not containers:
        return [f"{name}: no container"]
    found = [f"{name}: rayStartParams has no {key!r}" for key in sorted(set(params) - START_PARAMS)]
    low, high = group.get("minReplicas", 0), group.get("maxReplicas", 2**31 - 1)
    if not 0 <= low <= high:
        found.append(f"{name}: minReplicas {low} and maxReplicas {high} are out of order")
    if "resources" in group and {"num-cpus", "num-gpus", "memory", "resources"} & set(params):
        found.append(f"{name}: resources and rayStartParams say the same thing twice")
    environment: list[Any] = containers[0].get("env", [])
    if fault_tolerant and {"RAY_REDIS_ADDRESS", "REDIS_PASSWORD"} & {item["name"] for item in environment}:
        found.append(f"{name}: gcsFaultToleranceOptions not with RAY_REDIS_ADDRESS or REDIS_PASSWORD")
    return found


def version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text)[:3])
