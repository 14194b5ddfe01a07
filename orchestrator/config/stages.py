"""The supervised stages."""

from __future__ import annotations

from pydantic import PositiveFloat, PositiveInt

from orchestrator.config.data import ChatData
from orchestrator.config.model import Optimizer
from orchestrator.settings import Fraction, Settings


class Sft(Settings):
    """Supervised fine-tuning on prompt and response."""

    data: ChatData = ChatData()
    """Training rows; filled in by the task when the run has one."""
    epochs: PositiveFloat = 1
    """Passes over the data; a fraction stops inside one."""
    batch_size: PositiveInt = 32
    """Sequences per optimizer step."""
    optimizer: Optimizer = Optimizer(learning_rate=1e-5)
    """Optimizer of this stage."""


class RewardModel(Settings):
    """A reward model from preference pairs (Bradley-Terry)."""

    data: ChatData = ChatData()
    """Training pairs; filled in by the task when the run has one."""
    heldout: ChatData | None = None
    """Pairs for the held-out accuracy; default: the last heldout_fraction of data."""
    heldout_fraction: Fraction = 0.1
    """Share of data held out when heldout is not given."""
    epochs: PositiveFloat = 1
    """Passes over the data; a fraction stops inside one."""
    batch_size: PositiveInt = 32
    """Pairs per optimizer step."""
    model: str | None = None
    """Weights to start from; default: the last stage's."""
    optimizer: Optimizer = Optimizer(learning_rate=1e-5)
    """Optimizer of this stage."""
