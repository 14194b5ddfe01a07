"""What the driver itself carries from step to step, and a checkpoint therefore keeps (BUGS E5)."""

from dataclasses import asdict, dataclass
from typing import Any, Self

from orchestrator.shaping import RunningStats


@dataclass(frozen=True, slots=True, kw_only=True)
class DriverState:
    """After ``step`` steps: what the next one starts from."""

    step: int
    kl_coef: float  # of the algorithm's controller
    rewards: RunningStats  # of all rewards so far, for their normalisation

    def plain(self) -> dict[str, Any]:
        """For JSON, which keeps a float to the last bit."""
        return asdict(self)

    @classmethod
    def restored(cls, plain: dict[str, Any]) -> Self:
        return cls(**{**plain, "rewards": RunningStats(**plain["rewards"])})
