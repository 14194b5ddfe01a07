"""What a Kubernetes cluster is told beside the run."""

from importlib import metadata
from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from launch.submit.job import TargetSettings

Feature = Literal["kueue", "volcano", "gcs-ft", "rdma", "dev"]


class CONFIG(TargetSettings):
    kind: Literal["kuberay"] = "kuberay"
    namespace: str = "quartet"
    """Namespace of everything."""
    context: str | None = None
    """Context of the kubeconfig; default: the current one."""
    image: str = "quartet:gpu"
    """Image of head and workers (docker/Dockerfile); by digest, so that all pods run the same."""
    ray_version: str = metadata.version("ray")
    """Ray in the image; must be the one Quartet is tested with."""
    python: str = "python"
    """Python in the image."""
    features: tuple[Feature, ...] = ()
    """Overlays that are applied: kueue, volcano, gcs-ft, rdma, dev."""
    queue: str = "quartet"
    """Queue of Kueue or Volcano."""
    redis_address: str = "redis:6379"
    """Redis that keeps the state of the head, with the feature gcs-ft."""
    redis_secret: str = "quartet-redis"
    """Secret whose key `password` opens that Redis."""
    rdma_resource: str = "rdma/ib"
    """Device resource of the RDMA plugin, one per GPU pod, with the feature rdma."""
    gpus_per_pod: PositiveInt = 8
    """GPUs of a node: a role's workers are packed into pods of this size."""
    workers_per_pod: PositiveInt = 1
    """Workers of a role without GPUs per pod."""
    memory_per_gpu_gi: PositiveInt = 64
    """GiB of memory per GPU of a pod."""
    memory_gi: PositiveInt = 16
    """GiB of memory of a pod without GPUs."""
    shm_gi: PositiveInt = 8
    """GiB of /dev/shm, where Ray keeps its objects; part of the pod's memory."""
    head_cpus: PositiveInt = 4
    """CPUs of the head, which runs the driver and no role."""
    head_memory_gi: PositiveInt = 16
    """GiB of memory of the head."""
    storage_claim: str = "quartet-runs"
    """PersistentVolumeClaim (ReadWriteMany) with runs and checkpoints; may be a bucket behind a CSI
    driver."""
    storage_mount: str = "/runs"
    """Where it is mounted; run_dir lies below."""
    storage_size: str = "500Gi"
    """Size of the claim."""
    storage_class: str | None = None
    """Storage class of the claim; default: the cluster's."""
    create_storage: bool = True
    """Make the claim; false: it is there already."""
    secret: str | None = "quartet-secrets"
    """Secret whose keys become environment variables (WANDB_API_KEY, HF_TOKEN, ...)."""
    token_secret: str = "quartet-ray-token"
    """Secret with Ray's token under `auth_token`; `submit` makes it when it is missing."""
    operator_namespace: str = "kuberay-operator"
    """Namespace of the KubeRay operator, the only stranger that may reach the Jobs API."""
    node_selector: dict[str, str] = Field(default_factory=dict)
    """Labels of the nodes to use."""
    backoff_limit: NonNegativeInt = 0
    """New clusters after a failure; each resumes from the newest checkpoint."""
    ttl_s: PositiveInt = 3600
    """How long a finished RayJob is kept."""
    deadline_s: PositiveInt | None = None
    """Longest life of an attempt; default: none."""
    check_capacity: bool = True
    """Compare with the nodes that exist; false where nodes are made on demand."""
