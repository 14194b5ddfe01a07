"""What a Ray worker of any role is before it has a model: a process with rank, threads, seed and device.

Workers are plain synchronous classes. ``group.py`` turns them into Ray actors; a unit test builds and steps
one in its own process. ``setup`` is apart from the constructor because the address of rank 0 is known only
when rank 0 runs.

    rank 0:    rendezvous() -> (host, port)
    all ranks: setup(rank, world_size, host, port, ...)     waits until all have joined, or timeout_s
"""

import atexit
import gc
import os
import random
import socket
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import ClassVar

import torch
import torch.distributed as dist
import transformers

from actors.vital_signs import RosterLine, VitalSigns
from orchestrator.roles import Residency
from orchestrator.work import Work


def own_address() -> str:
    """Of the interface that leads out of this machine; of the loopback where none does."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            # An address that nobody has (RFC 5737); connecting a datagram socket sends nothing.
            probe.connect(("192.0.2.1", 9))
            return str(probe.getsockname()[0])
        except OSError:
            return "127.0.0.1"


def settle_heap() -> None:
    """Hides what is loaded from the garbage collector: another look through all of it takes 0.3 s."""
    gc.collect()
    gc.freeze()


@contextmanager
def settled_heap() -> Iterator[None]:
    """Settled while inside. What is frozen when a process ends nanobind reports as leaked, on the screen."""
    settle_heap()
    try:
        yield
    finally:
        gc.unfreeze()


class Worker(VitalSigns, ABC):
    """One rank of one role. Subclasses load their model in ``start``."""

    role: ClassVar[str]
    collective: ClassVar[bool] = True  # False: ranks never talk to each other, so none can hang another
    verbs: ClassVar[dict[str, Work]] = {}  # what its calls are, for the timeline (recording.py)
    rank: int = 0
    world_size: int = 1
    device: torch.device = torch.device("cpu")
    seed: int = 0

    @abstractmethod
    def start(self) -> None:
        """Loads the model; the process is ready and, if collective, all ranks are here."""

    def rendezvous(self) -> tuple[str, int]:
        """An address of this machine that other machines reach, and a port free a moment ago."""
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as free:
            free.bind(("", 0))
            return own_address(), int(free.getsockname()[1])

    def setup(  # noqa: PLR0913, PLR0917
        self,
        rank: int,
        world_size: int,
        master_addr: str,
        master_port: int,
        threads: int,
        seed: int,
        timeout_s: float,
    ) -> None:
        """Makes this process the rank, joins the others, loads; ``timeout_s`` bounds every collective."""
        self.rank, self.world_size, self.seed = rank, world_size, seed
        torch.set_num_threads(threads)
        random.seed(seed)
        torch.manual_seed(seed)
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        # Ray shows a worker only its own GPUs, but sets the variable without CUDA too: ask torch.
        local_rank = rank % torch.cuda.device_count() if torch.cuda.is_available() else 0
        if torch.cuda.is_available():
            self.device = torch.device("cuda", local_rank)
            torch.cuda.set_device(self.device)
        if self.collective:
            os.environ |= {
                "MASTER_ADDR": master_addr,
                "MASTER_PORT": str(master_port),
                "RANK": str(rank),
                "WORLD_SIZE": str(world_size),
                "LOCAL_RANK": str(local_rank),
            }
            self._join(timeout_s)
        self.start()
        settle_heap()

    def _join(self, timeout_s: float) -> None:
        if dist.is_initialized():  # several workers in one process, as tests have them
            if (dist.get_rank(), dist.get_world_size()) != (self.rank, self.world_size):
                raise ValueError(
                    f"{self.role} rank {self.rank} of {self.world_size}: this process is already rank "
                    f"{dist.get_rank()} of {dist.get_world_size()}; give each rank its own process"
                )
            return
        backend = "nccl" if self.device.type == "cuda" else "gloo"
        device_id = self.device if self.device.type == "cuda" else None
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s), device_id=device_id)
        atexit.register(dist.destroy_process_group)  # NCCL complains when the process ends without

    def describe(self) -> RosterLine:
        return RosterLine(role=self.role, rank=self.rank, pid=os.getpid(), node=socket.gethostname())

    def health(self) -> None:
        """Answers when the process is alive and not inside another call."""

    def reside(self, level: Residency) -> None:
        """Moves what ``level`` does not need to the host's memory, and what it needs back."""
        raise NotImplementedError(f"{self.role} has no devices that it shares")

    def close(self) -> None:
        """Lets the model go. The process keeps its group to the end: DeepSpeed takes no second one."""
