"""Losses, advantages and weights by numbers worked by hand. What all algorithms keep: test_contract.py."""

import math

import pytest
import torch

from orchestrator import plugins
from orchestrator.algorithms import best_of_n
from orchestrator.batch import Batch, Experience, PolicyOutput
from orchestrator.config import Updates
from orchestrator.minibatch import minibatches, token_weights
from orchestrator.surrogate import clipped_surrogate, clipped_value_loss

PACKAGE = "orchestrator.algorithms"
T, F = True, False


def batch_of(rewards, groups, lengths, width=6) -> Batch:
    B = len(rewards)
    columns = torch.arange(width)
    attention = columns < torch.tensor(lengths)[:, None]
    return Batch(
        tokens=torch.arange(B * width).reshape(B, width) % 7, attention_mask=attention,
        action_mask=attention & (columns >= 2), rollout_logprobs=torch.full((B, width), -1.0),
        rewards=torch.tensor(rewards), groups=torch.tensor(groups),
        versions=torch.zeros(B, width, dtype=torch.int64), stopped=torch.ones(B, dtype=torch.bool),
        baselines=torch.zeros(B),
    )  # fmt: skip


def scores_of(batch: Batch) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    shape = batch.tokens.shape
    return {
        role: torch.randn(shape, generator=generator).where(batch.action_mask, 0.0)
        for role in ("actor", "critic", "reference")
    }


def experience_of(advantages, old, mask, *, returns=None, values=None, ref=None) -> Experience:
    B, W = len(mask), len(mask[0])
    whole = torch.ones(B, W, dtype=torch.bool)
    as_tensor = lambda rows: None if rows is None else torch.tensor(rows, dtype=torch.float64)  # noqa: E731
    return Experience(
        tokens=torch.zeros(B, W, dtype=torch.int64), attention_mask=whole, action_mask=torch.tensor(mask),
        rollout_logprobs=torch.zeros(B, W), old_logprobs=as_tensor(old), advantages=as_tensor(advantages),
        old_values=as_tensor(values), returns=as_tensor(returns), ref_logprobs=as_tensor(ref),
    )  # fmt: skip


def surrogate(logprobs, part, **bounds):
    old = logprobs.detach() if part.old_logprobs is None else part.old_logprobs
    return clipped_surrogate(logprobs, old, part, **bounds)


def cut(experience, updates):
    return minibatches(experience, updates, aggregate="token_mean", constant_length=1, seed=0)


@pytest.fixture(params=plugins.names(PACKAGE))
def algorithm(request):
    return plugins.find(PACKAGE, request.param).CONFIG()


def test_before_the_first_inner_step_the_ratio_is_one(algorithm):
    batch = batch_of([1.0, 2.0, 3.0, 5.0], [0, 0, 1, 1], [5, 6, 4, 3])
    scores = scores_of(batch)
    experience, _ = algorithm.experience(batch, scores, 0.1)
    metrics = algorithm.policy_loss(
        PolicyOutput(logprobs=scores["actor"].clone(), entropy=None), experience
    ).metrics
    assert metrics.get("clip_fraction", torch.zeros(1)).sum() == 0 and metrics["approx_kl"].abs().max() == 0


def test_clipped_surrogate_by_hand():
    # log ratios 0.5, -0.5, 0.1; ratios 1.6487, 0.6065, 1.1052; clip to [0.8, 1.2]
    part = experience_of([[2.0, -1.0, 3.0]], [[-1.5, -0.5, -1.1]], [[T, T, T]])
    loss = surrogate(torch.tensor([[-1.0, -1.0, -1.0]], dtype=torch.float64), part, low=0.2, high=0.2)
    assert loss.values[0].tolist() == pytest.approx([-2.4, 0.8, -3 * math.exp(0.1)])
    assert loss.metrics["clip_fraction"].tolist() == [[1, 1, 0]]


def test_a_clipped_token_has_no_gradient_and_an_unclipped_one_that_of_the_ratio():
    part = experience_of([[2.0, 3.0]], [[-1.5, -1.1]], [[T, T]])
    logprobs = torch.tensor([[-1.0, -1.0]], dtype=torch.float64, requires_grad=True)
    surrogate(logprobs, part, low=0.2, high=0.2).values.sum().backward()
    assert logprobs.grad[0].tolist() == pytest.approx([0.0, -3 * math.exp(0.1)])


