"""A run as Kubernetes objects: a KubeRay RayJob with one worker group per model role, and what it refers to.

Pure: the same run and settings give the same objects. ``k8s/`` is written from here, and ``quartet submit``
sends the same. The token and the secrets are references; ``external`` lists what must exist in the
namespace before.
"""

from __future__ import annotations

import math
from typing import Any

import yaml

from launch.environment import WORKER_ENV
from launch.submit.job import Job, entrypoint, shell
from launch.submit.kube_settings import CONFIG
from orchestrator.config import Run
from orchestrator.placement import Resources, layout, stage_roles

Object = dict[str, Any]
CONFIG_FOLDER, SHM = "/etc/quartet", "dshm"
# The group of the engines grows when a placement group waits, and loses pods in which nobody lives.
AUTOSCALING = {
    "enableInTreeAutoscaling": True,
    "autoscalerOptions": {"version": "v2", "idleTimeoutSeconds": 60},
}
RESTRICTED = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}


def objects(job: Job, settings: CONFIG) -> list[Object]:
    """Everything that one attempt needs, in the order in which it is created."""
    shared = [service_account(settings), network_policy(settings)]
    if settings.create_storage:
        shared.append(claim(settings))
    return [*shared, config_map(job, settings), ray_job(job, settings)]


def external(settings: CONFIG) -> list[tuple[str, str]]:
    """Objects that are referred to and made by somebody else: [("Secret", "quartet-ray-token"), ...]."""
    found = [("Secret", settings.token_secret)]
    if settings.secret:
        found.append(("Secret", settings.secret))
    if not settings.create_storage:
        found.append(("PersistentVolumeClaim", settings.storage_claim))
    return found


def meta(name: str, settings: CONFIG) -> Object:
    labels = {"app.kubernetes.io/name": "quartet", "app.kubernetes.io/managed-by": "quartet"}
    return {"name": name, "namespace": settings.namespace, "labels": labels}


def service_account(settings: CONFIG) -> Object:
    return {
        "apiVersion": "v1",
        "kind": "ServiceAccount",
        "metadata": meta("quartet", settings),
        "automountServiceAccountToken": False,
    }


def claim(settings: CONFIG) -> Object:
    spec: Object = {
        "accessModes": ["ReadWriteMany"],
        "resources": {"requests": {"storage": settings.storage_size}},
    }
    if settings.storage_class:
        spec["storageClassName"] = settings.storage_class
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": meta(settings.storage_claim, settings),
        "spec": spec,
    }


def network_policy(settings: CONFIG) -> Object:
    """Into Quartet's pods: only each other, and the operator to the Jobs API. Out of them: as the cluster
    allows."""
    ours = {"matchLabels": {"app.kubernetes.io/name": "quartet"}}
    operator = {"matchLabels": {"kubernetes.io/metadata.name": settings.operator_namespace}}
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": meta("quartet", settings),
        "spec": {
            "podSelector": ours,
            "policyTypes": ["Ingress"],
            "ingress": [
                {"from": [{"podSelector": ours}]},
                {"from": [{"namespaceSelector": operator}], "ports": [{"protocol": "TCP", "port": 8265}]},
            ],
        },
    }


def config_map(job: Job, settings: CONFIG) -> Object:
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": meta(f"{job.id}-config", settings),
        "data": {"run.yaml": job.config},
    }


def ray_job(job: Job, settings: CONFIG) -> Object:
    metadata = meta(job.id, settings)
    metadata["labels"] |= {"quartet/run": job.run.name, "quartet/attempt": str(job.attempt)}
    environment = {
        **WORKER_ENV,
        "QUARTET_RAY_VERSION": settings.ray_version,
        "RAY_JOB_STOP_WAIT_TIME_S": str(settings.stop_grace_s),
    }
    argv = entrypoint(
        f"{CONFIG_FOLDER}/run.yaml",
        resume=job.resume or settings.backoff_limit > 0,
        secrets=settings.secrets,
        python=settings.python,
    )
    spec: Object = {
        "submissionMode": "HTTPMode",
        "entrypoint": shell(argv),
        "jobId": job.id,
        "metadata": {"quartet_run": job.run.name, "quartet_attempt": str(job.attempt)},
        "runtimeEnvYAML": yaml.safe_dump({"env_vars": environment}),
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": settings.ttl_s,
        "backoffLimit": settings.backoff_limit,
        "preRunningDeadlineSeconds": settings.start_deadline_s,
        "rayClusterSpec": {
            "rayVersion": settings.ray_version,
            "authOptions": {"mode": "token", "secretName": settings.token_secret},
            "headGroupSpec": head(job, settings),
            "workerGroupSpecs": worker_groups(job, settings),
            **(AUTOSCALING if job.run.engine.autoscale else {}),
        },
    }
    if settings.deadline_s:
        spec["activeDeadlineSeconds"] = settings.deadline_s
    return {"apiVersion": "ray.io/v1", "kind": "RayJob", "metadata": metadata, "spec": spec}


