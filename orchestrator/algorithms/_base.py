"""What every algorithm file offers: settings, the roles it needs, its advantages and its loss.

Algorithms use tensor methods only and never import torch at run time: the configuration tree holds them.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, ClassVar

from orchestrator.batch import Batch, Experience, Loss, PolicyOutput
from orchestrator.settings import Settings

if TYPE_CHECKING:
    from torch import Tensor


class AlgorithmConfig(Settings):
    """Frozen and picklable: it travels to the learners, which call its losses."""

    name: ClassVar[str]
    compares_siblings: ClassVar[bool] = False  # True: one sample per prompt gives no signal

    @abstractmethod
    def roles(self) -> frozenset[str]:
        """Those of "critic" and "reference" that this algorithm, as configured, needs."""

    def wants_scores(self, num_updates: int) -> bool:
        """Whether ``experience`` reads the actor's log-probs before the step, given the step's optimizer
        steps."""
        return True

    @property
    def wants_entropy(self) -> bool:
        """Whether ``policy_loss`` reads the entropy of the whole distribution."""
        return False

    @abstractmethod
    def experience(self, batch: Batch, scores: dict[str, Tensor]) -> tuple[Experience, dict[str, float]]:
        """Rewards and scores ("actor" if wanted, "critic", "reference": [B, T]) -> advantages and targets."""

    @abstractmethod
    def policy_loss(self, policy: PolicyOutput, part: Experience) -> Loss:
        """[B, T] loss per token of some rows."""

    def value_loss(self, values: Tensor, part: Experience) -> Loss:
        """[B, T] loss per token of some rows; only for algorithms with a critic."""
        raise TypeError(f"{self.name} has no critic")
