"""Whether the nodes of a target can ever hold a run: asked before anything is created."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from orchestrator.config import Run
from orchestrator.placement import layout, shortage, stage_roles


def too_large(run: Run, nodes: Sequence[Mapping[str, float]]) -> list[str]:
    """One line per stage that the nodes cannot hold; ``nodes`` as Ray gives them, e.g. [{"CPU": 64, "GPU":
    8}]."""
    whys = (shortage(run, layout(run, roles), nodes) for _, roles in stage_roles(run))
    return [why for why in whys if why]
