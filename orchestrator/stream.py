"""Keeps the engine busy without letting rollouts grow older than the run allows.

    feeder      takes prompts from the ledger; waits for a free slot; starts a sampler
    sampler     one per slot: engine -> reward; its answer waits in the queue, in ledger order
    take()      the driver; waits for the oldest samplers
    release()   the driver, after a publish, or at once for a group it will not train on; frees the slots that
                the feeder waits for

What the feeder takes at once, a prompt or a few, holds one slot from the moment it is sampled until the step
that trained on it has been published, or until its group was dropped.
With slots for ``(staleness + 1) * prompts_per_step`` prompts no group is ever more than ``staleness`` updates
old, and ``staleness = 0`` is exactly the synchronous algorithm. Groups leave in ledger order, not in order of
completion: short answers get no head start into the batch.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from types import TracebackType
from typing import Generic, Self, TypeVar

P = TypeVar("P")
G = TypeVar("G")


class RolloutStream(Generic[P, G]):
    """Prompts in, scored groups out. A sampler that fails surfaces in the ``take`` that would return its
    group."""

    def __init__(self, prompts: Iterator[P], sample: Callable[[P], Awaitable[G]], *, slots: int) -> None:
        self._prompts, self._sample = prompts, sample
        self._slots = asyncio.Semaphore(slots)
        self._in_order: asyncio.Queue[asyncio.Future[G]] = asyncio.Queue()

    async def __aenter__(self) -> Self:
        self._feeder = asyncio.create_task(self._feed())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._feeder.cancel()
        pending: list[asyncio.Future[G]] = []
        while not self._in_order.empty():
            pending.append(self._in_order.get_nowait())
            pending[-1].cancel()
        await asyncio.gather(self._feeder, *pending, return_exceptions=True)

    async def _feed(self) -> None:
        for prompt in self._prompts:
            await self._slots.acquire()
            self._in_order.put_nowait(asyncio.ensure_future(self._sample(prompt)))
            await asyncio.sleep(0)  # an answer that has come is scored before the last prompt is sent

    async def take(self, count: int) -> list[G]:
        """The ``count`` oldest groups."""
        return [await (await self._in_order.get()) for _ in range(count)]

    def release(self, count: int) -> None:
        """What held ``count`` slots has been trained on and published, or dropped."""
        for _ in range(count):
            self._slots.release()
