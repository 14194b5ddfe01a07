"""Cuts the rows of a step over data-parallel ranks and into micro-batches within a token budget.

Every rank gets the same number of micro-batches, because under ZeRO-3 each forward pass is a collective: a
rank with fewer would leave the others waiting. A rank may get an empty micro-batch, which its worker runs
with zero weights.
"""

import heapq
from collections.abc import Sequence

Plan = list[list[list[int]]]  # [rank][micro-batch] -> rows


def plan(lengths: Sequence[int], *, num_ranks: int, token_budget: int, unit: int = 1) -> Plan:
    """Rows 0..len(lengths)-1, each with its length in tokens, padding counted, into equal loads.

    ``unit`` consecutive rows stay together (2 for preference pairs). Longest first into the micro-batch that
    is cheapest so far; the number of micro-batches grows until every one is within the budget.

    Raises ValueError when a unit alone is over the budget.
    """
    units = [list(range(start, start + unit)) for start in range(0, len(lengths), unit)]
    longest = {u[0]: max(lengths[row] for row in u) for u in units}
    over = max(longest.values()) * unit
    if over > token_budget:
        raise ValueError(
            f"{unit} sequence(s) of {over // unit} tokens do not fit micro_batch_tokens={token_budget}; "
            f"set it to {over} or more"
        )
    units.sort(key=lambda u: -longest[u[0]])
    per_rank = 1
    while True:
        bins = _fill(units, longest, num_ranks * per_rank, token_budget, unit)
        if bins is not None:
            return [[sorted(rows) for rows in bins[rank::num_ranks]] for rank in range(num_ranks)]
        per_rank += 1


def _fill(
    units: list[list[int]], longest: dict[int, int], num_bins: int, budget: int, unit: int
) -> list[list[int]] | None:
    """Longest-processing-time-first into ``num_bins``; None when a padded bin passes the budget."""
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    widths = [0] * num_bins
    loads = [(0, index) for index in range(num_bins)]  # (tokens without padding, bin)
    for rows in units:
        load, index = heapq.heappop(loads)
        widths[index] = max(widths[index], longest[rows[0]])
        if widths[index] * (len(bins[index]) + unit) > budget:
            return None
        bins[index] += rows
        heapq.heappush(loads, (load + longest[rows[0]] * unit, index))
    return bins
