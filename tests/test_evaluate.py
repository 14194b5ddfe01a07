"""Figures of an evaluation by hand, and the command on real workers and engines."""

import json
import math

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from orchestrator.evaluate import pass_at_k, reward_figures, win_figures
from tests.models import byte_tokenizer, tiny_model
from tests.test_pipeline import here, quartet, write  # noqa: F401 - a fixture


def test_pass_at_k_counts_the_draws_without_a_right_answer():
    assert pass_at_k(4, 1, 2) == 0.5
    assert [pass_at_k(5, 0, 3), pass_at_k(5, 2, 3), pass_at_k(5, 5, 1)] == [0.0, 0.9, 1.0]


def test_rewards_are_means_over_prompts():
    figures = reward_figures([[1, 0], [1, 1], [0, 0]], pass_at=(1, 2), solved_from=1.0)
    assert figures == {
        "reward": 0.5,
        "reward_error": pytest.approx(math.sqrt(0.25 / 3)),
        "pass_at_1": 0.5,
        "pass_at_2": pytest.approx(2 / 3),
    }


def test_a_tie_is_half_a_win():
    figures = win_figures([[1.0, 0.0], [2.0]], [[0.0], [3.0]])
    assert figures["win_rate"] == (0.75 + 0) / 2
    assert figures["win_rate_low"] < 0.375 < figures["win_rate_high"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "evaluate measures nothing"),
        (
            {"prompts": {"path": "p"}, "pass_at": [4]},
            "needs 4 answers to a prompt, evaluate.samples_per_prompt=1",
        ),
        ({"prompts": {"path": "p"}, "sampling": {"max_new_tokens": 64}}, "leaves no room for a prompt"),
    ],
)
def test_a_request_that_cannot_be_met_is_refused(here, settings, message):  # noqa: F811
    result = quartet("evaluate", write(here, "refused", evaluate=settings))
    assert result.returncode == 2 and message in result.stderr, result.stderr


@pytest.mark.e2e
@pytest.mark.slow
def test_a_checkpoint_against_itself_ties_and_its_loss_is_measured(here):  # noqa: F811
    settings = {
        "against": str(here / "base"),
        "heldout": {"path": str(here / "pairs.jsonl")},
        "prompts": {"path": str(here / "pairs.jsonl"), "label_key": "response", "max_rows": 6},
        "samples_per_prompt": 2,
        "pass_at": [1, 2],
        "sampling": {"max_new_tokens": 4},
    }
    file = write(here, "evaluated", evaluate=settings)
    result = quartet("evaluate", file, "roles.reward.function=letter_fraction", "engine.kv_cache_mb=32")
    assert result.returncode == 0, result.stdout + result.stderr
    found = json.loads((here / "evaluated" / "evaluation" / "evaluation.json").read_text())
    assert found["heldout_loss"] == found["against_heldout_loss"] > 0
    assert found["reward"] == found["against_reward"]
    assert found["win_rate"] == 0.5  # the same seeds: the same answers


@pytest.mark.e2e
@pytest.mark.slow
def test_a_reward_model_judges_one_checkpoint_against_another(here):  # noqa: F811
    """The figures are those of the rewards in the samples that it wrote."""
    other = tiny_model(here / "other", tied=True, seed=1)
    judge = AutoModelForSequenceClassification.from_pretrained(here / "base", num_labels=1)
    torch.nn.init.normal_(judge.score.weight, generator=torch.Generator().manual_seed(0))
    judge.config.pad_token_id = 0
    judge.save_pretrained(here / "judge")
    byte_tokenizer().save_pretrained(here / "judge")
    settings = {
        "against": other,
        "prompts": {"path": str(here / "pairs.jsonl"), "max_rows": 6},
        "samples_per_prompt": 2,
        "sampling": {"max_new_tokens": 4},
    }
    file = write(here, "judged", evaluate=settings)
    result = quartet("evaluate", file, f"roles.reward.model={here / 'judge'}", "engine.kv_cache_mb=32")
    assert result.returncode == 0, result.stdout + result.stderr
    folder = here / "judged" / "evaluation"
    found = json.loads((folder / "evaluation.json").read_text())
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 2 * 6 * 2
    ours, theirs = samples[:12], samples[12:]
    mean = [sum(sample["reward"] for sample in side) / 12 for side in (ours, theirs)]
    assert (found["reward"], found["against_reward"]) == pytest.approx(mean, abs=1e-6)
    wins = 0.0
    for start in range(0, 12, 2):
        mine, other_ = ([s["reward"] for s in side[start : start + 2]] for side in (ours, theirs))
        wins += sum((a > b) + (a == b) / 2 for a in mine for b in other_) / 4
    assert found["win_rate"] == pytest.approx(wins / 6)
    assert len({sample["reward"] for sample in samples}) > 12  # a model's, and of other answers
