"""Records travel once: into Ray's object store, where every worker of every role reads the same copy."""

from collections import deque
from dataclasses import fields

import ray
from ray.exceptions import ObjectStoreFullError, OutOfDiskError
from torch import Tensor

from actors.errors import RoleError
from orchestrator.batch import Records


class ObjectStore:
    """Puts each record once; the last few stay referenced, so that every role of a step finds them there."""

    def __init__(self) -> None:
        self._recent: deque[tuple[Records, ray.ObjectRef]] = deque(maxlen=2)

    def put(self, records: Records) -> ray.ObjectRef:
        for kept, ref in self._recent:
            if kept is records:
                return ref
        try:
            ref = ray.put(records)
        except (ObjectStoreFullError, OutOfDiskError) as error:
            raise RoleError(
                f"a batch of {_megabytes(records):.0f} MB finds no room in Ray's object store ({error}): "
                "take fewer prompts_per_step or samples_per_prompt, or make room on Ray's disk"
            ) from error
        self._recent.append((records, ref))
        return ref


def _megabytes(records: Records) -> float:
    columns = (getattr(records, field.name) for field in fields(records))
    return sum(column.nbytes for column in columns if isinstance(column, Tensor)) / 2**20
