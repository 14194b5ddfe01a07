"""Online DPO: pairs from ranked samples, their loss by hand and by the paper, pairs that stay together."""

import math
from dataclasses import replace

import pytest
import torch

from actors.actor import Actor
from orchestrator.algorithms.online_dpo import OnlineDPO
from orchestrator.balance import plan
from orchestrator.batch import Batch, PolicyOutput
from orchestrator.config import Model, Run, Updates
from orchestrator.minibatch import minibatches, token_weights
from tests import tiny
from tests.fakes import FakeLearner
from tests.test_loop import fake_roles, run, settings
from tests.test_workers import OPTIMIZER, ready, weights_of

MASK = torch.tensor([[0, 1, 0], [0, 1, 1], [0, 1, 0], [0, 1, 0], [0, 1, 1], [0, 1, 1]]).bool()
LOGPROBS = torch.tensor([[0, -1, 0], [0, -1, -2], [0, -3, 0], [0, -1, 0], [0, -1, -1], [0, -1, -1.0]])
REFERENCE = torch.tensor([[0, -2, 0], [0, -1, -1], [0, -9, 0], [0, -9, 0], [0, -9, -9], [0, -9, -9.0]])


def batch(rewards, groups, mask=MASK, rollout=None):
    B = len(rewards)
    return Batch(
        tokens=torch.arange(1, 1 + mask.numel()).view(mask.shape) % tiny.VOCAB, attention_mask=mask | True,
        action_mask=mask, rollout_logprobs=torch.zeros(mask.shape) if rollout is None else rollout,
        rewards=torch.tensor(rewards), groups=torch.tensor(groups), versions=mask.long(),
        stopped=torch.ones(B, dtype=torch.bool), baselines=None,
    )  # fmt: skip


def experience(config, given, reference=REFERENCE):
    return config.experience(given, {"reference": reference}, 0.0)[0]


def loss_of(config, logprobs, found):
    values = config.policy_loss(PolicyOutput(logprobs=logprobs, entropy=None), found).values
    return (token_weights(found.action_mask, config.aggregate) * values).sum()


def test_best_and_worst_of_a_prompt_are_a_pair_by_hand():
    """Rewards 3 1 2 | 5 5 | 4: of the first prompt row 0 is chosen and row 1 rejected, row 2 is neither; the
    others have no pair. Log-ratios -1 + 2 = 1 and -3 + 2 = -1: margin 0.5 x 2 = 1, loss log(1 + exp(-1)).
    d loss / d log p = -+ 0.5 sigmoid(-1) on every token of the two."""
    config = OnlineDPO(beta=0.5)
    found = experience(config, batch([3.0, 1, 2, 5, 5, 4], [0, 0, 0, 1, 1, 2]))
    assert found.advantages.tolist() == [[0, 1, 0], [0, -1, -1], [0] * 3, [0] * 3, [0] * 3, [0] * 3]
    assert found.groups.tolist() == [0, 0, -1, 1, -1, 2]
    logprobs = LOGPROBS.clone().requires_grad_()
    loss = loss_of(config, logprobs, found)
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-1)))
    loss.backward()
    slope = 0.5 / (1 + math.exp(1))
    expected = torch.tensor([[0, -slope, 0], [0, slope, slope], [0] * 3, [0] * 3, [0] * 3, [0] * 3])
    torch.testing.assert_close(logprobs.grad, expected)


def test_of_equal_rewards_the_likeliest_is_taken():
    rollout = torch.tensor([[0, -4, 0], [0, -1, -2], [0, -2, 0], [0, -5, 0], [0, -1, -0.5], [0, -3, -3.0]])
    found = experience(OnlineDPO(), batch([1.0, 1, 0, 0, 0, 1], [0] * 6, rollout=rollout))
    assert found.advantages[:, 1].tolist() == [0, 1, 0, 0, -1, 0]  # of -4 -3 -6, and of -2 -5 -1.5


