"""How long one call of a role takes on its device: counted operations and bytes over rates, plus the
overheads that small models are made of.

The rates come from a calibration, or from the device's data sheet times what such code reaches of it; the
share by which they may be off travels with them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from orchestrator.balance import FEWEST, ON_CPU, plan, plan_apart
from orchestrator.config import Optimizer
from orchestrator.plan.devices import Cluster, Device
from orchestrator.plan.memory import BYTES, zero_stage
from orchestrator.plan.shapes import Shape


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """Of one device (a core). Seconds are per unit named; the fields of a calibration file."""

    flops: float  # per second, forward and backward passes of large batches, in the run's dtype
    bandwidth: float  # bytes/s that decoding and the optimizer reach
    layer_s: float  # a layer's forward pass beyond its operations: launches, small kernels
    call_s: float  # one call of a worker: Ray, the driver, splitting and stacking
    row_s: float  # a sequence in such a call
    update_s: float  # an optimizer step beyond its bytes
    iteration_s: float  # one step of the engine, beyond its operations
    slot_s: float  # a sequence in a step of the engine: its sampler
    request_s: float  # a request to the engine, beyond its tokens
    sync_s: float  # a weight sync beyond its bytes
    sync_bandwidth: float  # bytes/s
    sharing: float  # of a node's cores, what all together give at once; 1 on GPUs
    error: float  # the share by which a time may be off
    source: str


TRAINING, DECODING = 0.45, 0.65  # of the data sheet's operations and bytes that such code reaches


def sheet_rates(device: Device, dtype: str) -> Rates:
    """Without a calibration. On an H200 a plain matrix product reaches 0.80 of the sheet's operations and a
    copy 0.90 of its bytes (measured); training code about half, decoding about two thirds of that."""
    if device.is_cpu:
        return Rates(
            flops=0.6 * device.flops[dtype], bandwidth=0.8 * device.bandwidth, layer_s=4e-4, call_s=4e-3,
            row_s=1e-4, update_s=5e-3, iteration_s=8e-3, slot_s=8e-5, request_s=6e-4, sync_s=3e-2,
            sync_bandwidth=5e8, sharing=0.8, error=0.5, source="data sheet",
        )  # fmt: skip
    return Rates(
        flops=TRAINING * device.flops[dtype], bandwidth=DECODING * device.bandwidth, layer_s=1.5e-4,
        call_s=5e-3, row_s=5e-5, update_s=1e-2, iteration_s=3e-3, slot_s=5e-6, request_s=3e-4, sync_s=0.2,
        sync_bandwidth=0.2 * device.bandwidth, sharing=1.0, error=0.4, source="data sheet",
    )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """The times of one worker of a role with ``threads`` cores (1 on a GPU), of ``ranks``."""

    shape: Shape
    rates: Rates
    cluster: Cluster
    dtype: str
    ranks: int = 1
    threads: int = 1
    micro_batch_tokens: int = 16384
    checkpointing: bool = False
    sharded: bool = False  # ZeRO-3

    @property
    def flops(self) -> float:
        return self.rates.flops * self.threads

    @property
    def overhead(self) -> int:
        """Of a micro-batch, in tokens."""
        return ON_CPU if self.cluster.device.is_cpu else FEWEST

    def forward(self, lengths: Sequence[int], responses: Sequence[int]) -> float:
        """Of the largest share of these sequences (their tokens; those of their responses), call included."""
        return self._forward(self._counted(self._share(lengths), lengths, responses), len(lengths))

    def forward_apart(self, groups: Sequence[tuple[Sequence[int], Sequence[int]]]) -> float:
        """Of several groups in one call, no two of them in one micro-batch."""
        lengths = [length for own, _ in groups for length in own]
        responses = [length for _, own in groups for length in own]
        budget = max(self.micro_batch_tokens, *lengths)
        sizes = [len(own) for own, _ in groups]
        shares = plan_apart(lengths, sizes, num_ranks=self.ranks, token_budget=budget, overhead=self.overhead)
        largest = max((self._counted(parts, lengths, responses) for parts in shares), key=lambda own: own[1])
        return self._forward(largest, len(lengths))

    def _forward(self, counted: tuple[int, float, float, float], rows: int) -> float:
        """Of what one rank has of a call of ``rows`` sequences."""
        passes, padded, asked, pairs = counted
        seconds = self._operations(padded, asked, pairs) / self.flops + self._launches(passes)
        if self.sharded and self.ranks > 1:  # every forward pass gathers the weights
            seconds += passes * self.shape.params * BYTES[self.dtype] / self.cluster.links(self.ranks)
        return seconds + self.rates.call_s + self.rates.row_s * rows / self.ranks

    def update(self, lengths: Sequence[int], responses: Sequence[int], optimizer: Optimizer) -> float:
        """One optimizer step: a backward pass is two forward passes, and one more where activations are
        recomputed; then the optimizer's bytes; then what ranks tell each other."""
        passes, padded, asked, pairs = self._counted(self._share(lengths), lengths, responses)
        times = 4 if self.checkpointing else 3
        seconds = times * (self._operations(padded, asked, pairs) / self.flops + self._launches(passes))
        P, d = self.shape.params, BYTES[self.dtype]
        seconds += (24 + 2 * d + 4) * P / self.ranks / (self.rates.bandwidth * self.threads)
        seconds += self._communication(passes, optimizer.zero_stage)
        seconds += self.rates.update_s + self.rates.call_s
        return seconds + self.rates.row_s * len(lengths) / self.ranks

    def decode(self, running: int, context: float) -> float:
        """One token for each of ``running`` sequences whose mean length is ``context``, by one engine of
        ``ranks`` tensor-parallel workers. The slower of reading and multiplying; two sums over workers a
        layer."""
        shape, d = self.shape, BYTES[self.dtype]
        read = (shape.active_params * d + running * context * shape.kv_bytes(d)) / self.ranks
        read += running * shape.vocab * 8
        multiplied = shape.forward_flops(running, context) / self.ranks
        seconds = max(read / (self.rates.bandwidth * self.threads), multiplied / self.flops)
        if self.ranks > 1:
            moved = 2 * shape.layers * running * shape.hidden * d * 2 * (self.ranks - 1) / self.ranks
            seconds += moved / self.cluster.device.link + 2 * shape.layers * 1e-5
        return seconds + self.rates.iteration_s + self.rates.slot_s * running

    def prefill(self, tokens: float, requests: int, context: float) -> float:
        seconds = self.shape.forward_flops(tokens, context / 2) / self.ranks / self.flops
        return seconds + self.rates.request_s * requests

    def sync(self, engines: int) -> float:
        """From the actor's first rank to every engine worker at once; on CPUs to one after the other."""
        moved = self.shape.params * BYTES[self.dtype]
        times = engines if self.cluster.device.is_cpu else 1
        if self.ranks > 1 and not self.cluster.device.is_cpu:
            return self.rates.sync_s + moved / min(self.rates.sync_bandwidth, self.cluster.links(self.ranks))
        return self.rates.sync_s + moved * times / self.rates.sync_bandwidth

    def _share(self, lengths: Sequence[int]) -> list[list[int]]:
        """Rows of the rank with the longest sequences, by micro-batch."""
        mine = sorted(range(len(lengths)), key=lambda row: -lengths[row])[:: self.ranks]
        own = [lengths[row] for row in mine]
        budget = max(self.micro_batch_tokens, own[0])
        (parts,) = plan(own, num_ranks=1, token_budget=budget, overhead=self.overhead)
        return [[mine[row] for row in part] for part in parts]

    def _counted(
        self, parts: Sequence[Sequence[int]], lengths: Sequence[int], responses: Sequence[int]
    ) -> tuple[int, float, float, float]:
        """Of these micro-batches: how many, padded tokens, response tokens, pairs of tokens in attention."""
        widths = [(max(lengths[row] for row in part), len(part)) for part in parts if part]
        padded = sum(width * rows for width, rows in widths)
        pairs = sum(width * width * rows / 2 for width, rows in widths)
        asked = sum(responses[row] for part in parts for row in part)
        return len(widths), float(padded), float(asked), pairs

    def _operations(self, padded: float, asked: float, pairs: float) -> float:
        shape = self.shape
        layers = shape.layers * shape.layer_params(shape.active_experts)
        head = shape.head_params * (padded if shape.scalar else asked)
        return 2 * (padded * layers + head) + 4 * shape.layers * shape.q * pairs

    def _launches(self, passes: int) -> float:
        return passes * self.shape.layers * self.rates.layer_s

    def _communication(self, passes: int, wanted_stage: int) -> float:
        """Gradients in float32, once a micro-batch at stages 2 and 3 (each backward pass ends in the sum),
        and the weights back; at stage 3 the weights twice a micro-batch. Rings move (n - 1) / n of the
        bytes."""
        if self.ranks == 1:
            return 0.0
        P, d = self.shape.params, BYTES[self.dtype]
        stage = zero_stage(wanted_stage, d, self.ranks)
        sums = passes if stage >= 2 else 1
        moved = 4 * P * sums + (2 * d * P * passes if stage == 3 else d * P)
        return moved * (self.ranks - 1) / self.ranks / self.cluster.links(self.ranks)


def scaled(rates: Rates, factor: float) -> Rates:
    """Every time multiplied: the ends of an interval."""
    return replace(
        rates, flops=rates.flops / factor, bandwidth=rates.bandwidth / factor, layer_s=rates.layer_s * factor,
        call_s=rates.call_s * factor, row_s=rates.row_s * factor, update_s=rates.update_s * factor,
        iteration_s=rates.iteration_s * factor, slot_s=rates.slot_s * factor, request_s=rates.request_s *
        factor, sync_s=rates.sync_s * factor, sync_bandwidth=rates.sync_bandwidth / factor,
    )  # fmt: skip
