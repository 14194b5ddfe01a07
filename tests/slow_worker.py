"""A worker without a model, that another process can start in half a second: it imports no torch."""

import os
import socket
import threading
import time
from datetime import timedelta
from typing import ClassVar

from actors.vital_signs import ProcessGone, Pulse, RosterLine, VitalSigns


class Slow(VitalSigns):
    """Answers after a while with its pid; ``spin`` works meanwhile, ``wait`` does not."""

    verbs: ClassVar[dict] = {}

    def describe(self) -> RosterLine:
        return RosterLine(role="slow", rank=0, pid=os.getpid(), node=os.uname().nodename)

    def rendezvous(self) -> tuple[str, int]:
        return "127.0.0.1", 1

    def setup(self, *settings) -> None:
        """Nothing to load."""

    def wait(self, seconds: float) -> int:
        time.sleep(seconds)
        return os.getpid()

    def spin(self, seconds: float) -> int:
        ends = time.monotonic() + seconds
        while time.monotonic() < ends:
            pass
        return os.getpid()

    def crowd(self, threads: int) -> int:
        for _ in range(threads):
            threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
        return os.getpid()

    def eat(self, num_bytes: int) -> int:
        return len(bytearray(num_bytes))

    def half_dead(self) -> None:
        raise ProcessGone("a child is gone")

    def close(self) -> None:
        """Nothing to end."""


class Late(Slow):
    """Takes longer for a pulse than one should come after the other."""

    def pulse(self) -> Pulse:
        time.sleep(0.7)
        return super().pulse()


class Parent(Slow):
    """Its children end while it closes, which takes longer than a pulse comes."""

    closing = False

    def describe(self) -> list[RosterLine]:
        return [super().describe()]

    def start(self) -> None:
        """Nothing to load."""

    def pulse(self) -> Pulse:
        if self.closing:
            self.half_dead()
        return super().pulse()

    def close(self) -> None:
        self.closing = True
        time.sleep(1.5)


class Ranked(Slow):
    """Adds numbers up with its fellow ranks; ``skip`` leaves them alone."""

    def setup(self, rank: int, world: int, host: str, port: int, *settings) -> None:
        import torch.distributed as dist

        self.limit_s = settings[-1]
        dist.init_process_group(
            "gloo", init_method=f"tcp://{host}:{port}", rank=rank, world_size=world,
            timeout=timedelta(seconds=self.limit_s),
        )  # fmt: skip

    def rendezvous(self) -> tuple[str, int]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            return free.getsockname()

    def total(self, skip: bool) -> float:
        import torch
        import torch.distributed as dist

        if skip:
            time.sleep(4 * self.limit_s)
            return 0.0
        number = torch.ones(1)
        dist.all_reduce(number)
        return float(number)
