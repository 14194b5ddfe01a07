"""One Ray worker as the driver sees it: calls with deadlines, a watch over it, successors. Ray begins here.

    call()      who asks; ends with the answer, the deadline, or the loss of the worker, whichever is first
    _observe()  one task per worker; asks for its pulse, and gives it up when it is silent for
                ``deadlines.silence_s``, or inside a call without progress for ``deadlines.stall_s``
    revive()    its owner; ends what is left of the process and starts its successor in the same seat

A worker is given up once: then all its calls end with WorkerLost, and answers that still come are dropped and
counted. Ray notices neither a stopped process nor one that waits for ever, and cannot end the former, so
processes are ended by their pids.
"""

import asyncio
import os
import signal
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import ray
from ray.actor import ActorHandle, ActorMethod
from ray.exceptions import ObjectLostError, RayActorError, RayTaskError
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from actors.errors import FROM_INSIDE, CollectiveBroken, RoleError, WorkerLost, broke_collective, remedy
from actors.recording import Working, recorded
from actors.stall import StallClock
from actors.vital_signs import VITAL, ProcessGone, Pulse, RosterLine
from actors.ward import Ward
from orchestrator.config import Deadlines
from orchestrator.incidents import Incident, RestartsSpent
from orchestrator.placement import Seat
from orchestrator.work import WorkLog

PULSES = 5  # in the time after which a worker is silent


