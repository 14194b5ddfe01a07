"""Cuts the rows of a step over data-parallel ranks and into micro-batches within a token budget.

Rows of like length share a micro-batch, so little is spent on padding; micro-batches of like cost run side by
side on the ranks, so no rank waits long. Cost is tokens with padding: that is what a forward pass computes.

Every rank gets the same number of micro-batches, because under ZeRO-3 each forward pass is a collective: a
rank with fewer would leave the others waiting. A rank may get an empty micro-batch, which its worker runs
with zero weights.

How many micro-batches: each costs something beside its tokens (launches, one reading of all weights), so a
few of them with padding may be done sooner than many without. ``overhead`` says how much, in tokens. On a CPU
it is little. On a GPU it is unknown, from a hundred tokens of a 7B model to thousands of a small one, which
FlashAttention computes without padding anyway: there the fewest that the budget allows.
"""

from bisect import bisect_left, insort_left
from collections.abc import Sequence
from itertools import accumulate, pairwise

Plan = list[list[list[int]]]  # [rank][micro-batch] -> rows
Unit = list[int]  # rows that stay together
FEWEST = 1 << 40  # overhead with which there are as few micro-batches as can be
ON_CPU = 64  # tokens, by arithmetic and not fitted: reading float32 weights takes as long as about 16 to 50
CUTS = 1024  # between so many places the best are looked for: more take seconds and save no padding


