"""What every objective file offers: settings, the rows it reads, whether it needs a reference, its loss.

Objectives use tensor methods only and never import torch at run time: the configuration tree holds them.
A loss per pair, ranking or sequence is [b]; it stands on the first row of its group, the other rows weigh 0,
so a group must never be cut (``Examples.groups`` keeps it in one micro-batch).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from orchestrator import plugins
from orchestrator.batch import Examples, Loss, PolicyOutput
from orchestrator.settings import Settings

if TYPE_CHECKING:
    from torch import Tensor

PACKAGE = "orchestrator.objectives"
Layout = Literal["examples", "pairs", "rankings", "ratings", "labels"]


class Objective(Settings):
    """Frozen and picklable: it travels to the learners, which call its loss."""

    name: ClassVar[str]
    stage: ClassVar[Literal["sft", "reward_model", "preference"]]
    layout: ClassVar[Layout]  # which rows of a file it reads (orchestrator/data.py)
    needs_reference: ClassVar[bool] = False
    needs_kl: ClassVar[bool] = False  # True: reads Examples.kl
    token_wise: ClassVar[bool] = False  # True: the loss of a token reads no other token's log-prob

    @abstractmethod
    def loss(self, output: Any, part: Examples) -> Loss:
        """Of some rows: from a ``PolicyOutput``, or from scores [b] for a reward model."""

    @abstractmethod
    def weights(self, part: Examples) -> Tensor:
        """Of every row of a minibatch; they sum to 1."""

    def summarize(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """The figures of a step as they are logged, from their weighted means over the minibatch."""
        return dict(metrics)


def objective(value: Any, *, stage: str, default: str) -> Any:
    """{"name": "dpo", **settings} -> the settings class of orchestrator/objectives/dpo.py, filled."""
    if not isinstance(value, dict):
        return value
    settings = dict(value)
    name = settings.pop("name", default)
    found = plugins.find(PACKAGE, name).CONFIG
    if found.stage != stage:
        fitting = ", ".join(
            n for n in plugins.names(PACKAGE) if plugins.find(PACKAGE, n).CONFIG.stage == stage
        )
        raise ValueError(f"objective {name!r} belongs to the {found.stage} stage; here: {fitting}")
    return found(**settings)


def softplus(x: Tensor) -> Tensor:
    """log(1 + exp(x)) = -log sigmoid(-x), finite and exact at any x."""
    return x.logaddexp(x.new_zeros(()))


def smoothed(margin: Tensor, label_smoothing: float) -> Tensor:
    """-(1 - e) log sigmoid(m) - e log sigmoid(-m): the label is wrong with probability e."""
    return (1 - label_smoothing) * softplus(-margin) + label_smoothing * softplus(margin)


def halves(rows: Tensor) -> tuple[Tensor, Tensor]:
    """[2n] -> chosen [n], rejected [n]; ValueError when a pair was cut."""
    if len(rows) % 2:
        raise ValueError(
            f"{len(rows)} rows are not whole pairs (chosen, rejected); cut minibatches at even rows"
        )
    return rows[0::2], rows[1::2]


def on_first_rows(pairs: Tensor) -> Tensor:
    """[n] -> [2n]: x0 0 x1 0 ..."""
    rows = pairs.new_zeros((len(pairs), 2))
    rows[:, 0] = pairs
    return rows.flatten()


def pair_weights(part: Examples) -> Tensor:
    """[b] 1 / (pairs of the minibatch) on even rows, 0 on odd rows."""
    ones = part.tokens.new_ones(len(part.tokens) // 2).float()
    return on_first_rows(ones / max(1, len(ones)))


def half_right(margin: Tensor) -> Tensor:
    """1 where the margin is positive, 1/2 at a tie, 0 where it is negative."""
    return (margin > 0).to(margin.dtype) + (margin == 0).to(margin.dtype) / 2


def response_logprobs(output: PolicyOutput, part: Examples) -> tuple[Tensor, Tensor]:
    """log p(response | prompt), summed over its tokens, [b]; and how many tokens those are, [b]."""
    return output.logprobs.where(part.action_mask, 0.0).sum(1), part.action_mask.sum(1).clamp(min=1)


def log_ratios(output: PolicyOutput, part: Examples) -> Tensor:
    """[b] log p(response) - log p_ref(response)."""
    if part.ref_logprobs is None:
        raise ValueError("the objective compares with a reference, and the rows carry no ref_logprobs")
    return response_logprobs(output, part)[0] - part.ref_logprobs


def pair_loss(values: Tensor, rewards: Tensor, output: PolicyOutput, part: Examples) -> Loss:
    """A loss per pair with the figures of every preference objective: rewards [2n], margins, log-probs.

    ``rewards`` are the objective's implicit ones; accuracy is the share of pairs whose chosen response has
    the higher.
    """
    chosen, rejected = halves(rewards.detach())
    said, refused = halves(response_logprobs(output, part)[0].detach())
    figures = {
        "accuracy": half_right(chosen - rejected),
        "margin": chosen - rejected,
        "chosen_reward": chosen,
        "rejected_reward": rejected,
        "chosen_logprob": said,
        "rejected_logprob": refused,
    }
    return Loss(
        values=on_first_rows(values), metrics={name: on_first_rows(each) for name, each in figures.items()}
    )