def test_the_figures_are_those_of_pairs():
    config = OnlineDPO(beta=0.5)
    found = experience(config, batch([3.0, 1, 2, 5, 5, 4], [0, 0, 0, 1, 1, 2]))
    metrics = config.policy_loss(PolicyOutput(logprobs=LOGPROBS, entropy=None), found).metrics
    weights = token_weights(found.action_mask, config.aggregate)
    means = {name: float((weights * figure).sum()) for name, figure in metrics.items()}
    assert means["accuracy"] == 1.0 and means["margin"] == pytest.approx(1.0)
    assert (means["chosen_reward"], means["rejected_reward"]) == pytest.approx((0.5, -0.5))
    assert (means["chosen_logprob"], means["rejected_logprob"]) == pytest.approx((-1.0, -3.0))


def paper(logprobs, reference, chosen, rejected, beta, e):
    """arXiv:2305.18290 eq. 7 with Mitchell's label smoothing, floats only; sums over responses."""
    total = 0.0
    for win, lose in zip(chosen, rejected, strict=True):
        ratio = [math.fsum(logprobs[row]) - math.fsum(reference[row]) for row in (win, lose)]
        h = beta * (ratio[0] - ratio[1])
        total += (1 - e) * math.log(1 + math.exp(-h)) + e * math.log(1 + math.exp(h))
    return total / len(chosen)


def test_loss_and_gradient_are_the_papers():
    noise = torch.Generator().manual_seed(0)
    logprobs, reference = (-2 * torch.rand((8, 4), generator=noise, dtype=torch.float64) for _ in range(2))
    mask = torch.rand((8, 4), generator=noise) < 0.7
    mask[:, 0] = True
    rewards, groups = [0.1, 0.9, 0.5, 0.2, 0.8, 0.3, 0.3, 0.3], [2, 0, 0, 1, 2, 1, 2, 0]
    chosen, rejected = [1, 5, 4], [7, 3, 0]  # of the prompts 0, 1, 2
    config = OnlineDPO(beta=0.7, label_smoothing=0.1)
    found = experience(config, batch(rewards, groups, mask), reference)
    leaf = logprobs.clone().requires_grad_()
    loss = loss_of(config, leaf, found)
    loss.backward()

    def slow(values):
        lists = [[v[m].tolist() for v, m in zip(rows, mask, strict=True)] for rows in (values, reference)]
        return paper(*lists, chosen, rejected, 0.7, 0.1)

    assert loss.item() == pytest.approx(slow(logprobs), rel=1e-6)
    for row in range(8):
        for column in range(4):
            shift = torch.zeros_like(logprobs)
            shift[row, column] = 1e-6
            slope = (slow(logprobs + shift) - slow(logprobs - shift)) / 2e-6
            assert leaf.grad[row, column].item() == pytest.approx(slope, abs=1e-6)


def test_a_cut_pair_is_refused():
    config = OnlineDPO()
    found = experience(config, batch([3.0, 1, 2, 5, 5, 4], [0, 0, 0, 1, 1, 2]))
    rows = {name: getattr(found, name)[:1] for name in (
        "tokens", "attention_mask", "action_mask", "rollout_logprobs", "advantages", "ref_logprobs", "groups"
    )}  # fmt: skip
    with pytest.raises(ValueError, match="1 chosen and 0 rejected rows are not whole pairs"):
        config.policy_loss(PolicyOutput(logprobs=LOGPROBS[:1], entropy=None), replace(found, **rows))


