"""Groups that are sampled and scored but not trained on, as plain data: a checkpoint keeps them (staleness of
1 and more), so that a resume trains on exactly these."""

from dataclasses import asdict
from typing import Any

import torch

from orchestrator.batch import Prompt, Rollout, ScoredRollout, StopReason

Group = list[ScoredRollout]


def plain(group: Group) -> list[dict[str, Any]]:
    """For JSON, which keeps every float to the last bit."""
    return [
        {
            "rollout": asdict(one.rollout),
            "reward": one.reward,
            "parts": one.parts,
            "scores": {role: scores.tolist() for role, scores in one.scores.items()},
            "baseline": one.baseline,
        }
        for one in group
    ]


def restored(rows: list[dict[str, Any]]) -> Group:
    return [
        ScoredRollout(
            **row
            | {
                "rollout": _rollout(row["rollout"]),
                "scores": {role: torch.tensor(scores) for role, scores in row["scores"].items()},
            }
        )
        for row in rows
    ]


def _rollout(row: dict[str, Any]) -> Rollout:
    prompt = Prompt(**row["prompt"] | {"tokens": tuple(row["prompt"]["tokens"])})
    columns = {name: tuple(row[name]) for name in ("tokens", "action_mask", "logprobs", "versions")}
    return Rollout(**row | columns | {"prompt": prompt, "stop": StopReason(row["stop"])})
