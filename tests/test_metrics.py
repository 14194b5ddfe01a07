"""Figures of a batch of two sequences, computed by hand."""

import pytest
import torch

from orchestrator.batch import Batch
from orchestrator.metrics import logprob_mismatch, mean_metrics, rollout_metrics, staleness_shares, throughput


def batch(action_mask=((0, 1, 0, 0), (0, 1, 1, 1)), rewards=(0.0, 1.0)):
    mask = torch.tensor(action_mask, dtype=torch.bool)
    return Batch(
        tokens=torch.zeros(2, 4, dtype=torch.int64),
        attention_mask=torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]], dtype=torch.bool),
        action_mask=mask,
        rollout_logprobs=torch.where(mask, -1.0, 0.0),
        rewards=torch.tensor(rewards),
        groups=torch.tensor([0, 0]),
        versions=torch.where(mask, torch.tensor([[4] * 4, [4, 4, 5, 5]]), 0),
        stopped=torch.tensor([True, True]),
        baselines=None,
    )


def test_rewards_and_lengths_of_a_step():
    assert rollout_metrics(batch(), truncated_fraction=0.25) == {
        "reward": 0.5,
        "reward_std": 0.5,
        "reward_min": 0.0,
        "reward_max": 1.0,
        "response_tokens": 2.0,
        "response_tokens_max": 3.0,
        "truncated_fraction": 0.25,
    }


def test_mismatch_is_over_action_tokens_only():
    actor = torch.tensor([[9.0, -1.5, float("nan"), 9.0], [9.0, -1.0, -1.25, -0.75]])
    found = logprob_mismatch(actor, batch())
    assert found == {"rollout_logprob_diff_mean": 0.25, "rollout_logprob_diff_max": 0.5}


def test_mismatch_of_no_action_tokens_is_zero():
    empty = batch(action_mask=((0, 0, 0, 0), (0, 0, 0, 0)))
    assert logprob_mismatch(torch.ones(2, 4), empty)["rollout_logprob_diff_max"] == 0.0


def test_staleness_is_counted_in_tokens():
    assert staleness_shares(batch(), 5, 1) == {"staleness/0": 0.5, "staleness/1": 0.5}
    assert staleness_shares(batch(), 6, 2) == {"staleness/0": 0.0, "staleness/1": 0.5, "staleness/2": 0.5}
    assert staleness_shares(batch(), 5, 0) == {}


def test_throughput_leaves_padding_out():
    assert throughput(batch().attention_mask, 0.5) == {"tokens_per_s": pytest.approx(12.0)}
    assert throughput(batch().attention_mask, 0.0) == {"tokens_per_s": 0.0}


def test_mean_of_each_name_over_the_entries_that_have_it():
    assert mean_metrics([{"a": 1.0}, {"a": 3.0, "b": 5.0}]) == {"a": 2.0, "b": 5.0}
    assert mean_metrics([]) == {}
