"""Records travel once: into Ray's object store, where every worker of every role reads the same copy."""

from collections import deque

import ray

from orchestrator.batch import Records


class ObjectStore:
    """Puts each record once; the last few stay referenced, so that every role of a step finds them there."""

    def __init__(self) -> None:
        self._recent: deque[tuple[Records, ray.ObjectRef]] = deque(maxlen=2)

    def put(self, records: Records) -> ray.ObjectRef:
        for kept, ref in self._recent:
            if kept is records:
                return ref
        ref = ray.put(records)
        self._recent.append((records, ref))
        return ref
