"""What `quartet evaluate` measures."""

from __future__ import annotations

from pydantic import PositiveInt

from orchestrator.config.data import ChatData, PromptData
from orchestrator.config.rl import SamplingConfig
from orchestrator.settings import Settings


class Evaluate(Settings):
    """Held-out loss, reward, pass@k and win rate of one checkpoint; training ignores it.

    The judge is roles.reward: a model or a function.
    """

    model: str | None = None
    """Checkpoint to measure; default: what the run's last stage left, or model.path."""
    against: str | None = None
    """Checkpoint that it is compared with."""
    heldout: ChatData | None = None
    """Rows whose loss is measured."""
    prompts: PromptData | None = None
    """Prompts that are answered and judged."""
    samples_per_prompt: PositiveInt = 1
    """Answers to each prompt; pass@k needs k or more."""
    sampling: SamplingConfig = SamplingConfig()
    """How answers are drawn."""
    pass_at: tuple[PositiveInt, ...] = (1,)
    """The k of pass@k: the share of prompts that one of k answers solves."""
    solved_from: float = 1.0
    """Reward from which an answer counts as solved."""
