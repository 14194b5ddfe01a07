"""The names of what is measured, and the figures of a batch of rollouts. Pure: tensors in, floats out.

Names are constants because four places must agree on them: the loop that measures, metrics.jsonl, the
progress line and the report. A name with a prefix is completed by a phase: ``seconds/generate``; a learner's
own figures carry its role: ``actor/loss``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from orchestrator.batch import Batch

if TYPE_CHECKING:
    from torch import Tensor

REWARD = "reward"  # mean over the sequences of the step
REWARD_STD = "reward_std"  # of the population: one sequence has 0
REWARD_MIN = "reward_min"
REWARD_MAX = "reward_max"
KL = "kl"  # to the reference, mean over action tokens
KL_COEF = "kl_coef"  # of the step, before the controller's answer to it
ENTROPY = "entropy"  # nats per action token
RESPONSE_TOKENS = "response_tokens"  # mean of the action tokens per sequence
RESPONSE_TOKENS_MAX = "response_tokens_max"
TRUNCATED_FRACTION = "truncated_fraction"  # sequences that ended at max_new_tokens
TOKENS_PER_S = "tokens_per_s"  # prompt and response, padding excluded, per second of the step's wall time
STEP_S = "step_s"  # wall time of the step
DRIVER_S = "driver_s"  # of it, seconds in which no role worked
DRIVER_FRACTION = "driver_fraction"
ROLLOUT_LOGPROB_DIFF_MEAN = "rollout_logprob_diff_mean"
ROLLOUT_LOGPROB_DIFF_MAX = "rollout_logprob_diff_max"
ACCURACY = "accuracy"  # of the held-out evaluation, or of a reward model on pairs
LOSS = "loss"  # a learner's; the loop puts the role before it: "actor/loss"
GRAD_NORM = "grad_norm"  # before clipping; likewise "actor/grad_norm"
LEARNING_RATE = "learning_rate"

STALENESS = "staleness/"  # + age: share of the action tokens drawn from weights that many updates old
OVERHEAD_S = "overhead_s"  # of it, seconds in which no worker worked, by the workers' own clocks
OVERHEAD_FRACTION = "overhead_fraction"
SCORING_HIDDEN = "scoring_hidden"  # share of reward and reference work done while somebody generated
TRAINER_WAIT = "trainer_wait"  # share of the step in which some engine generates and no trainer works
ENGINE_BUSY = "engine_busy"  # in which an engine generates; mean of the engines
ENGINE_IDLE = "engine_idle"  # in which it does nothing; mean of the engines
ENGINES = "engines"  # that serve; 0 while their number changes
ENGINES_WANTED = "engines_wanted"  # by engine.autoscale from this step on
SECONDS = "seconds/"  # + phase (timeline.Phase)
DEVICE = "device/"  # + useful, or the cause of a loss: share of the time of all devices (work.py)


def rollout_metrics(batch: Batch, *, truncated_fraction: float) -> dict[str, float]:
    """Rewards and response lengths of the sequences of one step.

    Example: rewards [0, 1] and action masks of 1 and 3 tokens give reward 0.5, reward_std 0.5,
    response_tokens 2.
    """
    lengths = batch.action_mask.sum(1)  # [B]
    return {
        REWARD: float(batch.rewards.mean()),
        REWARD_STD: float(batch.rewards.std(correction=0)),
        REWARD_MIN: float(batch.rewards.min()),
        REWARD_MAX: float(batch.rewards.max()),
        RESPONSE_TOKENS: float(lengths.double().mean()),
        RESPONSE_TOKENS_MAX: float(lengths.max()),
        TRUNCATED_FRACTION: truncated_fraction,
    }


def logprob_mismatch(actor_scores: Tensor, batch: Batch) -> dict[str, float]:
    """|log p by the trainer - log p by the engine| on the action tokens: the two must agree, or the data is
    wrong.

    ``actor_scores`` [B, T] are of the weights that sampled, so with staleness 0 what remains is rounding:
    about 1e-5 in float32, 0.05 in bfloat16. A batch without action tokens has mismatch 0.
    """
    differences = (actor_scores - batch.rollout_logprobs)[batch.action_mask].abs()  # [action tokens]
    if differences.numel() == 0:
        return {ROLLOUT_LOGPROB_DIFF_MEAN: 0.0, ROLLOUT_LOGPROB_DIFF_MAX: 0.0}
    return {
        ROLLOUT_LOGPROB_DIFF_MEAN: float(differences.mean()),
        ROLLOUT_LOGPROB_DIFF_MAX: float(differences.max()),
    }


def staleness_shares(batch: Batch, version: int, bound: int) -> dict[str, float]:
    """The share of the action tokens drawn from weights 0, 1, .. ``bound`` updates older than ``version``,
    which trains on them; nothing of a synchronous run (``bound`` 0).

    Example: of four tokens one is of version 4 and three of 5; at version 5, bound 1: staleness/0 0.75,
    staleness/1 0.25.
    """
    if not bound:
        return {}
    ages = version - batch.versions[batch.action_mask]  # [action tokens]
    return {f"{STALENESS}{age}": float((ages == age).double().mean()) for age in range(bound + 1)}


def throughput(attention_mask: Tensor, wall_s: float) -> dict[str, float]:
    """Tokens of a step, padding excluded, per second of its wall time."""
    return {TOKENS_PER_S: float(attention_mask.sum()) / wall_s if wall_s > 0 else 0.0}


def mean_metrics(history: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of each name over the entries that have it: [{a: 1}, {a: 3, b: 5}] gives {a: 2, b: 5}."""
    names = dict.fromkeys(name for entry in history for name in entry)  # keeps the order of first appearance
    columns = {name: [entry[name] for entry in history if name in entry] for name in names}
    return {name: sum(column) / len(column) for name, column in columns.items()}
