"""What a group makes of its workers' answers, with workers of ten lines."""

import asyncio
import inspect
from types import SimpleNamespace

import pytest
import torch

from actors.backbone_group import BackboneCritic, BackboneGroup, BackboneReference, BackboneReward
from actors.elastic_fleet import ElasticFleet
from actors.errors import WorkerLost
from actors.fleet import EngineFleet
from actors.group import ActorGroup, LearnerGroup, RewardGroup, ScorerGroup
from orchestrator import roles
from orchestrator.balance import plan_apart
from orchestrator.batch import Examples, ScoredRollout
from orchestrator.collate import collate
from orchestrator.rewards import RewardError
from tests.fakes import prompt, rollout


class HandOver:
    """A store that hands the records over."""

    def put(self, records):
        return records


class Scorer:
    """Says of each of its rows, in the order it is given them, minus its tokens."""

    handle, incarnation = SimpleNamespace(score=SimpleNamespace(_method_name="score")), 0

    async def call(self, verb, records, micro_batches):
        assert verb is self.handle.score
        self.seen = micro_batches
        return -records.tokens[[row for rows in micro_batches for row in rows]].float()


class Forgetful:
    """Rewards all rollouts but the last."""

    handle = SimpleNamespace(score_groups=SimpleNamespace(_method_name="score_groups"))
    incarnation = 0

    async def call(self, verb, groups):
        return {"a": [1.0] * (sum(map(len, groups)) - 1)}


class Mover:
    """Moves where it is told; ``lost``: its process is gone, which ``revive`` changes."""

    handle, incarnation = SimpleNamespace(reside=SimpleNamespace(_method_name="reside")), 0

    def __init__(self, lost):
        self.lost, self.at = lost, None

    async def call(self, verb, level):
        if self.lost:
            raise WorkerLost("died")
        self.at = level


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_scores_come_back_in_the_order_of_the_rows(num_ranks):
    """Micro-batches hold rows of like length, in another order than the batch."""
    lengths = [3, 6, 1, 5, 6, 2, 4]
    tokens = torch.arange(1, 43).view(7, 6)
    attended = torch.arange(6) < torch.tensor(lengths)[:, None]
    records = Examples(tokens=tokens, attention_mask=attended, action_mask=attended)
    group = ScorerGroup([Scorer() for _ in range(num_ranks)], store=HandOver(), token_budget=12)
    assert torch.equal(asyncio.run(group.score(records)), -tokens.float())


@pytest.mark.parametrize(("overhead", "seen"), [(1, [[1, 2], [0, 3]]), (100, [[0, 1, 2, 3]])])
def test_a_group_cuts_by_what_a_micro_batch_costs_on_its_devices(overhead, seen):
    """Responses of 1 6 6 1 tokens; rows and rollouts are cut alike."""
    own = [rollout(prompt(0), k, response=(9,) * length) for k, length in enumerate([1, 6, 6, 1])]
    records = collate([ScoredRollout(rollout=one, reward=0.0) for one in own], pad_id=0)
    for score in (lambda group: group.score(records), lambda group: group.score_rollouts(own)):
        group = ScorerGroup([Scorer()], store=HandOver(), token_budget=100)
        group.overhead = overhead
        asyncio.run(score(group))
        assert group.workers[0].seen == seen


def test_rows_that_are_compared_are_scored_together():
    """Sorted by length alone, rows 0 and 3 would share a micro-batch."""
    attended = torch.arange(6) < torch.tensor([6, 2, 2, 5])[:, None]
    tokens = torch.arange(24).view(4, 6)
    records = Examples(
        tokens=tokens, attention_mask=attended, action_mask=attended, groups=torch.tensor([0, 0, 1, 1])
    )
    group = ScorerGroup([Scorer()], store=HandOver(), token_budget=12)
    assert torch.equal(asyncio.run(group.score(records)), -tokens.float())
    assert group.workers[0].seen == [[0, 1], [2, 3]]


