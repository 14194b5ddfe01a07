"""The judge of finished responses: a frozen model with one score per sequence, and the learner of one."""

import math
from typing import Any

import torch
from torch import Tensor

from actors.learner import Learner
from actors.model import ScoreModel
from actors.worker import Worker
from orchestrator.batch import Rollout
from orchestrator.collate import attention, pad
from orchestrator.config import Model


class RewardModel(Worker):
    """Frozen; its ranks never talk to each other."""

    role = "reward"
    collective = False

    def __init__(self, *, model: Model, micro_batch_tokens: int) -> None:
        self.model, self.micro_batch_tokens = model, micro_batch_tokens

    def start(self) -> None:
        scorer = ScoreModel.load(self.model, head_seed=self.seed)
        self.scorer = scorer.to(self.device).requires_grad_(False).eval()

    def score_rollouts(self, rollouts: list[Rollout]) -> list[float]:
        """The same of finished responses, prompt and response together."""
        return self.score([list(rollout.tokens) for rollout in rollouts])

    @torch.no_grad()
    def score(self, sequences: list[list[int]]) -> list[float]:
        """One finite score per sequence of token ids, in the order given.

        Raises ValueError naming the sequence when a score is not finite or a sequence is empty (BUGS B16).
        """
        scores = [math.nan] * len(sequences)
        for rows in self._micro_batches([len(tokens) for tokens in sequences]):
            tokens = pad([sequences[row] for row in rows], 0, torch.int64)
            mask = attention([len(sequences[row]) for row in rows], tokens.shape[1])
            values = self.scorer(tokens.to(self.device), mask.to(self.device)).tolist()
            for row, value in zip(rows, values, strict=True):
                scores[row] = value
        for row, value in enumerate(scores):
            if not math.isfinite(value):
                raise ValueError(
                    f"{self.model.path} scored sequence {row} ({len(sequences[row])} tokens) with {value}; "
                    "expected a finite number"
                )
        return scores

    def _micro_batches(self, lengths: list[int]) -> list[list[int]]:
        """Rows of similar length together, longest first, padded within the budget (or one row alone)."""
        parts: list[list[int]] = []
        width = 0
        for row in sorted((r for r, length in enumerate(lengths) if length), key=lambda r: -lengths[r]):
            if parts and width * (len(parts[-1]) + 1) <= self.micro_batch_tokens:
                parts[-1].append(row)
            else:
                parts.append([row])
                width = lengths[row]
        return parts


class RewardLearner(Learner):
    """Trains a score on pairs or graded sequences; the objective gets scores [b]."""

    role = "reward"

    def load_model(self) -> ScoreModel:
        return ScoreModel.load(self.model, head_seed=self.seed)

    def output(self, part: Any) -> Tensor:
        """[b] scores."""
        return self.backend.forward(part.tokens, part.attention_mask)

    figures = output
