"""Cuts the rows of a step over data-parallel ranks and into micro-batches within a token budget.

Every rank gets the same number of micro-batches, because under ZeRO-3 each forward pass is a collective: a
rank with fewer would leave the others waiting. A rank may get an empty micro-batch, which its worker runs
with zero weights.
"""

import heapq
from collections.abc import Sequence

Plan = list[list[list[int]]]  # [rank][micro-batch] -> rows


def plan(lengths: Sequence[int], *, num_ranks: int, token_budget: int, units: Sequence[int] = ()) -> Plan:
    """Rows 0..len(lengths)-1, each with its length in tokens, padding counted, into equal loads.

    Consecutive rows with equal numbers in ``units`` stay together (a preference pair, a ranking); empty: each
    row for itself. Longest first into the micro-batch that is cheapest so far; the number of micro-batches
    grows until every one is within the budget.

    Raises ValueError when a unit alone is over the budget.
    """
    parts: list[list[int]] = []
    for row in range(len(lengths)):
        if parts and units and units[row] == units[row - 1]:
            parts[-1].append(row)
        else:
            parts.append([row])
    longest = {part[0]: max(lengths[row] for row in part) for part in parts}
    largest = max(parts, key=lambda part: longest[part[0]] * len(part))
    over = longest[largest[0]] * len(largest)
    if over > token_budget:
        raise ValueError(
            f"{len(largest)} sequence(s) of {longest[largest[0]]} tokens do not fit "
            f"micro_batch_tokens={token_budget}; set it to {over} or more"
        )
    parts.sort(key=lambda part: -longest[part[0]])
    per_rank = 1
    while True:
        bins = _fill(parts, longest, num_ranks * per_rank, token_budget)
        if bins is not None:
            return [[sorted(rows) for rows in bins[rank::num_ranks]] for rank in range(num_ranks)]
        per_rank += 1


def _fill(
    parts: list[list[int]], longest: dict[int, int], num_bins: int, budget: int
) -> list[list[int]] | None:
    """Longest-processing-time-first into ``num_bins``; None when a padded bin passes the budget."""
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    widths = [0] * num_bins
    loads = [(0, index) for index in range(num_bins)]  # (tokens without padding, bin)
    for rows in parts:
        load, index = heapq.heappop(loads)
        widths[index] = max(widths[index], longest[rows[0]])
        if widths[index] * (len(bins[index]) + len(rows)) > budget:
            return None
        bins[index] += rows
        heapq.heappush(loads, (load + longest[rows[0]] * len(rows), index))
    return bins
