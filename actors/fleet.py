"""Several engines behind one handle: each prompt goes to the engine with the least work; weights go to all at
once; an engine that is lost is replaced while the others work.

Which engine samples a prompt depends on who is free and who lives, so nothing random may: the seeds come from
the run's seed and the sample's uid, and a run draws the same samples however many engines it has, and however
many of them die.

    serving --- lost ---> away --- restarted ---> waiting --- whole sync at the current version ---> serving
                            +--- no restarts left ---> retired

    generate()         waits for a serving engine; asks another one when its own is lost
    prepare_weights()  serving and waiting engines get the weights together and serve nobody; one that fails
                       is left out and the rest start again on a new channel
    commit_weights()   those that have them serve again
    _replace()         a task per lost engine: restarts it and, while the policy still has the weights that
                       the others serve, brings them; otherwise the next ``prepare_weights`` does

One sync runs at a time (``_syncing``). On shared devices all of it takes turns (``_turn``), and nobody waits
for an engine inside one: its successor needs the devices too.
"""

import asyncio
from collections.abc import Coroutine, Sequence

from actors.all_ranks import outcome
from actors.errors import MovedOn, NotServing, RoleError, WorkerLost
from actors.member import EngineHandle, Member, State
from orchestrator.batch import Prompt, Rollout
from orchestrator.incidents import Incident, Report
from orchestrator.ledger import sample_seed
from orchestrator.publish import check_receipt
from orchestrator.roles import Policy, Residency, Sampling, WeightReceipt
from orchestrator.turns import TakeTurn, Turn, at_any_time

SYNC_ATTEMPTS = 3  # that may fail although nobody was lost


