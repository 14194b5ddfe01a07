"""A metrics service behind a thread and a bounded queue, so that its outage costs the run nothing.

Concurrency, one side-car:

    driver   offer    puts the record in the queue, or drops it when the queue is full: never waits
             end      puts the end mark
             join     waits for the thread as long as it is told, then abandons the sink with a warning
    thread   _drain   open, then one record at a time, then close; waits for the queue, or for its service

A sink that raises is switched off for good: metrics.jsonl has the rest.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from queue import SimpleQueue
from threading import Thread
from typing import Protocol

QUEUE_RECORDS = 1000  # a few hundred kB: an hour of steps while a service is away

logger = logging.getLogger("quartet")


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One step of one stage, e.g. stage "rl", step 12, values {"reward": 0.83, "kl": None}; None was not
    finite."""

    stage: str
    step: int
    values: dict[str, float | None]

    def finite(self) -> dict[str, float]:
        """Full names and the values that a chart can show: {"rl/reward": 0.83}."""
        return {f"{self.stage}/{name}": value for name, value in self.values.items() if value is not None}


class Sink(Protocol):
    """A service. All but ``abandon`` run in the side-car's thread and may block or raise as they like."""

    def open(self) -> None: ...
    def log(self, record: Record) -> None: ...
    def close(self) -> None: ...

    def abandon(self) -> None:
        """Ends at once whatever would outlive the run; called when nobody waits any longer."""
        ...


class SideCar:
    """One sink and its thread."""

    def __init__(self, name: str, sink: Sink, *, capacity: int = QUEUE_RECORDS) -> None:
        self.name = name
        self._sink, self._capacity = sink, capacity
        self._queue: SimpleQueue[Record | None] = SimpleQueue()  # bounded by offer(); None is the end mark
        self._offered, self._delivered = 0, 0
        self._off = False
        self._thread = Thread(target=self._drain, name=f"tracking-{name}", daemon=True)
        self._thread.start()

    @property
    def missed(self) -> int:
        """Records that did not reach the sink so far: dropped, or still in the queue."""
        return self._offered - self._delivered

    def offer(self, record: Record) -> None:
        self._offered += 1
        if not self._off and self._queue.qsize() < self._capacity:
            self._queue.put(record)

    def end(self) -> None:
        self._queue.put(None)

    def join(self, timeout_s: float) -> None:
        self._thread.join(max(0.0, timeout_s))
        if self._thread.is_alive():
            self._off = True
            logger.warning("%s did not finish in time and is abandoned; metrics.jsonl is complete", self.name)
            self._sink.abandon()
        if self.missed:
            logger.warning("%s missed %d records; metrics.jsonl has them", self.name, self.missed)

    def _drain(self) -> None:
        try:
            self._sink.open()
            while (record := self._queue.get()) is not None and not self._off:
                self._sink.log(record)
                self._delivered += 1
            self._sink.close()
        except Exception as error:  # noqa: BLE001 - third-party code may raise anything, and none of it may stop a run
            if not self._off:  # else it was abandoned, and said so
                self._off = True
                logger.warning(
                    "%s failed and is switched off: %s: %s", self.name, type(error).__name__, error
                )
                self._sink.abandon()