def test_dual_clip_bounds_the_loss_of_a_bad_action_with_an_exploded_ratio():
    part = experience_of([[-1.0, 1.0]], [[-6.0, -6.0]], [[T, T]])
    loss = surrogate(torch.tensor([[-1.0, -1.0]], dtype=torch.float64), part, low=0.2, high=0.2, dual=3.0)
    assert loss.values[0].tolist() == pytest.approx([3.0, -1.2])


def test_without_old_logprobs_the_gradient_is_that_of_the_policy_gradient():
    part = experience_of([[2.0, -1.0]], None, [[T, T]])
    logprobs = torch.tensor([[-1.0, -3.0]], dtype=torch.float64, requires_grad=True)
    surrogate(logprobs, part, low=0.2, high=0.2).values.sum().backward()
    assert logprobs.grad.tolist() == [[-2.0, 1.0]]


def test_clipped_value_loss_by_hand():
    # old 0, new 1, return 2: clipped value 0.2 -> max(1, 3.24) / 2; old 0, new .1: unclipped (1.9)^2 / 2
    part = experience_of([[0, 0, 0]], None, [[T, T, F]], returns=[[2.0, 2.0, 9.0]], values=[[0.0, 0.0, 0.0]])
    values = torch.tensor([[1.0, 0.1, 5.0]], dtype=torch.float64, requires_grad=True)
    loss = clipped_value_loss(values, part, clip=0.2)
    assert loss.values[0].tolist() == pytest.approx([1.62, 1.805, 0.0])
    loss.values.sum().backward()
    assert values.grad[0].tolist() == pytest.approx([0.0, -1.9, 0.0])


def test_ppo_puts_the_kl_into_the_reward():
    ppo = plugins.find(PACKAGE, "ppo").CONFIG(kl_coef=0.5, gae_lambda=1.0, whiten_advantages=False)
    batch = batch_of([2.0], [0], [4], width=4)
    scores = {
        "actor": torch.tensor([[0, 0, -1.0, -1.0]]), "reference": torch.tensor([[0, 0, -1.4, -0.8]]),
        "critic": torch.tensor([[0, 0, 0.3, 0.1]]),
    }  # fmt: skip
    experience, metrics = ppo.experience(batch, scores, 0.5)
    # KL .4 and -.2; rewards -.2 and 2.1; returns 1.9 and 2.1
    assert experience.returns[0].tolist() == pytest.approx([0, 0, 1.9, 2.1])
    assert experience.advantages[0].tolist() == pytest.approx([0, 0, 1.6, 2.0])
    assert metrics["kl"] == pytest.approx(0.1)


def test_ppo_whitens_over_the_whole_batch():
    ppo = plugins.find(PACKAGE, "ppo").CONFIG(kl_coef=0.0)
    batch = batch_of([2.0, -1.0, 0.5], [0, 1, 2], [4, 6, 5])
    kept = ppo.experience(batch, scores_of(batch), 0.0)[0].advantages[batch.action_mask].double()
    assert kept.mean().item() == pytest.approx(0, abs=1e-6)
    assert kept.var(unbiased=False).item() == pytest.approx(1, abs=1e-5)


def test_grpo_by_hand():
    grpo = plugins.find(PACKAGE, "grpo").CONFIG(kl_coef=0.1)
    batch = batch_of([1.0, 3.0], [0, 0], [4, 4], width=4)
    ref = torch.tensor([[0, 0, -1.5, -1.0]] * 2)
    experience, metrics = grpo.experience(batch, {"reference": ref}, 0.1)
    advantage = 1 / (math.sqrt(2) + 1e-6)
    assert experience.advantages[1].tolist() == pytest.approx([0, 0, advantage, advantage])
    assert metrics["groups_without_signal"] == 0
    output = PolicyOutput(logprobs=torch.tensor([[0, 0, -1.0, -1.0]] * 2), entropy=None)
    loss = grpo.policy_loss(output, experience).values[1]
    assert loss.tolist() == pytest.approx([0, 0, -advantage + 0.1 * (math.exp(-0.5) - 0.5), -advantage])


def test_token_weights_by_hand():
    mask = torch.tensor([[T, T, T], [F, F, T], [F, F, F]])
    assert token_weights(mask, "token_mean").tolist() == [[0.25] * 3, [0, 0, 0.25], [0, 0, 0]]
    sequence = token_weights(mask, "sequence_mean")
    assert sequence[0].tolist() == pytest.approx([1 / 6] * 3) and sequence[1].tolist() == [0, 0, 0.5]
    assert token_weights(mask, "constant_length", 10)[0].tolist() == pytest.approx([0.05] * 3)