def head(job: Job, settings: CONFIG) -> Object:
    """The driver lives here and no role: 0 CPUs and 0 GPUs for tasks."""
    resources = {"cpu": str(settings.head_cpus), "memory": f"{settings.head_memory_gi}Gi"}
    template = pod("ray-head", resources, job, settings)
    template["metadata"]["annotations"] = {"cluster-autoscaler.kubernetes.io/safe-to-evict": "false"}
    params = {"num-cpus": "0", "num-gpus": "0"}
    if job.run.engine.autoscale:
        template["spec"]["automountServiceAccountToken"] = True  # Ray's autoscaler lives here
    else:
        # With fixed groups the monitor has nothing to do, and has removed "excess" workers.
        params["no-monitor"] = "true"
    return {"rayStartParams": params, "template": template}


def worker_groups(job: Job, settings: CONFIG) -> list[Object]:
    """One group per role, or per set of roles that share devices; the largest need of any stage counts."""
    groups: dict[tuple[str, ...], tuple[Resources, ...]] = {}
    for _, roles in reversed([*stage_roles(job.run)]):
        plan = layout(job.run, roles)
        for index, bundles in enumerate(plan.groups):
            members = tuple(role for role, seats in plan.seats.items() if seats[0].group == index)
            wider = [known for known in groups if set(members) <= set(known)]
            if not wider:
                groups[members] = bundles
    return [worker_group(members, bundles, job, settings) for members, bundles in groups.items()]


def bundles_per_pod(bundles: tuple[Resources, ...], settings: CONFIG) -> int:
    gpus = int(max(bundle.get("GPU", 0) for bundle in bundles))
    return min(len(bundles), max(1, settings.gpus_per_pod // gpus) if gpus else settings.workers_per_pod)


def engine_pods(run: Run, settings: CONFIG, engines: int) -> int:
    """Pods of the size the run was submitted with that hold so many engines, which share them with nobody."""
    bundles = layout(run, ["engine"]).groups[0]
    return math.ceil(engines / bundles_per_pod(bundles, settings))


def worker_group(
    roles: tuple[str, ...], bundles: tuple[Resources, ...], job: Job, settings: CONFIG
) -> Object:
    """``replicas`` pods of equal size that together hold the bundles; its own number scales the role."""
    gpus = int(max(bundle.get("GPU", 0) for bundle in bundles))
    cpus = max(bundle["CPU"] for bundle in bundles)
    per_pod = bundles_per_pod(bundles, settings)
    replicas = math.ceil(len(bundles) / per_pod)
    memory = settings.memory_per_gpu_gi * gpus * per_pod if gpus else settings.memory_gi
    resources = {"cpu": str(math.ceil(cpus * per_pod)), "memory": f"{memory}Gi"}
    if gpus:
        resources["nvidia.com/gpu"] = str(gpus * per_pod)
    template = pod("ray-worker", resources, job, settings)
    if gpus:
        template["spec"] |= {
            "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
        }
    most = replicas
    if roles == ("engine",) and job.run.engine.autoscale:
        most = math.ceil(job.run.engine.autoscale.max / per_pod)
    return {
        "groupName": "-".join(roles),
        "replicas": replicas,
        "minReplicas": replicas,  # the seats of the first engines stay reserved
        "maxReplicas": most,
        "labels": {f"quartet.role.{role}": "true" for role in roles},
        "rayStartParams": {},
        "template": template,
    }


def pod(name: str, resources: dict[str, str], job: Job, settings: CONFIG) -> Object:
    container: Object = {
        "name": name,
        "image": settings.image,
        "resources": {"requests": dict(resources), "limits": dict(resources)},
        "securityContext": {key: dict(v) if isinstance(v, dict) else v for key, v in RESTRICTED.items()},
        "env": [{"name": "HF_HOME", "value": f"{settings.storage_mount}/.cache/huggingface"}],
        "volumeMounts": [
            {"name": SHM, "mountPath": "/dev/shm"},
            {"name": "runs", "mountPath": settings.storage_mount},
            {"name": "config", "mountPath": CONFIG_FOLDER, "readOnly": True},
        ],
    }
    if settings.secret:
        container["envFrom"] = [{"secretRef": {"name": settings.secret}}]
    spec: Object = {
        "serviceAccountName": "quartet",
        "automountServiceAccountToken": False,
        "terminationGracePeriodSeconds": settings.stop_grace_s,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": 1000,
            "fsGroup": 1000,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [container],
        # Counts against the container's memory limit, which lint compares with it.
        "volumes": [
            {"name": SHM, "emptyDir": {"medium": "Memory", "sizeLimit": f"{settings.shm_gi}Gi"}},
            {"name": "runs", "persistentVolumeClaim": {"claimName": settings.storage_claim}},
            {"name": "config", "configMap": {"name": f"{job.id}-config"}},
        ],
    }
    if settings.node_selector:
        spec["nodeSelector"] = settings.node_selector
    return {"metadata": {"labels": {"app.kubernetes.io/name": "quartet"}}, "spec": spec}
