"""The judge of finished responses, a frozen model with one score per sequence or functions or both; and the
learner of such a model."""

import math
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import AutoConfig

from actors.learner import Learner
from actors.model import ScoreModel
from actors.reward_function import find_reward_function, judge_all
from actors.worker import Worker
from orchestrator.balance import FEWEST, ON_CPU, plan
from orchestrator.batch import Rollout
from orchestrator.collate import attention, pad
from orchestrator.config import MODEL, Model
from orchestrator.roles import Residency
from orchestrator.work import Work

REWARD_MEAN, REWARD_STD = "reward_mean", "reward_std"  # in config.json, of the scores of held-out rows


class Judge(Worker):
    """A frozen model, functions, or both; its ranks never talk to each other."""

    role = "reward"
    collective = False
    verbs: ClassVar[dict[str, Work]] = {"score_groups": Work.REWARD}

    def __init__(
        self,
        *,
        model: Model | None,
        functions: Mapping[str, str],
        micro_batch_tokens: int,
        normalize: bool = False,
    ) -> None:
        """``model`` None: only functions judge. ``functions``: where each is, by the name of its reward.
        ``normalize``: scores minus the mean, over the deviation, that the model's folder keeps."""
        self.model, self.functions, self.micro_batch_tokens = model, functions, micro_batch_tokens
        self.normalize, self.mean, self.std = normalize, 0.0, 1.0

    def start(self) -> None:
        self._functions = {name: find_reward_function(spec) for name, spec in self.functions.items()}
        if self.model is not None:
            scorer = ScoreModel.load(self.model, head_seed=self.seed)
            self.scorer = scorer.to(self.device).requires_grad_(False).eval()
            if self.normalize:
                self.mean, self.std = statistics_of(self.model.path)

    def reside(self, level: Residency) -> None:
        if self.model is not None:
            self.scorer.to("cpu" if level is Residency.ASLEEP else self.device)

    def score_groups(self, groups: Sequence[Sequence[Rollout]]) -> dict[str, list[float]]:
        """By name, one reward per rollout, as it is: who gathers them refuses what is no finite number. The
        model sees each group alone, so that its scores have the same bits whatever else was asked."""
        rollouts = list(chain.from_iterable(groups))
        rewards = {name: judge_all(function, rollouts) for name, function in self._functions.items()}
        if self.model is not None:
            asked = ([list(rollout.tokens) for rollout in group] for group in groups)
            rewards[MODEL] = [score for sequences in asked for score in self.score(sequences)]
        return rewards

    @torch.no_grad()
    def score(self, sequences: list[list[int]]) -> list[float]:
        """The model's score of each sequence of token ids, prompt and response together, in the order given;
        NaN for an empty one."""
        scores = [math.nan] * len(sequences)
        for rows in self._micro_batches([len(tokens) for tokens in sequences]):
            tokens = pad([sequences[row] for row in rows], 0, torch.int64)
            mask = attention([len(sequences[row]) for row in rows], tokens.shape[1])
            values = self.scorer(tokens.to(self.device), mask.to(self.device)).tolist()
            for row, value in zip(rows, values, strict=True):
                scores[row] = (value - self.mean) / self.std
        return scores

    def _micro_batches(self, lengths: list[int]) -> list[list[int]]:
        """Rows that have tokens; padded within the budget, or one row alone."""
        rows = [row for row, length in enumerate(lengths) if length]
        budget = max([self.micro_batch_tokens, *lengths])
        overhead = ON_CPU if self.device.type == "cpu" else FEWEST
        asked = [lengths[row] for row in rows]
        (parts,) = plan(asked, num_ranks=1, token_budget=budget, overhead=overhead) if rows else ([],)
        return [[rows[number] for number in part] for part in parts]


def statistics_of(path: str) -> tuple[float, float]:
    """Mean and standard deviation that the reward_model stage left; ValueError when it did not."""
    config = AutoConfig.from_pretrained(path).to_dict()
    if REWARD_MEAN not in config or not config.get(REWARD_STD):
        raise ValueError(
            f"roles.reward.normalize: {path} keeps no {REWARD_MEAN} and {REWARD_STD} in its config.json; "
            "train it with the reward_model stage, or set normalize: false"
        )
    return float(config[REWARD_MEAN]), float(config[REWARD_STD])


class RewardLearner(Learner):
    """Trains a score on pairs or graded sequences; the objective gets scores [b]."""

    role = "reward"

    def load_model(self) -> ScoreModel:
        return ScoreModel.load(self.model, head_seed=self.seed)

    def figures(self, part: Any) -> Tensor:
        """[b] scores."""
        return self.backend.forward(part.tokens, part.attention_mask)

    def keep_statistics(self, mean: float, std: float) -> None:
        """Mean and standard deviation of its scores, into the config.json that ``export`` writes."""
        config = self.backend.engine.module.model.config
        setattr(config, REWARD_MEAN, mean)
        setattr(config, REWARD_STD, std)
