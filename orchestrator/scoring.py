"""Who scores the rollouts of a step, and when.

A group is scored as soon as it leaves the engine (one of few tokens: when its neighbours have, see
``drawing.py``), by every role whose answer cannot change before its step: the reference always, actor and
critic when the run is synchronous, for then nobody trains while it samples.
So forward passes hide behind generation. What is left is scored when the batch is whole.
"""

import asyncio
from collections.abc import Mapping, Sequence

from torch import Tensor

from orchestrator.batch import Batch, Rollout
from orchestrator.config import RL
from orchestrator.metrics import logprob_mismatch
from orchestrator.roles import Metrics, Roles, Scorer


def read_by(rl: RL, roles: Roles) -> dict[str, Scorer]:
    """The roles whose scores [B, T] the algorithm reads, by name."""
    asked: dict[str, Scorer | None] = {"critic": roles.critic, "reference": roles.reference}
    num_updates = rl.updates.epochs * rl.updates.minibatches
    rule = rl.updates.old_logprobs
    if rule == "recompute" or (rule == "auto" and rl.algorithm.wants_scores(num_updates)):
        asked["actor"] = roles.actor
    return {name: scorer for name, scorer in asked.items() if scorer is not None}


async def score_early(rollouts: Sequence[Rollout], rl: RL, roles: Roles) -> list[dict[str, Tensor]]:
    """For each rollout {role: [T]}, of the roles that can answer before the batch is whole."""
    names = {"reference"} if rl.staleness else {"reference", "actor", "critic"}
    if rl.algorithm.wants_distribution:  # these give whole distributions, of which the scores are picked
        names -= {"reference", "actor"}
    asked = {name: scorer for name, scorer in read_by(rl, roles).items() if name in names}
    answers = await asyncio.gather(*(scorer.score_rollouts(rollouts) for scorer in asked.values()))
    return [dict(zip(asked, row, strict=True)) for row in zip(*answers, strict=True)] or [
        {} for _ in rollouts
    ]


async def score(
    roles: Roles, batch: Batch, rl: RL, early: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], Metrics]:
    """What the algorithm reads and nobody has said yet, all at once: {role: [B, T]} with ``early``, and the
    mismatch of trainer and engine where both were asked."""
    scores = dict(early)
    wanted = {name: scorer for name, scorer in read_by(rl, roles).items() if name not in scores}
    if rl.algorithm.wants_distribution:
        assert roles.reference is not None
        policies = {"actor": roles.actor, "reference": roles.reference}
        whole = await asyncio.gather(*(policy.distributions(batch) for policy in policies.values()))
        for name, distribution in zip(policies, whole, strict=True):
            scores[f"{name}_distribution"] = distribution
            if name in wanted:
                scores[name] = distribution.gather(-1, batch.tokens[..., None]).squeeze(-1)
                del wanted[name]
    answers = await asyncio.gather(*(scorer.score(batch) for scorer in wanted.values()))
    scores |= dict(zip(wanted, answers, strict=True))
    mismatch = logprob_mismatch(scores["actor"], batch) if "actor" in scores else {}
    if rl.updates.old_logprobs == "rollout":
        scores["actor"] = batch.rollout_logprobs
    return scores, mismatch
