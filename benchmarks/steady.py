"""One number for the steps of a run."""

import statistics
from collections.abc import Sequence
from itertools import pairwise


def steady(seconds: Sequence[float]) -> float:
    """Seconds per step: the median of the means of neighbours. With staleness 1 steps come long and short in
    turns, so that the plain median is one or the other."""
    if len(seconds) < 2:
        return statistics.median(seconds)
    return statistics.median((a + b) / 2 for a, b in pairwise(seconds))
