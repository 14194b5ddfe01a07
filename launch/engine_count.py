"""Engines join and leave a run that is at work, as the file of ``quartet scale`` says.

``follow`` is a task beside the training. An engine that joins gets a seat in a placement group of its own
(or one that another engine has left), loads its model, and then the fleet brings it the weights; the run goes
on meanwhile. What the cluster does not grant is said, and the run stays as it is.
"""

import asyncio
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from ray.util.placement_group import PlacementGroup

from actors.elastic_fleet import ElasticFleet
from actors.errors import RoleError
from actors.fleet import EngineHandle
from actors.remote_engine import RemoteEngine
from launch.cluster import Cluster, PlacementError
from launch.scale import wanted_engines
from orchestrator.placement import Seat

EVERY_S = 1.0

Place = tuple[Seat, PlacementGroup]


class EngineCount:
    """Of one fleet."""

    def __init__(
        self,
        cluster: Cluster,
        fleet: ElasticFleet,
        spawn: Callable[..., RemoteEngine],
        places: dict[RemoteEngine, Place],
    ) -> None:
        """``spawn(seat, group, index=)`` makes an engine; ``places``: of those that are there."""
        self._cluster, self._fleet, self._spawn = cluster, fleet, spawn
        self._places: dict[EngineHandle, Place] = dict(places)
        self._index: dict[EngineHandle, int] = {engine: index for index, engine in enumerate(places)}
        self._free: list[Place] = []  # that engines have left
        self._num_spawned = len(places)

    async def follow(self, folder: Path, restarts: int, note: Callable[[str], None]) -> None:
        """Until it is cancelled."""
        answered: int | None = None
        while True:
            wanted = wanted_engines(folder)
            if wanted not in (None, answered):
                answered = wanted
                try:
                    await self._become(wanted or 0, restarts)
                except (PlacementError, RoleError, ValueError) as error:
                    note(f"WARNING: {self._fleet.size} engine(s) and not {wanted}: {error}")
                else:
                    note(f"{self._fleet.size} engine(s), as `quartet scale` asked")
            await asyncio.sleep(EVERY_S)

    async def _become(self, wanted: int, restarts: int) -> None:
        missing = wanted - self._fleet.size
        joins = [self._join(restarts) for _ in range(missing)]
        outcomes = await asyncio.gather(*joins, return_exceptions=True)
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                raise outcome
        for _ in range(-missing):
            left = await self._fleet.leave()
            self._cluster.forget_engine(self._index.pop(left))
            self._vacate(self._places.pop(left))

    async def _join(self, restarts: int) -> None:
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
        await self._fleet.join(engine, restarts)

    def _vacate(self, place: Place) -> None:
        """A group of its own goes back to the cluster; a seat among the first engines waits for the next."""
        if not self._cluster.give_back(place[1]):
            self._free.append(place)
