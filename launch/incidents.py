"""incidents.jsonl: what went wrong in a run and what was done about it, a line each."""

import json
import time
from dataclasses import asdict
from pathlib import Path

from launch.tracking import cut_torn_line
from orchestrator.incidents import Incident


class IncidentLog:
    """An ``orchestrator.incidents.Report``. ``time`` is for people, ``monotonic_s`` for differences."""

    def __init__(self, file: Path) -> None:
        self._file = file
        cut_torn_line(file)

    def __call__(self, incident: Incident) -> None:
        line = {"time": time.time(), "monotonic_s": time.monotonic(), **asdict(incident)}
        self._file.parent.mkdir(parents=True, exist_ok=True)
        with self._file.open("a") as stream:
            stream.write(json.dumps(line) + "\n")
