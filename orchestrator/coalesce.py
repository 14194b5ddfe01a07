"""Questions that come while everybody is busy go together to whoever is free first.

    ask()     one per question: queues it, waits for its answer
    _serve()  one per busy server: takes all that waits, asks, hands out; ends when nothing waits

One call with many questions costs a worker little more than one with few, so that under load calls grow
instead of queues.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from itertools import islice
from typing import Generic, TypeVar

T = TypeVar("T")
A = TypeVar("A")
V = TypeVar("V")
Server = Callable[[list[T]], Awaitable[Sequence[A]]]  # one answer per question, in order


class Coalescer(Generic[T, A]):
    """In front of servers that each answer one call at a time."""

    def __init__(self, servers: Sequence[Server[T, A]]) -> None:
        self._idle = list(servers)
        self._waiting: list[tuple[T, asyncio.Future[A]]] = []
        self._serving: set[asyncio.Task[None]] = set()  # the loop itself keeps only weak references

    async def ask(self, question: T) -> A:
        """Its answer. A server's error reaches everyone whose question was in its call."""
        answer: asyncio.Future[A] = asyncio.get_running_loop().create_future()
        self._waiting.append((question, answer))
        if self._idle:
            task = asyncio.create_task(self._serve(self._idle.pop()))
            self._serving.add(task)
            task.add_done_callback(self._serving.discard)
        return await answer

    async def _serve(self, server: Server[T, A]) -> None:
        while self._waiting:
            taken, self._waiting = self._waiting, []
            asked = [question for question, _ in taken]
            (outcome,) = await asyncio.gather(server(asked), return_exceptions=True)
            if not isinstance(outcome, BaseException) and len(outcome) != len(asked):
                outcome = RuntimeError(f"{len(outcome)} answers to {len(asked)} questions")
            for place, (_, answer) in enumerate(taken):
                if answer.done():  # who asked may have been cancelled
                    continue
                if isinstance(outcome, BaseException):
                    answer.set_exception(outcome)
                else:
                    answer.set_result(outcome[place])
        self._idle.append(server)


def portions(values: Sequence[V], of: Sequence[Sequence[object]]) -> list[list[V]]:
    """As many values as each of ``of`` has members, one after the other.

    >>> portions("abc", [[1], [1, 2]])
    [['a'], ['b', 'c']]
    """
    rest = iter(values)
    return [list(islice(rest, len(members))) for members in of]
