"""The rewards of finished rollouts become one number each, and what is no number goes no further.

A reward that is missing or no number would count as 0 without a word (BUGS B11): here it stops the run, with
the sample it belongs to. One that is NaN or infinite makes its sample's sum NaN, said aloud: the loop learns
nothing from the batch it is in (BUGS B16; ``numbers.py``).
"""

import logging
import math
from collections.abc import Mapping, Sequence

from orchestrator.batch import Rollout, ScoredRollout

logger = logging.getLogger("quartet")


class RewardError(ValueError):
    """A reward that must not be trained on."""


def weigh(
    rollouts: Sequence[Rollout],
    parts: Sequence[Mapping[str, float | None]],
    weights: Mapping[str, float],
) -> list[ScoredRollout]:
    """reward = sum of weights[name] * its part [name]; each part stays beside it under its name.

    A sum is finite, or NaN when a part is not finite or the parts overflow. Raises RewardError naming reward
    and sample when one is missing or no number.
    """
    scored = []
    for rollout, own in zip(rollouts, parts, strict=True):
        values = {name: _number(name, rollout.uid, own.get(name)) for name in weights}
        total = sum(weights[name] * value for name, value in values.items())
        if not all(map(math.isfinite, (total, *values.values()))):
            logger.warning("the rewards %s of sample %s add up to no finite number", values, rollout.uid)
            total = math.nan  # a part of weight 0 does not hide: 0 x NaN is NaN, 0 x infinity too
        scored.append(ScoredRollout(rollout=rollout, reward=total, parts=values))
    return scored


def by_row(rewards: Mapping[str, Sequence[float]], num_rows: int) -> list[dict[str, float | None]]:
    """{name: a number per row} -> {name: number} of each row, None where a name has none for it.

    >>> by_row({"a": [1.0], "b": [2.0, 3.0]}, 2)
    [{'a': 1.0, 'b': 2.0}, {'a': None, 'b': 3.0}]
    """
    return [
        {name: values[row] if row < len(values) else None for name, values in rewards.items()}
        for row in range(num_rows)
    ]


def _number(name: str, uid: str, value: float | None) -> float:
    if value is None:
        raise RewardError(f"reward {name!r} gave sample {uid} no reward; expected one number per response")
    try:
        return float(value)
    except (TypeError, ValueError):
        raise RewardError(
            f"reward {name!r} gave sample {uid} the reward {value!r}; expected a number"
        ) from None