def test_minibatches_cover_every_row_once_per_epoch_and_refuse_a_remainder():
    batch = batch_of([float(i) for i in range(8)], [0] * 8, [6] * 8)
    experience, _ = plugins.find(PACKAGE, "grpo").CONFIG().experience(batch, {}, 0.0)
    parts = list(
        minibatches(
            experience, Updates(epochs=2, minibatches=4), aggregate="token_mean", constant_length=1, seed=0
        )
    )
    assert [len(part.rows) for part in parts] == [2] * 8
    for epoch in (parts[:4], parts[4:]):
        assert sorted(torch.cat([part.rows for part in epoch]).tolist()) == list(range(8))
    with pytest.raises(
        ValueError, match="8 sequences do not split into 3 equal minibatches; pick a divisor of 8"
    ):
        list(cut(experience, Updates(minibatches=3)))


def test_a_minibatch_weighs_the_action_tokens_of_its_own_rows():
    """BUGS A2: two tokens of prompt, then 4, 1, 3, 2 actions; each of two rows' actions weighs the same."""
    actions = [4, 1, 3, 2]
    batch = batch_of([1.0, 2.0, 3.0, 4.0], [0] * 4, [2 + n for n in actions])
    experience, _ = plugins.find(PACKAGE, "grpo").CONFIG().experience(batch, {}, 0.0)
    parts = list(cut(experience, Updates(epochs=3, minibatches=2)))
    assert any(part.rows.tolist() != sorted(part.rows.tolist()) for part in parts)
    for part in parts:
        counts = [actions[row] for row in part.rows]
        for weights, n in zip(part.weights.tolist(), counts, strict=True):
            assert weights == pytest.approx([0, 0, *[1 / sum(counts)] * n, *[0] * (4 - n)])


def test_every_epoch_and_every_seed_has_an_order_of_its_own():
    batch = batch_of([float(i) for i in range(8)], [0] * 8, [6] * 8)
    experience, _ = plugins.find(PACKAGE, "grpo").CONFIG().experience(batch, {}, 0.0)

    def orders(seed):
        updates = Updates(epochs=2, minibatches=4)
        parts = list(minibatches(experience, updates, aggregate="token_mean", constant_length=1, seed=seed))
        rows = [tuple(part.rows.tolist()) for part in parts]
        return [rows[:4], rows[4:]]

    assert orders(3) == orders(3)
    epochs = orders(3) + orders(4)
    assert all(epochs.count(epoch) == 1 for epoch in epochs)


def test_an_exploded_ratio_keeps_its_size_and_its_gradient():
    """BUGS B13: r = e^3 with advantage -1; a clamp of the log-ratio would leave the loss without a slope."""
    part = experience_of([[-1.0]], [[-4.0]], [[T]])
    logprobs = torch.tensor([[-1.0]], dtype=torch.float64, requires_grad=True)
    loss = surrogate(logprobs, part, low=0.2, high=0.2).values
    loss.sum().backward()
    assert loss.item() == pytest.approx(math.exp(3)) and logprobs.grad.item() == pytest.approx(math.exp(3))


def test_best_of_n_is_the_likelihood_of_the_best_response_by_hand():
    """Rewards 1 3 3 | 2 0, responses of 1 2 1 | 1 2 tokens: rows 1 and 2 share the first prompt, row 3 wins
    the second. Their mean log-probs are -0.3, -0.5 and -0.7, a row weighs 1/5 and they count 1.5, 1.5 and 2:
    (1.5 x 0.3 + 1.5 x 0.5 + 2 x 0.7) / 5 = 0.52."""
    mask = torch.tensor([[0, 1, 0], [0, 1, 1], [0, 1, 0], [0, 1, 0], [0, 1, 1]]).bool()
    logprobs = torch.tensor([[0, -9, 0], [0, -0.4, -0.2], [0, -0.5, 0], [0, -0.7, 0], [0, -9, -9.0]])
    groups, rewards = torch.tensor([0, 0, 0, 1, 1]), torch.tensor([1.0, 3, 3, 2, 0])
    config = best_of_n.CONFIG()
    worth = config.compare(rewards, groups, mask.any(1))
    assert worth.tolist() == [0, 1.5, 1.5, 2, 0]
    part = Experience(
        tokens=mask.long(), attention_mask=mask, action_mask=mask, rollout_logprobs=logprobs,
        old_logprobs=None, advantages=worth[:, None] * mask, old_values=None, returns=None, ref_logprobs=None,
    )  # fmt: skip
    loss = config.surrogate(logprobs, logprobs, part).values
    assert float((loss * token_weights(mask, config.aggregate)).sum()) == pytest.approx(0.52)