def test_minibatches_and_micro_batches_keep_pairs_and_leave_out_who_has_none():
    rewards = [float(i % 3) for i in range(18)]
    mask = torch.ones(18, 5, dtype=torch.bool)
    found = experience(OnlineDPO(), batch(rewards, [i // 3 for i in range(18)], mask), torch.zeros(18, 5))
    seen = []
    for part in minibatches(
        found, Updates(minibatches=3), aggregate="sequence_mean", constant_length=1, seed=0
    ):
        rows, numbers = part.rows.tolist(), found.groups[part.rows].tolist()
        assert float(part.weights.sum()) == pytest.approx(1.0)
        for rank in plan([5] * len(rows), num_ranks=2, token_budget=10, units=numbers):
            for positions in rank:
                sides = found.advantages[[rows[at] for at in positions], 0]
                assert sides.tolist() in ([], [-1, 1])  # worst first: rewards 0 1 2 in each group
        seen += rows
    assert sorted(seen) == [i for i in range(18) if i % 3 != 1]
    with pytest.raises(ValueError, match="6 groups do not split into 4 equal minibatches"):
        list(minibatches(
            found, Updates(minibatches=4), aggregate="sequence_mean", constant_length=1, seed=0
        ))  # fmt: skip


def test_an_actor_steps_alike_on_all_pairs_at_once_and_on_one_at_a_time(tmp_path):
    model = Model(path=tiny.save(tmp_path / "policy", tiny.llama()), dtype="float32")
    mask = torch.tensor([[0, 1, 1], [0, 1, 1], [0, 1, 1], [0, 1, 1]]).bool()
    config = OnlineDPO(beta=0.5)
    found = experience(config, batch([1.0, 0, 0, 1], [0, 0, 1, 1], mask), torch.full((4, 3), -3.0))
    (step,) = minibatches(found, Updates(minibatches=1), aggregate="sequence_mean", constant_length=1, seed=0)
    weights = []
    for micro_batches in ([[0, 1, 2, 3]], [[0, 1], [2, 3], []]):
        actor = ready(Actor(model=model, optimizer=OPTIMIZER, total_steps=2, loss=config.policy_loss))
        figures = actor.update(step, micro_batches)
        weights.append(weights_of(actor))
        assert figures["grad_norm"] > 0
    for name, tensor in weights[0].items():
        torch.testing.assert_close(tensor, weights[1][name], atol=1e-6, rtol=0)


def test_the_loop_trains_pairs_with_a_reference_and_no_critic():
    class Pairs(FakeLearner):
        def __init__(self):
            super().__init__()
            self.sides = []

        async def update(self, minibatch):
            side = minibatch.records.advantages[minibatch.rows].sum(1).sign().long()
            self.sides.append(side.tolist())
            return await super().update(minibatch)

    roles = fake_roles(critic=None, actor=Pairs())
    rl = settings(steps=3, algorithm={"name": "online_dpo"}, updates={"minibatches": 2}, samples_per_prompt=4)
    _, recorder = run(rl, roles)
    # sample k earns k: the last of four is chosen, the first rejected
    assert roles.actor.sides == [[-1, 1, -1, 1]] * 6
    assert roles.actor.weights == pytest.approx([1.0] * 6)
    assert roles.reference.scored_early == 3 * 4 * 4 and roles.actor.scored == 0
    assert recorder.metrics[0]["groups_without_signal"] == 0


@pytest.mark.parametrize(
    ("rl", "message"),
    [
        ({"samples_per_prompt": 1}, "compares the samples of one prompt"),
        ({"prompts_per_step": 6, "updates": {"minibatches": 4}}, "pick a divisor of 6"),
    ],
)
def test_what_has_no_pairs_is_refused(rl, message):
    with pytest.raises(ValueError, match=message):
        Run(
            model={"path": "m"}, roles={"reward": {"function": "exact_match"}},
            rl={"algorithm": {"name": "online_dpo"}, "prompts": {"path": "p"}, **rl},
        )  # fmt: skip


def test_without_the_reference_role_it_is_refused():
    with pytest.raises(
        ValueError, match=r"roles\.reference=null switches off what rl\.algorithm\.name=online_dpo"
    ):
        Run(
            model={"path": "m"}, roles={"reward": {"function": "exact_match"}, "reference": None},
            rl={"algorithm": {"name": "online_dpo"}, "prompts": {"path": "p"}},
        )  # fmt: skip
