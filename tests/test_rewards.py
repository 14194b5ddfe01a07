"""Rewards are summed by weight, and what is no number is refused with the sample it belongs to."""

import math

import pytest

from orchestrator.rewards import RewardError, weigh
from tests.fakes import prompt, rollout

TWO = [rollout(prompt(4), 0), rollout(prompt(4), 1)]


def test_the_reward_is_the_weighted_sum_and_keeps_its_parts():
    given = [{"a": 1.0, "b": 10.0, "noise": 5.0}, {"a": 2.0, "b": 20, "noise": 6.0}]
    scored = weigh(TWO, given, {"a": 0.5, "b": -0.1, "noise": 0.0})
    assert [s.reward for s in scored] == [0.5 - 1.0, 1.0 - 2.0]
    assert scored[1].parts == {"a": 2.0, "b": 20.0, "noise": 6.0}
    assert [s.rollout.uid for s in scored] == ["0/4/0", "0/4/1"]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("high", r"reward 'a' gave sample 0/4/1 the reward 'high'; expected a number"),
        (None, r"reward 'a' gave sample 0/4/1 no reward; expected one number per response"),
    ],
)
def test_a_reward_that_is_no_number_is_refused_with_the_sample(value, message):
    """BUGS B11. A weight of 0 does not excuse it."""
    for weight in (1.0, 0.0):
        with pytest.raises(RewardError, match=message):
            weigh(TWO, [{"a": 1.0}, {"a": value}], {"a": weight})


@pytest.mark.parametrize("weight", [1.0, 0.0])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_reward_that_is_not_finite_is_nan_for_its_sample_alone(value, weight):
    """BUGS B16: the loop skips its batch. A weight of 0 does not hide it."""
    scored = weigh(TWO, [{"a": 1.0, "b": 2.0}, {"a": value, "b": 2.0}], {"a": weight, "b": 1.0})
    assert scored[0].reward == weight + 2.0 and math.isnan(scored[1].reward)


def test_a_sum_that_overflows_is_nan():
    scored = weigh(TWO, [{"a": 1e308}, {"a": 1.0}], {"a": 1e10})
    assert math.isnan(scored[0].reward) and scored[1].reward == 1e10


def test_a_reward_that_was_never_given_is_refused():
    with pytest.raises(RewardError, match="reward 'a' gave sample 0/4/0 no reward"):
        weigh(TWO, [{}, {"a": 1.0}], {"a": 1.0})
