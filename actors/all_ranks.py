"""The answers of all ranks to one verb, or the one error that says most."""

import asyncio
from collections.abc import Awaitable, Iterable
from typing import TypeVar

from actors.errors import CollectiveBroken, WorkerLost

T = TypeVar("T")
LOSS_SHOWS_S = 5.0  # after a rank failed, for which another is waited for that may be the cause


async def all_ranks(calls: Iterable[Awaitable[T]]) -> list[T]:
    """The answers of all ranks. When one fails, the loss of another, which comes a moment later, is the
    cause and is raised instead; ranks whose collective broke say least."""
    tasks = [asyncio.ensure_future(call) for call in calls]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        if any(not task.done() or task.exception() for task in tasks):
            await asyncio.wait(tasks, timeout=LOSS_SHOWS_S)
    finally:
        for task in tasks:
            task.cancel()
    errors = [task.exception() for task in tasks if task.done() and not task.cancelled()]
    for error in sorted(filter(None, errors), key=_says_little):
        raise error
    return [task.result() for task in tasks]


def _says_little(error: BaseException) -> tuple[bool, bool]:
    return not isinstance(error, WorkerLost), isinstance(error, CollectiveBroken)


async def outcome(answer: Awaitable[T]) -> T | BaseException:
    """What it gives or raises: who asks several at once waits for all of them."""
    (result,) = await asyncio.gather(answer, return_exceptions=True)
    return result
