"""Processes that play the ranks of one role, without Ray: rank r always runs in the same process."""

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any


class Ranks:
    """``ranks(f, *args)`` calls ``f(rank, world_size, *args)`` in every process and answers their answers in
    order."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        context = get_context("forkserver")
        context.set_forkserver_preload(["actors.actor"])  # imported once for all ranks
        self.processes = [ProcessPoolExecutor(1, mp_context=context) for _ in range(world_size)]

    def __call__(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        calls = [p.submit(function, rank, self.world_size, *args) for rank, p in enumerate(self.processes)]
        return [call.result(timeout=120) for call in calls]

    def close(self) -> None:
        for process in self.processes:
            process.shutdown(wait=False, cancel_futures=True)
