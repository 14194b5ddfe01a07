"""The data that travels: Prompt -> Rollout -> Batch -> Experience, and Examples for the supervised stages.

Letters, everywhere in this project:
    B  sequences in a batch        T  tokens in a sequence, padded to the longest on the right

One alignment, everywhere: index t speaks about the token AT t. ``logprobs[b, t]`` is
log p(tokens[b, t] | tokens[b, :t]); ``values[b, t]`` is the value of the state BEFORE it.
Nothing is ever shifted outside ``actors/model.py``.

A stage type has only fields that are known at that stage, so None never means "not yet". Torch is not
imported here: the configuration tree reaches these types, and ``quartet --help`` answers before torch loads.

Example, "2+3=5" with the five sampled and an end-of-sequence token 9, one token a character:

    tokens            [[2, 10, 3, 11, 5, 9]]
    action_mask       [[0,  0, 0,  0, 1, 1]]
    rollout_logprobs  [[0,  0, 0,  0, -0.1, -0.02]]    what the engine's sampler drew from
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field, fields
from enum import StrEnum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


class StopReason(StrEnum):
    """Why the policy stopped: it chose to (``eos``) or it ran into a limit (``length``)."""

    EOS = "eos"
    LENGTH = "length"


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One row of the prompt set in one epoch."""

    uid: str  # "epoch/row"
    row: int  # row number in the prompt file, for messages
    tokens: tuple[int, ...]  # what the engine is given, token for token
    text: str  # the same, decoded, for reward functions and sample files
    label: str | None  # the reference answer; None when the data set has none


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """One sampled sequence: a prompt and every turn that followed it."""

    uid: str  # "epoch/row/sample": names the ledger entry and seeds the sampler
    prompt: Prompt
    tokens: tuple[int, ...]  # [T] prompt and response, exactly as the engine saw them
    action_mask: tuple[bool, ...]  # [T] True where the policy chose the token
    logprobs: tuple[float, ...]  # [T] the engine's own, 0.0 where action_mask is False
    text: str  # the response, decoded, without special tokens
    versions: tuple[
        int, ...
    ]  # [T] of the weights that the token was drawn from, 0 where action_mask is False
    stop: StopReason


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredRollout:
    """A rollout with its reward: finite, or NaN: then the loop learns nothing from its batch."""

    rollout: Rollout
    reward: float  # the weighted sum of the run's rewards, before shaping
    parts: dict[str, float] = field(default_factory=dict)  # each reward's own, by name
    scores: dict[str, Tensor] = field(default_factory=dict)  # {role: [T]} of roles that scored it early
    baseline: float | None = None  # reward of the greedy response to the same prompt; None: not drawn


class _Columns:
    """Checks at construction that every tensor of a record has the shape [B, T] or [B] of its tokens.

    Tensors are pickled as NumPy's arrays: Ray maps those into every worker without a copy, and a tensor
    itself takes 0.3 ms on either side. So a record that has travelled can be read only.
    """

    __slots__ = ()

    def __reduce__(self) -> tuple[Any, ...]:
        values = {column.name: getattr(self, column.name) for column in fields(self)}  # type: ignore[arg-type]
        arrays = {name: value.numpy() for name, value in values.items() if hasattr(value, "numpy")}
        return _restored, (type(self), arrays, {n: v for n, v in values.items() if n not in arrays})

    def __post_init__(self) -> None:
        B, T = self.tokens.shape  # type: ignore[attr-defined]
        for column in fields(self):  # type: ignore[arg-type]
            shape = getattr(getattr(self, column.name), "shape", None)
            if shape is not None and tuple(shape[:2]) not in ((B, T), (B,)):
                raise ValueError(
                    f"{type(self).__name__}.{column.name} has shape {tuple(shape)}; "
                    f"expected ({B}, {T}) or ({B},)"
                )


