"""What a call to a worker ends with when it ends without an answer."""

from collections.abc import Iterator
from contextlib import contextmanager

from actors.vital_signs import NoWeights, PolicyMovedOn


class RoleError(RuntimeError):
    """A worker failed, died or did not answer in time."""


class WorkerLost(RoleError):
    """The process is gone; a successor can do what it was asked."""


class NotServing(RoleError):
    """An engine waits for whole weights; another one, or the same one later, can do what it was asked."""


class MovedOn(RoleError):
    """The policy has been trained since it had the weights that were asked for."""


FROM_INSIDE = {NoWeights: NotServing, PolicyMovedOn: MovedOn}  # what a worker says -> what its caller catches


@contextmanager
def disk_errors() -> Iterator[None]:
    """A worker's OSError is the driver's too: a full disk is no broken worker."""
    try:
        yield
    except RoleError as error:
        cause = getattr(error.__cause__, "cause", None)
        if isinstance(cause, OSError):
            raise OSError(str(error)) from error
        raise