def test_who_waits_with_a_group_does_not_change_its_company():
    """A row's last bits depend on what shares its micro-batch; a run in which a worker was lost must end with
    the weights of the run in which none was."""
    groups = [
        [rollout(prompt(n), k, response=(9,) * length) for k, length in enumerate(lengths)]
        for n, lengths in enumerate([(1, 2), (3, 5, 5), (5, 3)])
    ]

    async def scored(*asked):
        worker = Scorer()
        group = ScorerGroup([worker], store=HandOver(), token_budget=14)
        answers = await asyncio.gather(*(group.score_rollouts(own) for own in asked))
        uids = [one.uid for own in asked for one in own]
        return answers, {frozenset(uids[row] for row in rows) for rows in worker.seen}

    answers, company = asyncio.run(scored(*groups))
    assert company == set.union(*(asyncio.run(scored(own))[1] for own in groups))
    assert len(company) == 4  # the second group is over the budget; all in one heap would be three
    for rows, group in zip(answers, groups, strict=True):
        assert [row.tolist() for row in rows] == [[-float(t) for t in one.tokens] for one in group]


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_groups_are_dealt_whole_micro_batches_each_of_one_group(num_ranks):
    lengths, sizes = [2, 6, 2, 6, 2, 9], [2, 3, 1]
    shares = plan_apart(lengths, sizes, num_ranks=num_ranks, token_budget=12)
    assert len({len(share) for share in shares}) == 1 and len(shares) == num_ranks
    parts = [rows for share in shares for rows in share if rows]
    assert sorted(parts) == [[0, 1], [2, 4], [3], [5]]
    with pytest.raises(ValueError, match="of 9 tokens do not fit micro_batch_tokens=8"):
        plan_apart(lengths, sizes, num_ranks=num_ranks, token_budget=8)


def test_a_rank_that_is_lost_is_on_no_device_and_does_not_keep_the_others_from_moving():
    """Of learners; a frozen role has a successor at once, which moves."""
    ranks = [Mover(lost=False), Mover(lost=True), Mover(lost=False)]
    group = LearnerGroup(ranks, store=HandOver(), token_budget=9)
    asyncio.run(group.reside(roles.Residency.ASLEEP))
    assert [rank.at for rank in ranks] == [roles.Residency.ASLEEP, None, roles.Residency.ASLEEP]

    class Replaced(ScorerGroup):
        async def _succeed(self, workers, why):
            for worker in workers:
                worker.lost, worker.incarnation = False, 1

    scorers = Replaced([Mover(lost=True)], store=HandOver(), token_budget=9)
    asyncio.run(scorers.reside(roles.Residency.ASLEEP))
    assert scorers.workers[0].at is roles.Residency.ASLEEP


def test_too_few_rewards_are_refused_with_the_sample_that_has_none():
    """BUGS B11."""
    group = RewardGroup([Forgetful()], store=HandOver(), token_budget=9, weights={"a": 1.0})
    with pytest.raises(RewardError, match="reward 'a' gave sample 0/4/1 no reward"):
        asyncio.run(group.score([rollout(prompt(4), 0), rollout(prompt(4), 1)]))


@pytest.mark.parametrize(
    ("handle", "role"),
    [
        (ScorerGroup, roles.Scorer), (LearnerGroup, roles.Learner), (ActorGroup, roles.Policy),
        (BackboneCritic, roles.Learner), (BackboneGroup, roles.Policy),
        (BackboneReference, roles.PolicyScorer), (RewardGroup, roles.Reward), (BackboneReward, roles.Reward),
        (EngineFleet, roles.Engine), (ElasticFleet, roles.Engine),
    ],
)  # fmt: skip
def test_a_handle_takes_what_its_role_is_asked(handle, role):
    """The driver calls by these signatures; a handle of another one fails in the middle of a run."""
    asked = {
        name: verb
        for protocol in role.__mro__
        for name, verb in vars(protocol).items()
        if inspect.iscoroutinefunction(verb)
    }
    assert asked
    for name, verb in asked.items():
        theirs = getattr(handle, name, None)
        assert theirs is not None, f"{handle.__name__} has no {name}"
        assert parameters(theirs) == parameters(verb), f"{handle.__name__}.{name}"


def parameters(function) -> list[tuple[str, object]]:
    """Names and defaults, in order; types are mypy's."""
    return [(p.name, p.default) for p in inspect.signature(function).parameters.values()]
