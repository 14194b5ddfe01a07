"""What a call to a worker ends with when it ends without an answer."""

from collections.abc import Iterator
from contextlib import contextmanager

from actors.vital_signs import NoWeights, PolicyMovedOn


class RoleError(RuntimeError):
    """A worker failed, died or did not answer in time."""


class WorkerLost(RoleError):
    """The process is gone; a successor can do what it was asked."""


class CollectiveBroken(WorkerLost):
    """Another rank died or never came: this one, which waited for it, cannot go on either."""


class NotServing(RoleError):
    """An engine waits for whole weights; another one, or the same one later, can do what it was asked."""


class MovedOn(RoleError):
    """The policy has been trained since it had the weights that were asked for."""


GLOO_SAYS = ("/gloo/", "pair closure")  # its errors have no class of their own
OF_THE_CHANNEL = {"send_weights", "receive_weights"}  # breaks when an engine dies, and is opened anew


def broke_collective(cause: BaseException | None, verb: str) -> bool:
    """Whether a rank's group is broken; NCCL's watchdog ends the process instead."""
    if verb in OF_THE_CHANNEL or not isinstance(cause, RuntimeError):
        return False
    return any(mark in str(cause) for mark in GLOO_SAYS)


LESS_MEMORY = "lower micro_batch_tokens or kv_cache_mb, or take more memory"
NO_MEMORY = ("can't allocate memory", "out of memory", "bad_alloc")  # torch's allocators, and C++


def remedy(cause: BaseException | None) -> str:
    """For the error of a worker whose allocator got nothing more; its process lives, and would fail again."""
    ran_out = isinstance(cause, MemoryError) or any(mark in str(cause) for mark in NO_MEMORY)
    return f"; {LESS_MEMORY}" if ran_out else ""


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
