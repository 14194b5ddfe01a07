"""The clipped losses that most algorithms share, per token and before any reduction."""

from __future__ import annotations

from typing import TYPE_CHECKING

from orchestrator.batch import Experience, Loss

if TYPE_CHECKING:
    from torch import Tensor


def clipped_surrogate(
    logprobs: Tensor, part: Experience, *, low: float, high: float, dual: float | None = None
) -> Loss:
    """max(-r A, -clip(r, 1 - low, 1 + high) A), [B, T], 0 off the mask (arXiv:1707.06347 eq. 7).

    r = exp(logprobs - old_logprobs). Where the experience has no old_logprobs, the update is the only one of
    its step and the policy is its own predecessor: r is 1 and its gradient that of the log-prob. ``dual`` > 1
    caps the loss of a negative advantage at dual * -A (arXiv:1912.09729 eq. 5).
    """
    mask = part.action_mask
    old = logprobs.detach() if part.old_logprobs is None else part.old_logprobs
    log_ratio = (logprobs - old).where(mask, 0.0)
    advantages = part.advantages.where(mask, 0.0)
    ratio = log_ratio.exp()
    plain, clipped = -ratio * advantages, -ratio.clamp(1 - low, 1 + high) * advantages
    loss = plain.maximum(clipped)
    if dual is not None:
        loss = loss.minimum(-dual * advantages).where(advantages < 0, loss)
    detached = log_ratio.detach()
    metrics = {
        "clip_fraction": (clipped > plain).to(logprobs.dtype).detach(),
        "approx_kl": detached.exp() - 1 - detached,  # k3 of the step itself: KL(old || new)
    }
    if part.old_logprobs is None:  # else the driver compares the scores; later updates have moved away
        metrics["rollout_logprob_diff_mean"] = (old - part.rollout_logprobs).abs().where(mask, 0.0)
    return Loss(values=loss, metrics=metrics)


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
