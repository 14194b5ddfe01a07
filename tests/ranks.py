"""Processes that play the ranks of one role, without Ray: rank r always runs in the same process."""

import socket
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any, NamedTuple


class Place(NamedTuple):
    """Which rank a process is, and where rank 0 waits."""

    rank: int
    world_size: int
    port: int


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def alone() -> Place:
    """This process as the only rank."""
    return Place(rank=0, world_size=1, port=free_port())


class Ranks:
    """``ranks(f, *args)`` calls ``f(place, *args)`` in every process and answers their answers in order."""

    def __init__(self, world_size: int) -> None:
        context = get_context("forkserver")
        context.set_forkserver_preload(["actors.actor"])  # imported once for all ranks
        port = free_port()
        self.places = [Place(rank, world_size, port) for rank in range(world_size)]
        self.processes = [ProcessPoolExecutor(1, mp_context=context) for _ in self.places]

    def __call__(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        pairs = zip(self.processes, self.places, strict=True)
        calls = [process.submit(function, place, *args) for process, place in pairs]
        return [call.result(timeout=120) for call in calls]

    def close(self) -> None:
        for process in self.processes:
            process.shutdown(wait=False, cancel_futures=True)
