"""The frozen policy that the KL is measured from: plain PyTorch, no optimizer, no talk between ranks."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from actors.learner import to_device
from actors.model import PolicyModel
from actors.worker import Worker
from orchestrator.batch import Batch
from orchestrator.collate import take
from orchestrator.config import Model


class Reference(Worker):
    role = "reference"
    collective = False

    def __init__(self, *, model: Model, temperature: float = 1.0) -> None:
        """``temperature`` is the sampling temperature: the KL compares two distributions sampled alike."""
        self.model, self.temperature = model, temperature

    def start(self) -> None:
        self.policy = PolicyModel.load(self.model).to(self.device).requires_grad_(False).eval()

    @torch.no_grad()
    def score(self, batch: Batch, micro_batches: Sequence[Sequence[int]]) -> Tensor:
        """[n, T] float32 log-probs of this rank's rows, in the order of the concatenated micro-batches."""
        T = batch.tokens.shape[1]
        answers = [torch.zeros(0, T)]
        for rows in micro_batches:
            if rows:
                part = to_device(take(batch, rows), self.device)
                logprobs = self.policy(
                    part.tokens, part.attention_mask, part.action_mask, self.temperature, False
                )[0].cpu()
                answers.append(F.pad(logprobs, (0, T - logprobs.shape[1])))
        return torch.cat(answers)
