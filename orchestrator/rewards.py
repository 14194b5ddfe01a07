"""The rewards of finished rollouts become one number each, and what is no number goes no further.

A reward that is NaN or missing would turn a whole batch into NaN, or count as 0 without a word (BUGS B11,
B16): here it stops the run, with the sample it belongs to.
"""

import math
from collections.abc import Mapping, Sequence

from orchestrator.batch import Rollout, ScoredRollout


class RewardError(ValueError):
    """A reward that must not be trained on."""


def weigh(
    rollouts: Sequence[Rollout],
    parts: Sequence[Mapping[str, float | None]],
    weights: Mapping[str, float],
) -> list[ScoredRollout]:
    """reward = sum of weights[name] * its part [name]; each part stays beside it under its name.

    Raises RewardError naming the reward and the sample when one is missing or not a finite number.
    """
    scored = []
    for rollout, own in zip(rollouts, parts, strict=True):
        values = {name: _finite(name, rollout.uid, own.get(name)) for name in weights}
        total = sum(weights[name] * value for name, value in values.items())
        if not math.isfinite(total):
            raise RewardError(
                f"the rewards {values} of sample {rollout.uid} add up to {total}; lower their weights"
            )
        scored.append(ScoredRollout(rollout=rollout, reward=total, parts=values))
    return scored


def _finite(name: str, uid: str, value: float | None) -> float:
    if value is None:
        raise RewardError(f"reward {name!r} gave sample {uid} no reward; expected one number per response")
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise RewardError(f"reward {name!r} gave sample {uid} the reward {value!r}; expected a finite number")
    return number
