"""A reward model of ours in vLLM: the folder that ``export`` writes loads there and scores as it did here."""

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from actors.engine_params import environment
from actors.reward import Judge, RewardLearner
from orchestrator.batch import Examples, Minibatch
from orchestrator.config import EngineConfig, Model, Optimizer
from orchestrator.objectives.bradley_terry import BradleyTerry
from tests.models import tiny_model
from tests.test_workers import ready

LENGTHS = [7, 5, 12, 3]


def rows() -> Examples:
    tokens = torch.randint(3, 250, (4, 12), generator=torch.Generator().manual_seed(0))
    attended = torch.arange(12) < torch.tensor(LENGTHS)[:, None]
    return Examples(tokens=tokens * attended, attention_mask=attended, action_mask=attended)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> str:
    """After three steps, so that its head and its backbone are not what they started from."""
    folder = tmp_path_factory.mktemp("reward")
    model = Model(path=tiny_model(folder / "base", tied=True), dtype="float32")
    objective = BradleyTerry()
    optimizer = Optimizer(learning_rate=1e-2)
    learner = ready(RewardLearner(model=model, optimizer=optimizer, total_steps=3, loss=objective.loss))
    weights = objective.weights(rows())
    for _ in range(3):
        learner.update(Minibatch(records=rows(), rows=torch.arange(4), weights=weights), [[0, 1], [2, 3]])
    learner.keep_statistics(0.5, 2.0)
    learner.export(folder / "model")
    return str(folder / "model")


def vllm_scores(model: str, sequences: list[list[int]]) -> list[float]:
    """In a process of its own: vLLM would share this one's process group."""
    os.environ |= environment(EngineConfig(), "cpu")
    from vllm import LLM, PoolingParams, TokensPrompt

    engine = LLM(
        model=model, runner="pooling", dtype="float32", max_model_len=64, enforce_eager=True,
        kv_cache_memory_bytes=2**25,
    )  # fmt: skip
    answers = engine.encode(
        [TokensPrompt(prompt_token_ids=tokens) for tokens in sequences],
        pooling_params=PoolingParams(use_activation=False), pooling_task="classify", use_tqdm=False,
    )  # fmt: skip
    return [float(answer.outputs.data) for answer in answers]


@pytest.mark.e2e
@pytest.mark.slow
def test_vllm_scores_as_transformers_and_the_judge_do(trained: str) -> None:
    sequences = [row[:length].tolist() for row, length in zip(rows().tokens, LENGTHS, strict=True)]
    whole = AutoModelForSequenceClassification.from_pretrained(trained, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = [float(whole(torch.tensor([tokens])).logits[0, 0]) for tokens in sequences]
    assert max(expected) - min(expected) > 0.1
    judge = ready(Judge(model=Model(path=trained, dtype="float32"), functions={}, micro_batch_tokens=64))
    assert judge.score(sequences) == pytest.approx(expected, abs=1e-4)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        answers = process.submit(vllm_scores, trained, sequences).result(timeout=200)
    assert answers == pytest.approx(expected, abs=1e-3)
