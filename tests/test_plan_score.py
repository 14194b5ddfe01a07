"""The planner's score on this repository's measurements: recorded steps and peaks against its predictions."""

import json
import statistics

import pytest

from benchmarks.plan_score import (
    CALIBRATION,
    MEASURED,
    SCORED,
    Score,
    best_behind,
    is_smollm2,
    report,
    scores,
)


@pytest.fixture(scope="module")
def judged() -> list[Score]:
    return [one for one in scores() if one.scored]


def test_calibration_and_score_are_of_different_layouts():
    assert not set(CALIBRATION) & set(SCORED)


def test_every_scored_layout_was_measured(judged):
    assert len(judged) >= 8
    assert {one.name for one in judged} <= set(json.loads(MEASURED.read_text()))


def test_step_times_are_foretold(judged):
    assert statistics.median(one.time_error for one in judged) <= 0.15


def test_peaks_of_memory_are_foretold(judged):
    assert statistics.median(one.memory_error for one in judged) <= 0.10


def test_the_layout_foretold_best_is_the_best_or_close_to_it(judged):
    assert best_behind([one for one in judged if not is_smollm2(one.name)]) <= 0.05


def score(name: str, step_s: float, predicted_s: float) -> Score:
    """1000 tokens a step."""
    return Score(
        name=name, scored=True, step_s=step_s, predicted_s=predicted_s, tokens_per_s=1000 / step_s,
        predicted_tokens_per_s=1000 / predicted_s, peak_gib=4.0, predicted_gib=5.0,
    )  # fmt: skip


def test_the_score_notices_a_wrong_favourite():
    """A is foretold the fastest at 1 s and takes 2; B takes 1: 500 of 1000 tokens/s are lost."""
    found = [score("half batch", 2.0, 1.0), score("one update", 1.0, 1.5)]
    assert best_behind(found) == pytest.approx(0.5)
    assert found[0].time_error == pytest.approx(0.5)
    assert found[0].memory_error == pytest.approx(0.25)
    assert "step time 50% (largest 50%), peak memory 25%" in report(found)
