"""A fleet whose engines come and go while a run works.

    join()    started --> waiting --- whole sync at the version that the others serve ---> serving
    leave()   serving --> leaving: gets no prompt and no weights; what it was asked it answers --> closed

A sync that is under way is waited for before an engine leaves, and one that comes next brings a waiting
engine its weights as well: so no half-updated engine serves, and no sample is drawn twice.
"""

import asyncio
from contextlib import suppress

from actors.errors import RoleError
from actors.fleet import EngineFleet
from actors.member import EngineHandle, Member, State
from orchestrator.roles import Residency

DRAIN_S = 0.1  # between two looks at what an engine that leaves has still to answer


class ElasticFleet(EngineFleet):
    """The same fleet, which can be told to change its size."""

    @property
    def size(self) -> int:
        """Engines that serve, or will when they have been replaced or have their weights."""
        return len(self._in(State.SERVING, State.WAITING, State.AWAY))

    @property
    def unsettled(self) -> bool:
        """An engine is being replaced, or answers its last prompts. Every sync has engines that wait."""
        return bool(self._in(State.AWAY, State.LEAVING))

    async def join(self, engine: EngineHandle, restarts: int) -> None:
        """``engine`` has started, with the weights of the model folder. Returns when it serves those of the
        others, or waits for a sync that is about to bring newer ones."""
        member = Member(engine, restarts)
        member.state = State.WAITING
        if self._level is not Residency.AWAKE:
            await engine.reside(self._level)
        self._members.append(member)
        await self._catch_up(member)

    async def leave(self) -> EngineHandle:
        """The engine that joined last, closed: it has answered all that it was asked. Waits for one that is
        being replaced, where it would be the last. ValueError when it is the only one that lives."""
        member = await self._pick()
        while member.asked:
            await asyncio.sleep(DRAIN_S)
        async with self._syncing:
            self._members.remove(member)
            self._prepared = [other for other in self._prepared if other is not member]
            self._joined = []  # the channel is too wide
        with suppress(RoleError):  # one that dies now has left as well
            await member.engine.close()
        return member.engine

    async def _pick(self) -> Member:
        while True:
            async with self._syncing:
                members = self._in(State.SERVING, State.WAITING)
                if len(members) > 1:
                    await self._enter([members[-1]], State.LEAVING)
                    return members[-1]
                if not self._in(State.AWAY):
                    raise ValueError(f"{len(members)} engine(s) live: the last one cannot leave")
            await asyncio.sleep(DRAIN_S)
