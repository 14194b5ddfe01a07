"""vLLM's processes beneath an engine: which they are, that they live, that they get on."""

from collections import ChainMap
from collections.abc import Sequence
from typing import Any

import psutil

from actors.vital_signs import ProcessGone, Pulse, core_waits


def processes(llm: Any) -> list[int]:
    """vLLM's engine core and what it started; not Python's resource tracker, which ends by itself."""
    cores = [psutil.Process(process.pid) for process in llm.engine_core.resources.engine_manager.processes]
    return sorted(p.pid for core in cores for p in [core, *core.children(recursive=True)])


def require(pids: Sequence[int]) -> None:
    """Raises ProcessGone when one has ended."""
    for pid in pids:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            raise ProcessGone(f"vLLM's process {pid} has ended")


def pulse_of(pids: Sequence[int]) -> Pulse:
    """While the engine loads and they are not known yet: of this process and all beneath it."""
    require(pids)
    children = [psutil.Process(pid) for pid in pids]
    if not children:
        children = [psutil.Process(), *psutil.Process().children(recursive=True)]
    stopped = tuple(child.pid for child in children if child.status() == psutil.STATUS_STOPPED)
    times = [child.cpu_times() for child in children]
    return Pulse(
        progress=sum(used.user + used.system for used in times),
        waited=dict(ChainMap(*(core_waits(child.pid) for child in children))),
        stopped=stopped,
    )
