"""The policy under training: its log-probs, its updates, and its weights on their way to the engine."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from actors.learner import Learner, LossFunction, MicroBatches, weigh
from actors.model import PolicyModel, RowSlopes
from actors.training_state import NonFiniteStateError
from actors.vital_signs import PolicyMovedOn
from actors.weights.sender import open_sender
from actors.weights.wire import Address, Sender, ServedAdapter, TensorMeta, Transport
from orchestrator.batch import Batch, Examples, Minibatch, PolicyOutput
from orchestrator.config import Model, Optimizer
from orchestrator.roles import WeightReceipt
from orchestrator.work import Work


class Actor(Learner):
    """Log-probs are of the distribution that was sampled from: logits / ``temperature`` (BUGS A11)."""

    role = "actor"
    verbs: ClassVar[dict[str, Work]] = Learner.verbs | {
        "distributions": Work.SCORE,
        "send_weights": Work.SEND,
        "logprobs": Work.PROBE,
    }

    def __init__(  # noqa: PLR0913 - one line per fact, all by name
        self,
        *,
        model: Model,
        optimizer: Optimizer,
        total_steps: int,
        loss: LossFunction,
        temperature: float = 1.0,
        entropy: bool = False,
        distribution: bool = False,
        token_wise: bool = False,
        ema_decay: float | None = None,
    ) -> None:
        """``entropy``, ``distribution``: whether the loss reads these of ``PolicyOutput``; ``token_wise``:
        whether that of a token reads no other token's; ``ema_decay``: of an average of the weights, None for
        none."""
        super().__init__(model=model, optimizer=optimizer, total_steps=total_steps, loss=loss)
        self.temperature, self.ema_decay = temperature, ema_decay
        self.entropy, self.distribution, self.token_wise = entropy, distribution, token_wise
        self.sender: Sender | None = None
        self.sends_adapter = False
        self._sent, self._trained = -1, False  # the version sent last, and whether there are others since

    def update(self, minibatch: Minibatch, micro_batches: MicroBatches) -> dict[str, float]:
        self._trained = True
        return super().update(minibatch, micro_batches)

    def load(self, folder: Path) -> None:
        """Versions count from the checkpoint's on."""
        super().load(folder)
        self._sent, self._trained = -1, False

    def load_model(self) -> PolicyModel:
        return PolicyModel.load(self.model)

    def output(self, part: Any, weights: Tensor) -> PolicyOutput:
        slopes = partial(self._slopes, part, weights) if self.token_wise else None
        logprobs, entropy, distribution, *carrier = self._forward(
            part, self.entropy, self.distribution, slopes
        )
        return PolicyOutput(
            logprobs=logprobs, entropy=entropy, distribution=distribution,
            carrier=carrier[0] if carrier else None,
        )  # fmt: skip

    def _slopes(self, part: Any, weights: Tensor, logprobs: Tensor, entropy: Tensor) -> tuple[Tensor, Tensor]:
        """The loss by the log-probs and entropies [b, T] of some tokens, right for these tokens alone."""
        with torch.enable_grad():
            read = (logprobs.requires_grad_(), entropy.requires_grad_())
            seen = PolicyOutput(logprobs=logprobs, entropy=entropy if self.entropy else None)
            total = weigh(self.loss(seen, part).values, weights)
            by_logprobs, by_entropy = torch.autograd.grad(
                total, read, allow_unused=True, materialize_grads=True
            )
        return by_logprobs, by_entropy

    def figures(self, part: Any) -> Tensor:
        """[b, T] log-probs."""
        return self._forward(part, False, False)[0]

    def _forward(self, part: Any, entropy: bool, distribution: bool, slopes: RowSlopes | None = None) -> Any:
        given = (part.tokens, part.attention_mask, part.action_mask, self.temperature, entropy, distribution)
        if isinstance(part, Examples):  # may be packed
            given += (part.positions,)
        elif slopes is not None:
            given += (None,)
        return self.backend.forward(*given, *(() if slopes is None else (slopes,)))

    def distributions(self, batch: Batch, micro_batches: MicroBatches) -> Tensor:
        """[n, T, V] float32 log-probs of the whole vocabulary, 0.0 off the action mask."""
        return self.each(batch, micro_batches, self._distribution)

    def _distribution(self, part: Any) -> Tensor:
        return self._forward(part, False, True)[2]

    @torch.no_grad()
    def logprobs(self, tokens: Sequence[int]) -> list[float]:
        """Of every token but the first, at temperature 1. A collective under ZeRO-3: all ranks call it."""
        row = torch.tensor([list(tokens)], device=self.device)
        everywhere = torch.ones_like(row, dtype=torch.bool)
        return self.backend.forward(row, everywhere, everywhere, 1.0)[0][0, 1:].tolist()

    def open_channel(
        self,
        transport: Transport,
        dtype: str,
        bucket_mb: int,
        world_size: int,
        timeout_s: float,
        adapter: ServedAdapter | None = None,
    ) -> Address:
        """Waits for nobody; the engines join rank 0's address. Every rank opens and takes part in sends.
        ``adapter``: only its A and B travel, and the base stays where it is."""
        self.sender = open_sender(
            transport, rank=self.rank, dtype=getattr(torch, dtype), bucket_mb=bucket_mb, timeout_s=timeout_s
        )
        self.sends_adapter = adapter is not None
        shapes = self.backend.adapter_shapes() if adapter else self.backend.parameter_shapes()
        tensors = [TensorMeta(name=name, shape=shape) for name, shape in shapes]
        return replace(self.sender.open(tensors, world_size=world_size), adapter=adapter)

    def send_weights(self, version: int) -> WeightReceipt:
        """Rank 0 sends every weight, adapters merged, or the adapter alone, and answers what it sent; the
        other ranks gather (ZeRO-3). Raises, before anything is sent, NonFiniteStateError on every rank, and
        PolicyMovedOn: a version may be sent again as long as nothing was trained since."""
        if self.sender is None:
            raise RuntimeError("send_weights() before open_channel(): no engine knows this actor")
        backend = self.backend
        try:
            if version < self._sent or (version == self._sent and self._trained):
                raise PolicyMovedOn(f"the weights of version {version} were trained on since they were sent")
            backend.check_finite()
        except (PolicyMovedOn, NonFiniteStateError):
            self.sender.refuse()  # the receivers, which wait already or soon
            raise
        self._sent, self._trained = version, False
        named = backend.adapter_tensors() if self.sends_adapter else backend.named_full_parameters()
        return self.sender.send(named, version)
