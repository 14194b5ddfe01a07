"""What every stage of one run shares."""

from dataclasses import dataclass

from launch.cluster import Cluster
from launch.graceful import StopRequest
from launch.prepare import Materials
from launch.progress import Progress
from launch.run_folder import RunFolder
from launch.tracking import Tracker
from orchestrator.config import Run


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    materials: Materials
    folder: RunFolder
    cluster: Cluster
    progress: Progress
    tracker: Tracker
    stop: StopRequest

    @property
    def run(self) -> Run:
        """With what the task provides filled in."""
        return self.materials.run
