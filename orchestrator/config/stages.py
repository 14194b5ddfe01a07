"""The supervised stages: SFT, reward model, preference learning."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field, PositiveFloat, PositiveInt, SerializeAsAny, model_validator

from orchestrator.config.adapter import Adapter
from orchestrator.config.data import ChatData
from orchestrator.config.model import Optimizer
from orchestrator.objectives._base import Objective, objective
from orchestrator.settings import Fraction, Settings


def _reward_objective(value: Any) -> Any:
    return objective(value, stage="reward_model", default="bradley_terry")


def _preference_objective(value: Any) -> Any:
    return objective(value, stage="preference", default="dpo")


class Sft(Settings):
    """Supervised fine-tuning on chats, on prompt and response, or on plain text."""

    data: ChatData = ChatData()
    """Training rows; filled in by the task when the run has one."""
    mixture: tuple[ChatData, ...] = ()
    """More data sets, mixed into the first by the `ratio` of each."""
    heldout_fraction: Fraction = 0.0
    """Share of the rows held out; their loss is measured after the last step."""
    packing: bool = False
    """Several rows in one sequence of model.max_length; none sees another. batch_size then counts
    sequences."""
    epochs: PositiveFloat = 1
    """Passes over the data; a fraction stops inside one."""
    batch_size: PositiveInt = 32
    """Sequences per optimizer step."""
    optimizer: Optimizer = Optimizer(learning_rate=1e-5)
    """Optimizer of this stage."""
    adapter: Adapter | None = None
    """Trained instead of the weights in this stage; default: model.adapter."""

    @model_validator(mode="after")
    def _ratios(self) -> Sft:
        given = [data.ratio is not None for data in (self.data, *self.mixture)]
        if any(given) and not all(given):
            raise ValueError(
                "some data sets have a ratio and some have none; give one to data and to each of mixture"
            )
        return self


class RewardModel(Settings):
    """A reward model from preference pairs, rankings or ratings."""

    objective: Annotated[SerializeAsAny[Objective], BeforeValidator(_reward_objective)] = Field(
        default_factory=lambda: _reward_objective({})
    )
    """`name` (bradley_terry, ranking, regression) and its own settings."""
    data: ChatData = ChatData()
    """Training rows; filled in by the task when the run has one."""
    heldout: ChatData | None = None
    """Rows for the held-out figures; default: the last heldout_fraction of data."""
    heldout_fraction: Fraction = 0.1
    """Share of data held out when heldout is not given."""
    epochs: PositiveFloat = 1
    """Passes over the data; a fraction stops inside one."""
    batch_size: PositiveInt = 32
    """Pairs (prompts of rankings, rated responses) per optimizer step."""
    model: str | None = None
    """Weights to start from; default: the last stage's."""
    optimizer: Optimizer = Optimizer(learning_rate=1e-5)
    """Optimizer of this stage."""
    adapter: Adapter | None = None
    """Trained instead of the weights in this stage; default: model.adapter."""


class Preference(Settings):
    """Preference learning without a reward model: DPO and its family."""

    objective: Annotated[SerializeAsAny[Objective], BeforeValidator(_preference_objective)] = Field(
        default_factory=lambda: _preference_objective({})
    )
    """`name` (dpo, ipo, kto, cpo, orpo, simpo) and its own settings."""
    data: ChatData = ChatData()
    """Training pairs, or for kto rows with label_key."""
    heldout: ChatData | None = None
    """Rows for the held-out figures; default: the last heldout_fraction of data."""
    heldout_fraction: Fraction = 0.1
    """Share of data held out when heldout is not given; 0: none."""
    precompute_reference: bool = False
    """Ask the reference once for all rows and end it before training: memory for one pass of time."""
    epochs: PositiveFloat = 1
    """Passes over the data; a fraction stops inside one."""
    batch_size: PositiveInt = 16
    """Pairs (for kto rows) per optimizer step."""
    optimizer: Optimizer = Optimizer(learning_rate=1e-6)
    """Optimizer of this stage."""
    adapter: Adapter | None = None
    """Trained instead of the weights in this stage; default: model.adapter."""
