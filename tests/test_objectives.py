"""The supervised losses, on two or three tokens."""

import math

import pytest
import torch

from orchestrator.batch import Examples, PolicyOutput
from orchestrator.objectives import bradley_terry
from orchestrator.objectives import sft as sft_file

sft, reward_model = sft_file.CONFIG(), bradley_terry.CONFIG()


def examples(mask: list[list[int]]) -> Examples:
    action_mask = torch.tensor(mask, dtype=torch.bool)
    return Examples(
        tokens=torch.ones_like(action_mask, dtype=torch.int64),
        attention_mask=torch.ones_like(action_mask),
        action_mask=action_mask,
    )


def test_sft_loss_is_the_mean_negative_logprob_of_the_trained_tokens():
    part = examples([[0, 1, 1], [0, 0, 1]])
    logprobs = torch.tensor([[-9.0, math.log(0.5), math.log(0.25)], [-9.0, -9.0, math.log(0.125)]])
    loss = sft.loss(PolicyOutput(logprobs=logprobs, entropy=None), part)
    total = (sft.weights(part) * loss.values).sum()
    assert total.item() == pytest.approx((1 + 2 + 3) * math.log(2) / 3)
    assert loss.metrics["token_probability"].tolist() == [[0.0, 0.5, 0.25], [0.0, 0.0, 0.125]]


def test_sft_weighs_tokens_and_not_rows():
    assert sft.weights(examples([[1, 1, 1], [0, 0, 1]])).tolist() == [[0.25] * 3, [0.0, 0.0, 0.25]]


def test_sft_ignores_nan_where_nothing_is_trained():
    logprobs = torch.tensor([[math.nan, -1.0]], requires_grad=True)
    part = examples([[0, 1]])
    loss = sft.loss(PolicyOutput(logprobs=logprobs, entropy=None), part)
    (sft.weights(part) * loss.values).sum().backward()
    assert loss.values.tolist() == [[0.0, 1.0]]
    assert logprobs.grad is not None and logprobs.grad.tolist() == [[0.0, -1.0]]


def test_reward_model_loss_is_the_negative_log_sigmoid_of_the_margin():
    scores = torch.tensor([math.log(3.0), 0.0, 1.0, 1.0, 0.0, math.log(3.0)])
    loss = reward_model.loss(scores, examples([[1]] * 6))
    # margins ln 3, 0, -ln 3: sigmoid 3/4, 1/2, 1/4
    expected = [-math.log(0.75), 0.0, -math.log(0.5), 0.0, -math.log(0.25), 0.0]
    assert loss.values.tolist() == pytest.approx(expected)
    assert loss.metrics["accuracy"].tolist() == [1.0, 0.0, 0.5, 0.0, 0.0, 0.0]
    assert loss.metrics["margin"].tolist() == pytest.approx([math.log(3.0), 0, 0, 0, -math.log(3.0), 0])


def test_reward_model_gradient_pulls_the_pair_apart():
    scores = torch.tensor([0.0, math.log(3.0)], requires_grad=True)
    part = examples([[1], [1]])
    (reward_model.weights(part) * reward_model.loss(scores, part).values).sum().backward()
    assert scores.grad is not None and scores.grad.tolist() == pytest.approx(
        [-0.75, 0.75]
    )  # -(1 - sigmoid(-ln 3))


def test_reward_model_loss_stays_finite_at_any_margin():
    loss = reward_model.loss(torch.tensor([-1e4, 1e4, 1e4, -1e4]), examples([[1]] * 4))
    assert loss.values.tolist() == [2e4, 0.0, 0.0, 0.0]


def test_reward_model_weighs_pairs_equally():
    assert reward_model.weights(examples([[1]] * 4)).tolist() == [0.5, 0.0, 0.5, 0.0]


def test_a_cut_pair_is_refused():
    with pytest.raises(ValueError, match="3 rows are not whole pairs"):
        reward_model.loss(torch.zeros(3), examples([[1]] * 3))
