"""The frozen policy that the KL is measured from: plain PyTorch, no optimizer, no talk between ranks."""

from typing import ClassVar

import torch
from torch import Tensor

from actors.learner import MicroBatches, to_device, widen
from actors.model import PolicyModel
from actors.worker import Worker
from orchestrator.batch import Batch, Examples
from orchestrator.collate import take
from orchestrator.config import Model
from orchestrator.roles import Residency
from orchestrator.work import Work


class Reference(Worker):
    role = "reference"
    collective = False
    verbs: ClassVar[dict[str, Work]] = {"score": Work.SCORE, "distributions": Work.SCORE}

    def __init__(self, *, model: Model, temperature: float = 1.0) -> None:
        """``temperature`` is the sampling temperature: the KL compares two distributions sampled alike."""
        self.model, self.temperature = model, temperature

    def start(self) -> None:
        self.policy = PolicyModel.load(self.model).to(self.device).requires_grad_(False).eval()

    def reside(self, level: Residency) -> None:
        self.policy.to("cpu" if level is Residency.ASLEEP else self.device)

    def score(self, batch: Batch | Examples, micro_batches: MicroBatches) -> Tensor:
        """[n, T] float32 log-probs of this rank's rows, in the order of the concatenated micro-batches."""
        return self._each(batch, micro_batches, distribution=False)

    def distributions(self, batch: Batch, micro_batches: MicroBatches) -> Tensor:
        """[n, T, V] float32 log-probs of the whole vocabulary, 0.0 off the action mask."""
        return self._each(batch, micro_batches, distribution=True)

    @torch.no_grad()
    def _each(self, batch: Batch | Examples, micro_batches: MicroBatches, *, distribution: bool) -> Tensor:
        width = (batch.tokens.shape[1],)
        if distribution:
            width += (self.policy.model.config.get_text_config().vocab_size,)
        answers = [torch.zeros(0, *width)]
        for rows in micro_batches:
            if rows:
                part = to_device(take(batch, rows), self.device)
                said = self.policy(
                    part.tokens, part.attention_mask, part.action_mask, self.temperature, False, distribution
                )
                answers.append(widen(said[2 if distribution else 0].cpu(), batch.tokens.shape[1]))
        return torch.cat(answers)