class RemoteWorker:
    """One Ray worker with its name, its deadlines and its processes."""

    def __init__(
        self,
        start: Callable[[], ActorHandle],
        who: str,
        deadlines: Deadlines,
        ward: Ward,
        place: PlacementGroupSchedulingStrategy,
        log: WorkLog,
    ) -> None:
        """``start`` makes the process, at ``place``."""
        self.who, self.deadlines, self.log = who, deadlines, log
        self._start, self._ward, self._place = start, ward, place
        self.incarnation = 0
        self.lines: Sequence[RosterLine] = ()  # its processes, as described last
        self._given_up_at = 0.0
        ward.workers.append(self)
        self._begin()

    def _begin(self) -> None:
        self.handle = self._start()
        self._verbs: dict[asyncio.Future[Any], str] = {}  # what it is asked and has not answered
        self._lost: asyncio.Future[str] | None = None
        self._watch: asyncio.Task[None] | None = None
        self._ready = False

    @property
    def pid(self) -> int:
        return self.lines[0].pid if self.lines else 0

    @property
    def name(self) -> str:
        """For messages: "actor rank 1 (pid 4711 on node-3)"."""
        return f"{self.who} (pid {self.pid} on {self.lines[0].node})" if self.lines else self.who

    async def call(self, method: ActorMethod, *args: Any, deadline_s: float | None = None) -> Any:
        """Raises WorkerLost when the process is gone, NotServing, or RoleError."""
        verb, limit = method._method_name, deadline_s or self.deadlines.call_s
        with self.log.call(verb) as unpacked:
            return unpacked(await self._answer(method, args, verb, limit))

    async def _answer(self, method: ActorMethod, args: tuple[Any, ...], verb: str, limit: float) -> Any:
        lost = self._loss()
        if lost.done():
            raise WorkerLost(lost.result())
        ref = method.remote(*args)
        answer = asyncio.wrap_future(ref.future())
        answer.add_done_callback(_ignore)
        self._verbs[answer] = verb
        try:
            await asyncio.wait({answer, lost}, timeout=limit, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            ray.cancel(ref)
            raise
        finally:
            self._verbs.pop(answer, None)  # a successor knows nothing of it
        if answer.done():
            if why := self._broken(answer, verb):
                await self._stalled(f"failed in {verb}: {why}")
                raise CollectiveBroken(self._loss().result())
            return self._outcome(answer, verb, lost)
        answer.add_done_callback(self._late)
        if not lost.done():
            why = "" if self.lines else "; it never began: no host has room for it, or none can start it"
            await self._stalled(f"did not answer {verb} within {limit:g} s{why}")
        raise WorkerLost(lost.result())

    def _broken(self, answer: asyncio.Future[Any], verb: str) -> str:
        """What a rank says whose collective failed."""
        error = answer.exception()
        return (
            str(error.cause)
            if isinstance(error, RayTaskError) and broke_collective(error.cause, verb)
            else ""
        )

    def _outcome(self, answer: asyncio.Future[Any], verb: str, lost: asyncio.Future[str]) -> Any:
        """``lost``: the loss of the process that was asked."""
        try:
            return answer.result()
        except RayTaskError as error:
            if kind := FROM_INSIDE.get(type(error.cause)):
                raise kind(f"{self.name}: {error.cause}") from error
            if isinstance(error.cause, ProcessGone):
                raise WorkerLost(self.lose(f"failed in {verb}: {error.cause}", lost)) from error
            raise RoleError(f"{self.name} failed in {verb}: {error.cause!r}{remedy(error.cause)}") from error
        except (RayActorError, ObjectLostError) as error:  # an answer that its host took with it
            raise WorkerLost(self.lose(f"died in {verb}: {_first_line(error)}", lost)) from error

    def _late(self, answer: asyncio.Future[Any]) -> None:
        if not answer.cancelled() and answer.exception() is None:
            self._ward.report(
                Incident(kind="late answer", who=self.who, detail="dropped: it had been given up")
            )

    def _loss(self) -> asyncio.Future[str]:
        if self._lost is None:
            self._lost = asyncio.get_running_loop().create_future()
        return self._lost

    @property
    def lost(self) -> bool:
        return self._lost is not None and self._lost.done()

    def lose(self, why: str, lost: asyncio.Future[str] | None = None) -> str:
        """Gives the process up, once: everybody who waits for it learns why. ``lost`` is not this one's when
        it had been given up before and has a successor."""
        lost = lost or self._loss()
        if not lost.done():
            self._given_up_at = time.monotonic()
            why += self._ward.memory_hint()
            lost.set_result(f"{self.name} {why}")
            self._ward.report(Incident(kind="lost", who=self.who, pid=self.pid, detail=why))
        return lost.result()

    def attend(self, lines: Sequence[RosterLine], *, ready: bool) -> None:
        """Its processes are known, and from here on watched; while it loads its model (not ``ready``) it may
        be silent for ``stall_s``."""
        self.lines = [replace(line, incarnation=self.incarnation) for line in lines]
        self._ready = ready
        self._ward.record(self.lines)
        if self._watch is None:
            self._watch = asyncio.create_task(self._observe())

    async def _observe(self) -> None:
        stopped_since = None
        stall = StallClock(self.deadlines.silence_s)
        while not self.lost:
            asked = time.monotonic()
            patience = self.deadlines.silence_s if self._ready else self.deadlines.stall_s
            try:
                pulse = await self._pulse(patience)
            except TimeoutError:
                await self._stalled(f"gave no sign of life for {patience:g} s")
                return
            except RayActorError as error:
                self.lose(f"died in {self._phase()}: {_first_line(error)}")
                return
            except RayTaskError as error:
                self.lose(f"failed: {error.cause!r}")
                return
            now = time.monotonic()
            stopped_since = (stopped_since or now) if pulse.stopped else None
            if stopped_since is not None and now - stopped_since >= self.deadlines.silence_s / 2:
                await self._stalled(f"has stopped processes {list(pulse.stopped)}")
            if stall.stalled_s(pulse, busy=self._ready and bool(self._verbs)) > self.deadlines.stall_s:
                await self._stalled(f"made no progress for {self.deadlines.stall_s:g} s")
            await asyncio.sleep(max(0.0, patience / PULSES - (now - asked)))

    async def _pulse(self, patience: float) -> Pulse:
        """Raises TimeoutError. A worker may answer late; a driver that stood still meanwhile has waited for
        no more than one part of its patience, and then finds the answer."""
        ref = self.handle.pulse.options(concurrency_group=VITAL).remote()
        answer = asyncio.wrap_future(ref.future())
        answer.add_done_callback(_ignore)
        for _ in range(PULSES - 1):  # one part has gone by since the last answer
            await asyncio.wait({answer}, timeout=patience / PULSES)
            if answer.done():
                return answer.result()
        raise TimeoutError

    def _phase(self) -> str:
        return ", ".join(sorted(set(self._verbs.values()))) or "no call"

    async def _stalled(self, why: str) -> None:
        phase, lost = self._phase(), self._loss()
        path = await self._ward.write_stacks(f"{self.name} {why}; it was in {phase}")
        if not lost.done():  # nobody else has ended it meanwhile
            self.lose(f"{why}; it was in {phase} and has been ended; stacks in {path}")
            self.end()

    async def stacks(self, limit_s: float) -> str:
        """Of all its threads, or why there are none."""
        ref = self.handle.stacks.options(concurrency_group=VITAL).remote()
        try:
            return str(await asyncio.wait_for(asyncio.wrap_future(ref.future()), limit_s))
        except (TimeoutError, RayActorError, RayTaskError) as error:
            return f"no stacks: {type(error).__name__}\n"

    def unwatch(self) -> None:
        """What ends from here on was meant to."""
        if self._watch is not None:
            self._watch.cancel()
        self._watch = None

    def dismiss(self) -> None:
        """Lets it go, in order."""
        self.unwatch()
        ray.kill(self.handle)

    def end(self) -> None:
        """Kills its processes by their pids, stopped ones too."""
        self.dismiss()
        if not self.lines:
            return
        node, pids = self.lines[0].node, [line.pid for line in self.lines]
        if node == socket.gethostname():
            _kill(node, pids)
        else:
            ray.remote(num_cpus=0, scheduling_strategy=self._place, max_retries=0)(_kill).remote(node, pids)

    def revive(self) -> None:
        """Ends what is left of the process and starts its successor, which knows nothing yet."""
        self.lose("is replaced")
        self.end()
        self.lines = ()
        self.incarnation += 1
        self._begin()

    def give_up(self, why: str) -> RestartsSpent:
        """There is no successor any more; the error to raise."""
        self._ward.report(Incident(kind="given up", who=self.who, detail=why))
        return RestartsSpent(f"{self.who} has no restarts left (recovery.restarts): {why}")

    def recovered(self) -> None:
        """The successor does its work."""
        seconds = time.monotonic() - self._given_up_at
        self._ward.report(
            Incident(kind="recovered", who=self.who, pid=self.pid, detail="works again", seconds=seconds)
        )


def _kill(node: str, pids: Sequence[int]) -> None:
    """On ``node`` only: the seat of a host that was lost is on another one, where its pids are strangers'."""
    if socket.gethostname() != node:
        return
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _first_line(error: RayActorError | ObjectLostError) -> str:
    """Ray adds ten lines of advice."""
    return str(error).strip(" '\n").splitlines()[0]


def _ignore(answer: asyncio.Future[Any]) -> None:
    if not answer.cancelled():
        answer.exception()


def spawn(  # noqa: PLR0913 - one line per fact, all by name
    cls: type[Working],
    *,
    who: str,
    seat: Seat,
    group: PlacementGroup,
    env: dict[str, str],
    deadlines: Deadlines,
    ward: Ward,
    **settings: Any,
) -> RemoteWorker:
    """Starts one worker in its seat; its constructor runs there. Errors surface in the first call."""
    resources = dict(seat.resources)
    place = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=seat.bundle)
    options = {
        "num_cpus": resources.get("CPU", 0.0),
        "num_gpus": resources.get("GPU", 0.0),
        "scheduling_strategy": place,
        "runtime_env": {"env_vars": env},
    }
    actor = ray.remote(concurrency_groups={VITAL: 1})(recorded(cls)).options(**options)
    log = ward.book.enter(who, f"{seat.group}.{seat.bundle}", cls.verbs)
    return RemoteWorker(lambda: actor.remote(**settings), who, deadlines, ward, place, log)
