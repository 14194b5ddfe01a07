"""Has every verb of a worker say when it began and ended, inside the worker and by its clock.

``recorded`` makes a subclass whose verbs, those that the class names in ``verbs``, answer a ``Recorded``;
``RemoteWorker.call`` takes it off again. So the times travel with the answers: no call more, and no worker
knows of it.
"""

import functools
import inspect
import time
from collections.abc import Callable
from typing import Any, ClassVar, Protocol

from orchestrator.clocks import clock_name
from orchestrator.work import Recorded, Work


class Working(Protocol):
    """The class of a worker."""

    verbs: ClassVar[dict[str, Work]]  # by the name of the method that Ray calls: no other method calls it


def recorded(cls: type[Working]) -> type:
    """The same class under the same name, its verbs recorded."""
    methods = {name: _recorded(getattr(cls, name)) for name in cls.verbs}
    return type(cls.__name__, (cls,), {"__module__": cls.__module__, "__doc__": cls.__doc__, **methods})


def _recorded(method: Callable[..., Any]) -> Callable[..., Any]:
    if inspect.iscoroutinefunction(method):

        @functools.wraps(method)
        async def answering(*args: Any) -> Recorded:
            begin = time.monotonic()
            answer = await method(*args)
            return Recorded(answer, begin, time.monotonic(), clock_name())

        return answering

    @functools.wraps(method)
    def answer(*args: Any) -> Recorded:
        begin = time.monotonic()
        said = method(*args)
        return Recorded(said, begin, time.monotonic(), clock_name())

    return answer