def plan(
    lengths: Sequence[int],
    *,
    num_ranks: int,
    token_budget: int,
    units: Sequence[int] = (),
    overhead: int = FEWEST,
) -> Plan:
    """Rows 0..len(lengths)-1, each with its length in tokens.

    Consecutive rows with equal numbers in ``units`` stay together (a preference pair, a ranking); empty: each
    row for itself. The micro-batches with the fewest padded tokens, each counted as ``overhead`` tokens more
    (among ``CUTS`` places to cut or a few more, where there are more units), with empty ones up to a multiple
    of the ranks; dealt so that ranks are done together. Where the slowest rank is done sooner when
    none is larger than so many must be, that cut.

    Example, one rank, budget 12, lengths 2 6 2 6 2: [[1, 3], [0, 2, 4]], no padded token. Two ranks, budget
    12, lengths 3 3 3 3 1 1: [[0, 1, 2]] and [[3, 4, 5]], 9 tokens each; the cheapest cut has 12 and 2.

    Raises ValueError when a unit alone is over the budget.
    """
    parts: list[Unit] = []
    for row in range(len(lengths)):
        if parts and units and units[row] == units[row - 1]:
            parts[-1].append(row)
        else:
            parts.append([row])
    widths = {part[0]: max(lengths[row] for row in part) for part in parts}
    largest = max(parts, key=lambda part: widths[part[0]] * len(part))
    over = widths[largest[0]] * len(largest)
    if over > token_budget:
        raise ValueError(
            f"{len(largest)} sequence(s) of {widths[largest[0]]} tokens do not fit "
            f"micro_batch_tokens={token_budget}; set it to {over} or more"
        )
    parts.sort(key=lambda part: -widths[part[0]])
    if len(parts) > CUTS:
        begins = _filled(parts, widths, token_budget)
        edges = sorted({*begins, *range(0, len(parts), -(-len(parts) // CUTS))})
        blocks = [parts[a:b] for a, b in pairwise([*edges, len(parts)])]
        parts = [[row for part in block for row in part] for block in blocks]
    cheapest = _cheapest(parts, widths, token_budget, overhead)
    found = _dealt(cheapest, lengths, num_ranks)
    if num_ranks == 1:
        return found
    smallest = _smallest_budget(parts, widths, num_ranks * len(found[0]), token_budget)
    even = _dealt(_cheapest(parts, widths, smallest, FEWEST), lengths, num_ranks)
    return min(found, even, key=lambda cut: max(_cost(rank, lengths) for rank in cut))


def plan_apart(
    lengths: Sequence[int],
    sizes: Sequence[int],
    *,
    num_ranks: int,
    token_budget: int,
    overhead: int = FEWEST,
) -> Plan:
    """As ``plan``, for rows of which the first ``sizes[0]``, the next ``sizes[1]`` and so on share no
    micro-batch with others: each is computed in the same company, whoever else is there, and floating point
    rounds it the same.

    Example, one rank, budget 12, lengths 2 6 2 6 2, sizes 2 3: [[3], [0, 1], [2, 4]].

    Raises ValueError when a row alone is over the budget.
    """
    bins: list[list[int]] = []
    begin = 0
    for size in sizes:
        part = lengths[begin : begin + size]
        (own,) = plan(part, num_ranks=1, token_budget=token_budget, overhead=overhead)
        bins += [[begin + row for row in rows] for rows in own]
        begin += size
    return _dealt(bins, lengths, num_ranks)


def _dealt(bins: Sequence[list[int]], lengths: Sequence[int], num_ranks: int) -> Plan:
    """With empty micro-batches where a rank would have fewer than another."""
    bins = [*bins, *([] for _ in range(-len(bins) % num_ranks))]
    costs = [_cost([rows], lengths) for rows in bins]
    return [[sorted(bins[index]) for index in rank] for rank in _deal(costs, num_ranks)]


def _cost(bins: Sequence[list[int]], lengths: Sequence[int]) -> int:
    return sum(max(lengths[row] for row in rows) * len(rows) for rows in bins if rows)


def _smallest_budget(parts: list[Unit], widths: dict[int, int], count: int, budget: int) -> int:
    """With which ``count`` micro-batches still hold all units."""
    budgets = range(max(widths[part[0]] * len(part) for part in parts), budget)
    found = bisect_left(budgets, True, key=lambda less: len(_filled(parts, widths, less)) <= count)
    return budgets.start + found


def _filled(parts: list[Unit], widths: dict[int, int], budget: int) -> list[int]:
    """Where micro-batches begin that are filled one after the other with units, widest first: as few as can
    be, because widths only fall."""
    begins, rows = [0], 0
    for number, part in enumerate(parts):
        rows += len(part)
        if widths[parts[begins[-1]][0]] * rows > budget:
            begins.append(number)
            rows = len(part)
    return begins


def _cheapest(parts: list[Unit], widths: dict[int, int], budget: int, overhead: int) -> list[list[int]]:
    """Units, widest first, into consecutive micro-batches within the budget: the cut with the fewest tokens,
    padding and overhead included, or the more even of equals."""
    starts = [0, *accumulate(len(part) for part in parts)]
    best: dict[int, tuple[int, int]] = {0: (0, 0)}  # of the first units: tokens, sum of squares
    cut: dict[int, int] = {}
    for i, part in enumerate(parts):
        total, squares = best[i]
        for j in range(i + 1, len(starts)):
            cost = widths[part[0]] * (starts[j] - starts[i])
            if cost > budget:
                break
            reached = (total + cost + overhead, squares + cost * cost)
            if j not in best or reached < best[j]:
                best[j], cut[j] = reached, i
    bins: list[list[int]] = []
    end = len(parts)
    while end:
        bins.append([row for part in parts[cut[end] : end] for row in part])
        end = cut[end]
    return bins[::-1]


def _deal(costs: Sequence[int], num_ranks: int) -> list[list[int]]:
    """Micro-batch numbers of each rank, equally many, with loads as even as the largest differencing method
    makes them (Karmarkar and Karp 1982; its balanced form, Michiels et al. 2003).

    Each run of ``num_ranks`` micro-batches of like cost is a partial answer, one for each rank; the two with
    the widest gap between their heaviest and lightest rank are merged, heaviest to lightest, until one is
    left. Within a rank the widest come first, so the ranks' k-th micro-batches are of like cost.
    """
    order = sorted(range(len(costs)), key=lambda index: -costs[index])
    answers = [
        [(costs[index], [index]) for index in order[k : k + num_ranks]]
        for k in range(0, len(order), num_ranks)
    ]
    answers.sort(key=_gap)
    while len(answers) > 1:
        first, second = answers[:2]
        del answers[:2]
        merged = [(a + b, x + y) for (a, x), (b, y) in zip(first, reversed(second), strict=True)]
        insort_left(answers, sorted(merged, key=lambda load: -load[0]), key=_gap)
    return [sorted(indices, key=lambda index: -costs[index]) for _, indices in answers[0]]


def _gap(ranks: list[tuple[int, list[int]]]) -> int:
    """Negative, so that the widest comes first."""
    return ranks[-1][0] - ranks[0][0]