def _restored(record: type, arrays: dict[str, Any], others: dict[str, Any]) -> Any:
    import torch  # noqa: PLC0415 - see the docstring of this module

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of arrays that cannot be written: nobody writes into a record
        return record(**{name: torch.from_numpy(array) for name, array in arrays.items()}, **others)


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch(_Columns):
    """Scored rollouts, stacked."""

    tokens: Tensor  # [B, T] int64
    attention_mask: Tensor  # [B, T] bool
    action_mask: Tensor  # [B, T] bool, a subset of attention_mask
    rollout_logprobs: Tensor  # [B, T] float32
    rewards: Tensor  # [B] float32
    groups: Tensor  # [B] int64: rollouts of one prompt share a number, 0, 1, ... in order of appearance
    versions: Tensor  # [B, T] int64: of the weights that drew the token, 0 off the action mask
    stopped: Tensor  # [B] bool: the policy ended by itself
    baselines: Tensor | None  # [B] None when no greedy response was drawn


@dataclass(frozen=True, slots=True, kw_only=True)
class Experience(_Columns):
    """A batch the learners can step on."""

    tokens: Tensor  # [B, T] int64
    attention_mask: Tensor  # [B, T] bool
    action_mask: Tensor  # [B, T] bool
    rollout_logprobs: Tensor  # [B, T] float32, the engine's
    old_logprobs: (
        Tensor | None
    )  # [B, T] policy before this step; None: the only update takes its own (ratio 1)
    advantages: Tensor  # [B, T] 0.0 off the action mask
    old_values: Tensor | None  # [B, T] critic before this step; None when the run has no critic
    returns: Tensor | None  # [B, T] critic targets; None when the run has no critic
    ref_logprobs: Tensor | None  # [B, T] None when the run has no reference
    kl_coef: float = 0.0
    ref_distribution: Tensor | None = None  # [B, T, V]
    groups: Tensor | None = None  # [B] int64: rows of one number are stepped on in one micro-batch, rows of
    # -1 not at all; None: each row stands alone


@dataclass(frozen=True, slots=True, kw_only=True)
class Examples(_Columns):
    """Supervised sequences. Rows that one loss compares lie side by side and share a number in ``groups``:
    of a preference pair, row 2i is chosen and row 2i+1 rejected.

    Example, two documents of 2 and 3 tokens packed into one row: positions [[0, 1, 0, 1, 2]].
    """

    tokens: Tensor  # [B, T] int64
    attention_mask: Tensor  # [B, T] bool
    action_mask: Tensor  # [B, T] bool: tokens the model is trained to say; in pairs, the response
    positions: Tensor | None = None  # [B, T] int64, from 0 in every packed document; None: a document a row
    groups: Tensor | None = None  # [B] int64, ascending: rows that stay together; None: each stands alone
    targets: Tensor | None = (
        None  # [B] what the data say of a row: margin, rating, 1 good / 0 bad; or nothing
    )
    ref_logprobs: Tensor | None = None  # [B] of the response under the reference; None: no reference
    kl: float = 0.0  # of the policy from the reference over the whole minibatch (KTO)


Records = Batch | Experience | Examples


@dataclass(frozen=True, slots=True, kw_only=True)
class Minibatch:
    """One optimizer step: some rows of the records, and what each of their tokens weighs in the loss."""

    records: Experience | Examples
    rows: Tensor  # [b] int64, rows of the records
    weights: Tensor  # [b, T] (or [b] for losses per sequence); sums to 1 over the whole minibatch


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyOutput:
    """What the policy says of the tokens it is shown."""

    logprobs: Tensor  # [B, T] of the tokens under the sampling temperature, 0.0 off the mask asked for
    entropy: Tensor | None  # [B, T] of the whole distribution; None unless the loss asks for it
    distribution: Tensor | None = None  # [B, T, V] log-probs of the whole vocabulary
    carrier: Tensor | None = None  # scalar 0.0 with the loss's gradient, which the others lack then


@dataclass(frozen=True, slots=True, kw_only=True)
class Loss:
    """A loss before its reduction, and figures reduced the same way for the log."""

    values: Tensor  # [b, T] or [b]: the learner's loss is (weights * values).sum()
    metrics: dict[str, Tensor]  # each of the shape of values, detached