class EngineFleet:
    """Implements ``orchestrator.roles.Engine`` over N engines."""

    def __init__(
        self,
        engines: Sequence[EngineHandle],
        *,
        run_seed: int,
        workers: int = 1,
        restarts: int = 0,
        report: Report = lambda incident: None,
        turn: TakeTurn = at_any_time,
    ) -> None:
        """``workers`` of vLLM in each engine; ``restarts`` of each within an hour; ``turn`` on devices."""
        if not engines:
            raise ValueError("a fleet needs an engine; set engine.replicas to 1 or more")
        self._members = [Member(engine, restarts) for engine in engines]
        self._run_seed, self._workers, self._report, self._turn = run_seed, workers, report, turn
        self._changed = asyncio.Condition()  # a member's state
        self._syncing = asyncio.Lock()
        self._joined: list[Member] = []  # members of the open channel, in the order of their ranks
        self._prepared: list[Member] = []  # who has weights that are not committed
        self._policy: Policy | None = None  # who sent weights last
        self._sender_lost: WorkerLost | None = None  # the policy was lost while it brought weights
        self._version: int | None = None  # that the fleet serves; None: that of the model folder
        self._level = Residency.AWAKE  # of all engines
        self._tasks: set[asyncio.Task[None]] = set()

    async def generate(self, prompt: Prompt, num_samples: int, sampling: Sampling) -> list[Rollout]:
        """The samples of one prompt stay on one engine, which prefills the prompt once. Raises RestartsSpent
        when no engine is left."""
        seeds = [sample_seed(self._run_seed, f"{prompt.uid}/{k}") for k in range(num_samples)]
        while True:
            await self._someone_serves()
            async with self._turn(Turn.SAMPLE):
                if not (serving := self._in(State.SERVING)):
                    continue  # lost when the turn came
                member = min(serving, key=lambda member: member.asked)
                try:
                    return await member.generate(prompt, num_samples, sampling, seeds)
                except WorkerLost as lost:
                    self._lose(member, lost)
                except NotServing:
                    await asyncio.sleep(0)  # it left between the choice and the question
            self._report(Incident(kind="replanned", who="engine", detail=prompt.uid, count=num_samples))

    async def _someone_serves(self) -> None:
        async with self._changed:
            while not self._in(State.SERVING):
                if self._sender_lost is not None:
                    raise self._sender_lost  # nobody can bring an engine back: the driver must know
                self._require_one()
                await self._changed.wait()

    def _in(self, *states: State) -> list[Member]:
        return [member for member in self._members if member.state in states]

    def _require_one(self) -> None:
        if len(retired := self._in(State.RETIRED)) == len(self._members):
            assert retired[-1].given_up is not None
            raise retired[-1].given_up

    async def _enter(self, members: Sequence[Member], state: State) -> None:
        async with self._changed:
            for member in members:
                member.state = state
            self._changed.notify_all()

    # weights

    async def prepare_weights(
        self, policy: Policy, version: int
    ) -> list[tuple[WeightReceipt, WeightReceipt]]:
        """What was sent and what arrived, for each worker of each engine that has the weights; none serves
        them yet. Empty when all engines are retired: ``generate`` says so."""
        async with self._syncing:
            self._policy, self._sender_lost = policy, None
            while await self._reachable():
                async with self._turn(Turn.SYNC):
                    members = self._in(State.SERVING, State.WAITING)
                    if pairs := await self._transfer(policy, members, version):
                        return pairs
            return []

    async def _reachable(self) -> bool:
        """Waits until one engine lives; False when none ever will."""
        living = (State.SERVING, State.WAITING)
        async with self._changed:
            await self._changed.wait_for(lambda: self._in(*living) or not self._in(State.AWAY))
        return bool(self._in(*living))

    async def commit_weights(self, version: int) -> None:
        """Who has received the version serves it."""
        async with self._syncing:
            self._version = version
            async with self._turn(Turn.SYNC):
                await self._commit(version)
        for member in self._in(State.WAITING):  # restarted while this sync was under way
            self._start(self._catch_up(member))

    async def _commit(self, version: int) -> None:
        members, self._prepared = self._prepared, []
        outcomes = await asyncio.gather(
            *(member.engine.commit_weights(version) for member in members), return_exceptions=True
        )
        self._sort_out(members, outcomes)
        await self._enter([member for member in members if member.state is State.WAITING], State.SERVING)

    async def _transfer(
        self, policy: Policy, members: list[Member], version: int
    ) -> list[tuple[WeightReceipt, WeightReceipt]]:
        """Who has the weights waits for ``_commit``. Empty when all members were lost on the way."""
        await self._enter(members, State.WAITING)
        attempts = 0
        while members:
            if self._joined != members and not (members := await self._open(policy, members)):
                break
            sent, *received = await asyncio.gather(
                outcome(policy.send_weights(version)),
                *(outcome(member.engine.receive_weights(version)) for member in members),
            )
            if isinstance(sent, WorkerLost | MovedOn):
                self._joined = []
                raise sent
            left = self._sort_out(members, received)
            if isinstance(sent, WeightReceipt) and all(isinstance(answer, list) for answer in received):
                self._prepared = members
                return [(sent, receipt) for answer in received for receipt in answer]
            self._joined = []  # the channel broke
            attempts += len(left) == len(members)
            if attempts == SYNC_ATTEMPTS:
                # Who received says why; the sender only knows that somebody is gone.
                raise next(answer for answer in (*received, sent) if isinstance(answer, RoleError))
            members = left
        return []

    async def _open(self, policy: Policy, members: list[Member]) -> list[Member]:
        """Rank 0 is the sender; engine i has the next ranks in turn. Returns who joined: when somebody was
        lost, the channel is too wide and has to be opened again."""
        address = await policy.open_channel(self._workers * len(members))
        joins = (
            outcome(m.engine.join_weights(address, 1 + i * self._workers)) for i, m in enumerate(members)
        )
        answers = await asyncio.gather(*joins)
        left = self._sort_out(members, answers)
        if errors := [answer for answer in answers if isinstance(answer, RoleError)]:
            if len(left) == len(members):
                raise errors[0]
            return await self._open(policy, left) if left else []
        self._joined = members
        return members

    # losses

    def _sort_out(self, members: Sequence[Member], answers: Sequence[object]) -> list[Member]:
        """Sends successors for members that were lost; returns the others. Raises what is no failure of a
        worker."""
        for member, answer in zip(members, answers, strict=True):
            if isinstance(answer, WorkerLost):
                self._lose(member, answer)
            elif isinstance(answer, BaseException) and not isinstance(answer, RoleError):
                raise answer
        return [member for member in members if member.state is not State.AWAY]

    def _lose(self, member: Member, lost: RoleError) -> None:
        """Once per process: whoever learns of it first."""
        if member.state in (State.AWAY, State.RETIRED, State.LEAVING):
            return
        if self._syncing.locked():
            self._report(Incident(kind="left the sync", who="engine", detail=str(lost)))
        member.state = State.AWAY
        self._prepared = [other for other in self._prepared if other is not member]
        self._joined = []
        self._start(self._replace(member, str(lost)))

    def _start(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)  # the loop itself keeps only weak references
        task.add_done_callback(self._tasks.discard)

    async def _replace(self, member: Member, why: str) -> None:
        while member.budget.take():
            try:
                async with self._turn(Turn.SAMPLE):
                    await member.engine.restart()
                    successor = self._members[self._members.index(member)] = member.successor()
                    await self._enter([successor], State.WAITING)  # so that the next turn moves it too
            except RoleError as error:
                why = str(error)
                continue
            await self._catch_up(successor)
            return
        member.given_up = member.engine.give_up(why)
        await self._enter([member], State.RETIRED)

    async def _catch_up(self, member: Member) -> None:
        """Brings the weights that the others serve, unless a sync for all has done so, or will."""
        async with self._syncing:
            if member.state is not State.WAITING or self._prepared:
                return  # a commit is coming, which looks after who waits
            if self._version is None or self._policy is None:
                await self._enter([member], State.SERVING)
                return
            try:
                await self._bring(self._policy, member, self._version)
            except MovedOn:
                pass  # a sync for all will follow
            except WorkerLost as lost:
                self._sender_lost = lost
                await self._enter([], State.WAITING)  # who waits learns of it
            except RoleError as error:
                self._lose(member, error)

    async def _bring(self, policy: Policy, member: Member, version: int) -> None:
        async with self._turn(Turn.SYNC):
            if member.state is State.WAITING:  # it may have been lost when the turn came
                for sent, received in await self._transfer(policy, [member], version):
                    check_receipt(sent, received)
                await self._commit(version)

    async def logprobs(self, tokens: Sequence[int]) -> list[list[float]]:
        """Of every engine that serves."""
        async with self._turn(Turn.SAMPLE):
            members = self._in(State.SERVING)
            answers = await asyncio.gather(*(outcome(member.logprobs(tokens)) for member in members))
        self._sort_out(members, answers)
        return [answer for answer in answers if isinstance(answer, list)]

    async def reside(self, level: Residency) -> None:
        """All engines that live; a successor starts when they are awake."""
        self._level = level
        members = self._in(State.SERVING, State.WAITING)
        answers = await asyncio.gather(*(outcome(member.engine.reside(level)) for member in members))
        self._sort_out(members, answers)

    async def health(self) -> None:
        await asyncio.gather(*(member.engine.health() for member in self._members))

    async def close(self) -> None:
        """Closes every engine, and then raises what the first failing one said."""
        for task in self._tasks:
            task.cancel()
        answers = await asyncio.gather(
            *(member.engine.close() for member in self._members), return_exceptions=True
        )
        if errors := [answer for answer in answers if isinstance(answer, BaseException)]:
            raise errors[0]
