"""Questions that come while everybody is busy go together to whoever is free first.

    ask()     one per question: queues its items, waits for their answers
    _serve()  one per busy server: takes all that waits, asks, hands out; ends when nothing waits

One call with many items costs a worker little more than one with few, so that under load calls grow instead
of queues.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

T = TypeVar("T")
A = TypeVar("A")
Server = Callable[[list[T]], Awaitable[Sequence[A]]]  # one answer per item, in order


class Coalescer(Generic[T, A]):
    """In front of servers that each answer one call at a time."""

    def __init__(self, servers: Sequence[Server[T, A]]) -> None:
        self._idle = list(servers)
        self._waiting: list[tuple[list[T], asyncio.Future[list[A]]]] = []
        self._serving: set[asyncio.Task[None]] = set()  # the loop itself keeps only weak references

    async def ask(self, items: Sequence[T]) -> list[A]:
        """One answer per item. A server's error reaches everyone whose items were in its call."""
        answer: asyncio.Future[list[A]] = asyncio.get_running_loop().create_future()
        self._waiting.append((list(items), answer))
        if self._idle:
            task = asyncio.create_task(self._serve(self._idle.pop()))
            self._serving.add(task)
            task.add_done_callback(self._serving.discard)
        return await answer

    async def _serve(self, server: Server[T, A]) -> None:
        while self._waiting:
            taken, self._waiting = self._waiting, []
            asked = [item for items, _ in taken for item in items]
            (outcome,) = await asyncio.gather(server(asked), return_exceptions=True)
            if not isinstance(outcome, BaseException) and len(outcome) != len(asked):
                outcome = RuntimeError(f"{len(outcome)} answers to {len(asked)} items")
            if isinstance(outcome, BaseException):
                for _, answer in taken:
                    if not answer.done():
                        answer.set_exception(outcome)
                continue
            start = 0
            for items, answer in taken:
                if not answer.done():  # who asked may have been cancelled
                    answer.set_result(list(outcome[start : start + len(items)]))
                start += len(items)
        self._idle.append(server)
