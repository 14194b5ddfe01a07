"""How many engines a run may have while it works, and how long its trainers may wait for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field, PositiveInt

from orchestrator.settings import RoleName, Settings


class Autoscale(Settings):
    """Engines join and leave while the run works, one at a time (orchestrator/autoscale.py)."""

    min: PositiveInt = 1
    """Never fewer engines."""
    max: PositiveInt = 8
    """Never more engines."""
    target_wait: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of a step that the trainers may wait for generation. With rl.staleness 0 they wait for all of it:
    0.1 then asks for engines that generate in a ninth of the time that the rest of the step takes."""
    window: PositiveInt = 5
    """Steps with the same number of engines whose median decides; so also the pause between two changes."""


def check_autoscale(scale: Autoscale, *, replicas: int, share: Sequence[Sequence[RoleName]]) -> None:
    """ValueError for bounds that hold no number, a start outside of them, and engines that cannot move."""
    if scale.min > scale.max:
        raise ValueError(
            f"engine.autoscale.min={scale.min} is more than engine.autoscale.max={scale.max}; swap them"
        )
    if not scale.min <= replicas <= scale.max:
        raise ValueError(
            f"engine.replicas={replicas} is not within engine.autoscale.min={scale.min} and "
            f"max={scale.max}; start with a number between them, or widen them"
        )
    for group in share:
        if "engine" in group and len(group) > 1:
            raise ValueError(
                f"engine.autoscale with placement.share={list(group)}: the engines live on devices of which "
                "there are no more; give them devices of their own, or leave engine.autoscale out"
            )
