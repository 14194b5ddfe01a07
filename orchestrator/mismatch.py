"""Why the engine's log-probs of a batch are not the trainer's.

They are compared on every step. Rounding makes them differ a little; more than that has one of four causes,
told apart by what each leaves behind:

    weights       the probe, the same tokens through both ends, differs too
    staleness     only tokens of older weights differ
    sampling      the difference is systematic: grows with the log-prob (temperature), or has one sign (top-p)
    numerics      none of these: kernels, data types, attention
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from orchestrator.batch import Batch

if TYPE_CHECKING:
    from torch import Tensor

CAUSES = ("weights", "staleness", "sampling", "numerics")
MISMATCH = "mismatch/"  # + cause: 1.0 on a step whose log-probs are out of range for it
SYSTEMATIC = 0.5  # correlation with the log-prob; noise of the same size has less than 0.2
ONE_SIDED = 0.9  # |mean| over mean of |difference|


def mismatch_cause(
    trainer: Tensor | None, batch: Batch, *, version: int, mean: float, tolerance: float, probe_diff: float
) -> str | None:
    """One of CAUSES, or None while ``mean``, of |difference| in nats, is within ``tolerance``.

    ``trainer`` [B, T] log-probs under the weights of ``version``; None where only their mean is known: then
    sampling cannot be told from numerics.
    """
    if mean <= tolerance:
        return None
    if probe_diff > tolerance:
        return "weights"
    mask = batch.action_mask
    old = batch.versions[mask] < version
    if trainer is None:
        return "staleness" if bool(old.any()) else "numerics"
    engine = batch.rollout_logprobs[mask].double()
    difference = trainer[mask].double() - engine
    fresh, engine = difference[~old], engine[~old]
    if bool(old.any()) and (not len(fresh) or float(fresh.abs().mean()) <= tolerance):
        return "staleness"
    if float(fresh.mean().abs()) > ONE_SIDED * float(fresh.abs().mean()):
        return "sampling"
    spread = (fresh - fresh.mean()).norm() * (engine - engine.mean()).norm()
    correlation = (fresh - fresh.mean()) @ (engine - engine.mean()) / spread.clamp(min=1e-12)
    return "sampling" if float(correlation.abs()) > SYSTEMATIC else "numerics"
