"""What a Slurm cluster is told beside the run."""

import sys
from pathlib import Path
from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from launch.submit.job import TargetSettings


class CONFIG(TargetSettings):
    kind: Literal["slurm"] = "slurm"
    nodes: PositiveInt = 1
    """Nodes of the job."""
    gpus_per_node: NonNegativeInt = 0
    """GPUs of a node."""
    node_roles: tuple[str, ...] = ()
    """Roles per node, e.g. ["actor+critic", "engine"]; default: wherever there is room."""
    cpus_per_node: PositiveInt | None = None
    """CPUs that Ray counts per node; default: all it sees."""
    object_store_mb: PositiveInt | None = None
    """Ray's object store per node; default: Ray's own."""
    partition: str | None = None
    """Partition; default: Slurm's."""
    account: str | None = None
    """Account to charge."""
    time: str | None = None
    """Time limit, e.g. 12:00:00; stop_grace_s before it the job checkpoints and is queued again."""
    requeue: bool = True
    """Queue the job again after a lost node or the time limit; it resumes from the newest checkpoint."""
    port: PositiveInt = 6379
    """Port of the Ray head; below the node's ephemeral ports."""
    dashboard_port: PositiveInt = 8265
    """Port of the dashboard, on the head's loopback: reach it with `ssh -L`."""
    python_folder: str = str(Path(sys.executable).parent)
    """Folder with Quartet's python and ray, the same on every node."""
    environment: dict[str, str] = Field(default_factory=dict)
    """Environment of the job, e.g. NCCL_SOCKET_IFNAME; no secrets, the script is readable."""
    extra: tuple[str, ...] = ()
    """More lines for sbatch, e.g. --constraint=h100."""
