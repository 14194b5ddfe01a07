"""A plan in words: what each device holds, what does not fit, how long a step takes and how sure that is."""

from __future__ import annotations

from orchestrator.plan.devices import GIB
from orchestrator.plan.fit import Fit, Planned, Pool
from orchestrator.plan.memory import high, low, total
from orchestrator.plan.predict import Prediction
from orchestrator.plan.remedy import why_not
from orchestrator.plan.service import Rates

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


def time_text(plan: Planned, found: Prediction, rates: Rates, *, price: float) -> str:
    """A step, its phases, what is idle and why, and what the run costs."""
    rl = plan.run.rl
    assert rl is not None
    devices = plan.cluster.num_devices
    hours = found.step_s * rl.steps * devices / 3600
    per_million = found.step_s * devices / 3600 * price / found.tokens * 1e6
    phases = ", ".join(f"{name} {seconds:.3g}" for name, seconds in sorted(found.seconds.items()))
    idle = ", ".join(
        f"{share:.0%} {'by the driver' if cause == 'driver' else 'while others ' + cause}"
        for cause, share in sorted(found.idle.items(), key=lambda entry: -entry[1])
        if share >= SMALL
    )
    spread = f"{found.low_s:.3g} to {found.high_s:.3g}"
    unit = "core" if plan.cluster.device.is_cpu else "GPU"
    lines = [
        f"step: {found.step_s:.3g} s ({spread}), {found.tokens_per_s:.4g} tokens/s, rates of {rates.source}",
        f"  seconds by phase, which overlap: {phases}",
        f"  devices busy {found.busy:.0%}; idle {idle or '0%'}",
        f"  {rl.steps} steps: {hours:.3g} {unit}-hours, ${hours * price:.3g}; ${per_million:.3g} per "
        "million tokens "
        f"at ${price:g} an hour",
    ]
    assert plan.workload is not None
    unknown = [*plan.workload.assumed, "the tail of the response lengths (log-normal, sigma 0.8)"]
    return "\n".join([*lines, f"  not known, assumed: {'; '.join(unknown)}"])
