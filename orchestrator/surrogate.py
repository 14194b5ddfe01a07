"""The losses that several algorithms share, per token and before any reduction."""

from __future__ import annotations

from typing import TYPE_CHECKING

from orchestrator.batch import Experience, Loss

if TYPE_CHECKING:
    from torch import Tensor


def clipped_surrogate(
    logprobs: Tensor, old: Tensor, part: Experience, *, low: float, high: float, dual: float | None = None
) -> Loss:
    """max(-r A, -clip(r, 1 - low, 1 + high) A), [B, T], 0 off the mask (arXiv:1707.06347 eq. 7).

    r = exp(logprobs - old), not clamped. ``dual`` > 1 caps the loss of a negative advantage at dual * -A
    (arXiv:1912.09729 eq. 5).
    """
    ratio = ratios(logprobs, old, part)
    return clip_ratio(ratio, part, low=low, high=high, dual=dual)


def clip_ratio(
    ratio: Tensor, part: Experience, *, low: float, high: float, dual: float | None = None
) -> Loss:
    """The same of any [B, T] ratio."""
    advantages = part.advantages.where(part.action_mask, 0.0)
    plain, clipped = -ratio * advantages, -ratio.clamp(1 - low, 1 + high) * advantages
    loss = plain.maximum(clipped)
    if dual is not None:
        loss = loss.minimum(-dual * advantages).where(advantages < 0, loss)
    return Loss(values=loss, metrics={"clip_fraction": (clipped > plain).to(ratio.dtype).detach()})


def unclipped_surrogate(logprobs: Tensor, old: Tensor, part: Experience) -> Loss:
    """-r A, [B, T]: the policy gradient, exact for rollouts of the policy before the step."""
    return Loss(
        values=-ratios(logprobs, old, part) * part.advantages.where(part.action_mask, 0.0), metrics={}
    )


def log_ratios(logprobs: Tensor, old: Tensor, part: Experience) -> Tensor:
    """[B, T] 0 off the mask."""
    return (logprobs - old).where(part.action_mask, 0.0)


def ratios(logprobs: Tensor, old: Tensor, part: Experience) -> Tensor:
    """[B, T] 1 off the mask."""
    return log_ratios(logprobs, old, part).exp()


def sequence_mean(values: Tensor, part: Experience) -> Tensor:
    """[B, T], 0 off the mask -> [B, 1] mean over each response's tokens; 0 for a response without any."""
    return values.sum(1, keepdim=True) / part.action_mask.sum(1, keepdim=True).clamp(min=1)


def clipped_value_loss(values: Tensor, part: Experience, *, clip: float | None) -> Loss:
    """max((V - R)^2, (V_clip - R)^2) / 2, [B, T], 0 off the mask, V_clip = V_old + clamp(V - V_old,
    +-clip)."""
    assert part.returns is not None and part.old_values is not None, (
        "a critic's experience has returns and values"
    )
    mask = part.action_mask
    values = values.where(mask, 0.0)
    returns, old = part.returns.where(mask, 0.0), part.old_values.where(mask, 0.0)
    squared = (values - returns).square()
    metrics = {"value_error": squared.detach()}
    if clip is not None:
        other = (old + (values - old).clamp(-clip, clip) - returns).square()
        metrics["value_clip_fraction"] = (other > squared).to(values.dtype).detach()
        squared = squared.maximum(other)
    return Loss(values=squared / 2, metrics=metrics)
