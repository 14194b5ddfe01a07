"""A plan in words: what each device holds, what does not fit, how long a step takes and how sure that is."""

from __future__ import annotations

from orchestrator.plan.devices import GIB
from orchestrator.plan.fit import Fit, Planned, Pool, why_not
from orchestrator.plan.memory import high, low, total

SMALL = 0.01  # of the capacity: parts below it go into one line


def memory_text(plan: Planned, found: list[Fit]) -> str:
    """Each stage: every kind of device with its parts in GiB, then what does not fit and why."""
    lines = []
    for fit in found:
        lines.append(f"stage {fit.stage.name}")
        for pool in fit.pools:
            lines += pool_lines(pool)
        if fit.cannot:
            lines.append(f"  DOES NOT FIT: {why_not(plan, fit)}")
    return "\n".join(lines)


def pool_lines(pool: Pool) -> list[str]:
    head = (
        f"  {pool.where}: {gib(total(pool.parts))} of {gib(pool.capacity)} GiB "
        f"({gib(low(pool.parts))} to {gib(high(pool.parts))}), {pool.verdict}"
    )
    shown = sorted(pool.parts, key=lambda part: -part.bytes)
    large = [part for part in shown if part.bytes >= SMALL * pool.capacity]
    rest = sum(part.bytes for part in shown) - sum(part.bytes for part in large)
    lines = [
        f"    {gib(part.bytes):>8}  {part.name}" + (f"  ±{part.spread:.0%}" if part.spread else "")
        for part in large
    ]
    return [head, *lines, *([f"    {gib(rest):>8}  the rest"] if rest else [])]


def gib(num_bytes: float) -> str:
    return f"{num_bytes / GIB:.3g}"
