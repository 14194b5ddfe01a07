"""REINFORCE leave-one-out (arXiv:2402.14740 section 3.1): the other samples of a prompt are the baseline.

The KL is part of the response's reward. The paper's loss is the policy gradient, one update per batch; with
more updates the ratio is clipped as in TRL and OpenRLHF. A group of one gets 0 (verl keeps its raw reward).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import NonNegativeFloat

from orchestrator.algorithms._groups import ClippedGroupAlgorithm
from orchestrator.estimators import group_centred
from orchestrator.kl import Estimator
from orchestrator.settings import Aggregate

if TYPE_CHECKING:
    from torch import Tensor


class RLOO(ClippedGroupAlgorithm):
    """Clipped policy loss over rewards minus the mean of the others in the group."""

    name: ClassVar[str] = "rloo"
    aggregate: ClassVar[Aggregate] = "token_mean"

    kl_coef: NonNegativeFloat = 0.01
    """Weight of the KL to the reference, at the start; 0 runs without a reference."""
    kl_in: Literal["reward", "loss"] = "reward"
    """Whether that KL is taken from the reward or added to the loss."""
    kl_estimator: Estimator = "k1"
    """Estimator of that KL; k1 is unbiased in the reward."""

    def compare(self, rewards: Tensor, groups: Tensor, valid: Tensor) -> Tensor:
        return group_centred(rewards, groups, valid, leave_one_out=True)


CONFIG = RLOO
