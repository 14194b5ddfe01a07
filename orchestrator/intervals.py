"""Sets of moments as sorted, disjoint intervals (start, end): union, intersection, difference and length.

Example: union [(0, 4), (1, 5), (7, 9)] -> [(0, 5), (7, 9)]; without [(4, 8)] -> [(0, 4), (8, 9)], length 5.
"""

from collections.abc import Iterable

Interval = tuple[float, float]


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """Empty and reversed intervals cover nothing."""
    joined: list[Interval] = []
    for start, end in sorted(intervals):
        if end <= start:
            continue
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((start, end))
    return joined


def intersection(first: Iterable[Interval], second: Iterable[Interval]) -> list[Interval]:
    """Of two unions."""
    a, b, shared = list(first), list(second), list[Interval]()
    i = j = 0
    while i < len(a) and j < len(b):
        start, end = max(a[i][0], b[j][0]), min(a[i][1], b[j][1])
        if start < end:
            shared.append((start, end))
        if a[i][1] < b[j][1]:
            i += 1
        else:
            j += 1
    return shared


def difference(first: Iterable[Interval], second: Iterable[Interval]) -> list[Interval]:
    """The moments of ``first`` that are not in ``second``; both unions."""
    holes, left = list(second), list[Interval]()
    for start, end in first:
        at = start
        for hole_start, hole_end in intersection([(start, end)], holes):
            if at < hole_start:
                left.append((at, hole_start))
            at = hole_end
        if at < end:
            left.append((at, end))
    return left


def length(intervals: Iterable[Interval]) -> float:
    """Of a union."""
    return sum(end - start for start, end in intervals)
