"""What a group makes of its workers' answers, with workers of ten lines."""

import asyncio
from types import SimpleNamespace

import pytest
import torch

from actors.group import RewardGroup, ScorerGroup
from orchestrator.batch import Examples
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
        return -records.tokens[[row for rows in micro_batches for row in rows]].float()


class Forgetful:
    """Rewards all rollouts but the last."""

    handle = SimpleNamespace(score_rollouts=SimpleNamespace(_method_name="score_rollouts"))
    incarnation = 0

    async def call(self, verb, rollouts):
        return {"a": [1.0] * (len(rollouts) - 1)}


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_scores_come_back_in_the_order_of_the_rows(num_ranks):
    """Micro-batches hold rows of like length, in another order than the batch."""
    lengths = [3, 6, 1, 5, 6, 2, 4]
    tokens = torch.arange(1, 43).view(7, 6)
    attended = torch.arange(6) < torch.tensor(lengths)[:, None]
    records = Examples(tokens=tokens, attention_mask=attended, action_mask=attended)
    group = ScorerGroup([Scorer() for _ in range(num_ranks)], store=HandOver(), token_budget=12)
    assert torch.equal(asyncio.run(group.score(records)), -tokens.float())


def test_too_few_rewards_are_refused_with_the_sample_that_has_none():
    """BUGS B11."""
    group = RewardGroup([Forgetful()], store=HandOver(), token_budget=9, weights={"a": 1.0})
    with pytest.raises(RewardError, match="reward 'a' gave sample 0/4/1 no reward"):
        asyncio.run(group.score([rollout(prompt(4), 0), rollout(prompt(4), 1)]))
