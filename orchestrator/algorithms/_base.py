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
    greedy_baseline: ClassVar[bool] = False  # True: a greedy response is drawn per prompt

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

    @property
    def wants_distribution(self) -> bool:
        return False

    @property
    def initial_kl_coef(self) -> float:
        return float(getattr(self, "kl_coef", 0.0))

    def next_kl_coef(self, coef: float, metrics: dict[str, float], num_sequences: int) -> float:
        return coef

    @abstractmethod
    def experience(
        self, batch: Batch, scores: dict[str, Tensor], kl_coef: float
    ) -> tuple[Experience, dict[str, float]]:
        """Rewards and scores ("actor" if wanted, "critic", "reference": [B, T]) -> advantages and targets."""

    @abstractmethod
    def policy_loss(self, policy: PolicyOutput, part: Experience) -> Loss:
        """[B, T] loss per token of some rows."""

    def value_loss(self, values: Tensor, part: Experience) -> Loss:
        """[B, T] loss per token of some rows; only for algorithms with a critic."""
        raise TypeError(f"{self.name} has no critic")
