"""Engines join and leave a run that is at work, as ``quartet scale`` or ``engine.autoscale`` asks.

    quartet scale --- scale.json ---> follow(), every second ---> engines join or leave
    stepped()     --- scale.json ---> follow(), at once

``follow`` is a task beside the training. An engine that joins gets a seat in a placement group of its own
(or one that another engine has left), loads its model, and then the fleet brings it the weights; the run goes
on meanwhile. What the cluster does not grant is said, and the run stays as it is.
"""

import asyncio
from collections.abc import Callable
from contextlib import suppress

from ray.util.placement_group import PlacementGroup

from actors.elastic_fleet import ElasticFleet
from actors.errors import RoleError
from actors.member import EngineHandle
from actors.remote_engine import RemoteEngine
from launch.cluster import Cluster, PlacementError
from launch.scale import BY_ITSELF, Wish, ask, asked, forget_older
from orchestrator.config import Run
from orchestrator.placement import Seat

EVERY_S = 1.0

Place = tuple[Seat, PlacementGroup]
Note = Callable[[str], None]


class EngineCount:
    """Of one fleet."""

    def __init__(
        self,
        run: Run,
        cluster: Cluster,
        fleet: ElasticFleet,
        spawn: Callable[..., RemoteEngine],
        places: dict[RemoteEngine, Place],
    ) -> None:
        """``spawn(seat, group, index=)`` makes an engine; ``places``: of those that are there."""
        self._run, self._folder = run, run.run_dir.absolute()
        self._cluster, self._fleet, self._spawn = cluster, fleet, spawn
        self._places: dict[EngineHandle, Place] = dict(places)
        self._index: dict[EngineHandle, int] = {engine: index for index, engine in enumerate(places)}
        self._free: list[Place] = []  # that engines have left
        self._num_spawned = len(places)
        self._asked = asyncio.Event()  # by ``ask``, and not yet looked at
        self._changing = False
        self._refused: set[int] = set()  # numbers of which it was said that they cannot be had

    @property
    def settled(self) -> int | None:
        """Engines that serve; None while one comes, leaves or is replaced."""
        if self._asked.is_set() or self._changing or self._fleet.unsettled:
            return None
        return self._fleet.size

    def ask(self, engines: int) -> None:
        """For so many, on behalf of engine.autoscale; a resume keeps the number."""
        ask(self._run, self._folder, Wish(engines=engines, by=BY_ITSELF))
        self._asked.set()

    async def follow(self, note: Note) -> None:
        """Until it is cancelled."""
        forget_older(self._run, self._folder)
        answered: Wish | None = None
        while True:
            self._asked.clear()
            wish = asked(self._run, self._folder)
            if wish is not None and wish != answered:
                self._changing = True
                answered = await self._answer(wish, note)
                self._changing = False
            with suppress(TimeoutError):
                await asyncio.wait_for(self._asked.wait(), EVERY_S)

    async def _answer(self, wish: Wish, note: Note) -> Wish:
        """What then counts as answered. engine.autoscale may ask again for what it was refused; that it is
        refused is said once."""
        try:
            await self._become(wish.engines)
        except (PlacementError, RoleError, ValueError) as error:
            size = self._fleet.size
            if wish.by != BY_ITSELF or wish.engines not in self._refused:
                note(f"WARNING: {size} engine(s) and not {wish.engines}: {error}")
            self._refused.add(wish.engines)
            if wish.by != BY_ITSELF:
                return wish
            wish = Wish(engines=size, by=BY_ITSELF)
            ask(self._run, self._folder, wish)
            return wish
        self._refused.clear()
        note(f"{self._fleet.size} engine(s), as {wish.by} asked")
        return wish

    async def _become(self, wanted: int) -> None:
        missing = wanted - self._fleet.size
        outcomes = await asyncio.gather(*(self._join() for _ in range(missing)), return_exceptions=True)
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                raise outcome
        for _ in range(-missing):
            left = await self._fleet.leave()
            self._cluster.forget_engine(self._index.pop(left))
            self._vacate(self._places.pop(left))

    async def _join(self) -> None:
        place = self._free.pop() if self._free else await self._cluster.one_more_engine()
        index, self._num_spawned = self._num_spawned, self._num_spawned + 1
        engine = self._spawn(*place, index=index)
        try:
            await engine.start()
        except RoleError:
            with suppress(RoleError):
                await engine.close()
            self._cluster.forget_engine(index)
            self._vacate(place)
            raise
        self._places[engine], self._index[engine] = place, index
        await self._fleet.join(engine, self._run.recovery.restarts)

    def _vacate(self, place: Place) -> None:
        """A group of its own goes back to the cluster; a seat among the first engines waits for the next."""
        if not self._cluster.give_back(place[1]):
            self._free.append(place)
