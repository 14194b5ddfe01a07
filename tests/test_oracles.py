"""Every estimator and loss against the slow formula of its paper (oracles.py), on random ragged cases.

1,000 cases each (cases.py): a case is a response where rows do not see each other, else a group or a batch.
Gradients are compared with central differences of the slow formula.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch

from orchestrator import plugins
from orchestrator.algorithms.ppo import PPO
from orchestrator.batch import PolicyOutput
from orchestrator.corrections import Correction, correction_weights
from orchestrator.estimators import (
    gae,
    group_centred,
    group_normalised,
    returns_to_go,
    token_rewards,
    whiten,
)
from orchestrator.kl import full_kl, kl, next_coef
from orchestrator.minibatch import token_weights
from orchestrator.shaping import RunningStats, Shaping, shape
from tests import oracles
from tests.cases import LONG, SHAPES, Case, agree, cases, close, rows

PACKAGE = "orchestrator.algorithms"
both_types = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])


# estimators


@both_types
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (1.0, 0.0), (0.9, 0.7), (1.0, 0.95), (0.0, 0.5)])
def test_gae(dtype, gamma, lam):
    for case in cases(SHAPES[::5] + SHAPES[1::5] + SHAPES[4::10] + LONG, dtype):
        rewards = case.adv
        advantages, returns = gae(rewards, case.values, case.mask, gamma=gamma, lam=lam)
        values = rows(case.values, case.mask)
        expected = [
            oracles.gae(r, v, gamma, lam) for r, v in zip(rows(rewards, case.mask), values, strict=True)
        ]
        agree(advantages, case.mask, expected)
        targets = [[a + v for a, v in zip(*pair, strict=True)] for pair in zip(expected, values, strict=True)]
        agree(returns, case.mask, targets)


@both_types
@pytest.mark.parametrize("gamma", [1.0, 0.95])
def test_returns_to_go(dtype, gamma):
    for case in cases(SHAPES + LONG, dtype):
        expected = [oracles.returns_to_go(r, gamma) for r in rows(case.adv, case.mask)]
        agree(returns_to_go(case.adv, case.mask, gamma=gamma), case.mask, expected)


@both_types
def test_token_rewards(dtype):
    for case in cases(SHAPES, dtype):
        ours = token_rewards(case.batch().rewards, case.adv, case.mask)
        pairs = zip(case.rewards.tolist(), rows(case.adv, case.mask), strict=True)
        agree(ours, case.mask, [oracles.token_rewards(*pair) for pair in pairs])


@both_types
def test_whitening(dtype):
    for case in cases(SHAPES * 20, dtype):
        agree(whiten(case.adv, case.mask), case.mask, oracles.whiten(rows(case.adv, case.mask)))


@both_types
def test_advantages_within_a_group(dtype):
    for case in cases(SHAPES, dtype) + cases([(1500, 2)], dtype, group_size=7):
        seqs, valid = case.sequences(), case.mask.any(1)
        rewards = case.batch().rewards
        by_group = lambda rule, seqs=seqs: oracles.by_group(seqs, rule, [s.reward for s in seqs])  # noqa: E731
        close(group_centred(rewards, case.groups, valid), by_group(oracles.centred))
        ours = group_centred(rewards, case.groups, valid, leave_one_out=True)
        close(ours, by_group(oracles.leave_one_out))
        ours = group_normalised(rewards, case.groups, valid, eps=1e-4)
        # dividing by a deviation of nearly equal rewards lifts the rounding of the mean with it
        close(ours, by_group(lambda r: oracles.normalised(r, 1e-4)))


@both_types
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_kl_estimators(dtype, estimator):
    for case in cases(SHAPES, dtype):
        pairs = zip(rows(case.logp, case.mask), rows(case.ref, case.mask), strict=True)
        expected = [
            [oracles.kl_estimate(p, q, estimator) for p, q in zip(*pair, strict=True)] for pair in pairs
        ]
        agree(kl(case.logp, case.ref, case.mask, estimator), case.mask, expected)


@both_types
def test_kl_of_whole_distributions(dtype):
    rng = np.random.default_rng(0)
    for case in cases(SHAPES, dtype):
        p, q = (
            torch.tensor(rng.normal(0, 1, (*case.mask.shape, 5)), dtype=dtype).log_softmax(-1)
            for _ in range(2)
        )
        expected = [
            [
                oracles.full_kl(p[b, t].tolist(), q[b, t].tolist())
                for t in range(p.shape[1])
                if case.mask[b, t]
            ]
            for b in range(p.shape[0])
        ]
        off = ~case.mask[..., None]
        ours = full_kl(p.masked_fill(off, float("nan")), q.masked_fill(off, float("nan")), case.mask)
        agree(ours, case.mask, expected)


def test_controllers():
    rng = np.random.default_rng(0)
    for _ in range(1000):
        coef, measured, target = rng.uniform(0.001, 1, 3).tolist()
        n = int(rng.integers(1, 500))
        assert next_coef(coef, measured, n, "fixed", target, 1e4) == coef
        assert next_coef(coef, measured, n, "doubling", target, 1e4) == oracles.doubling(
            coef, measured, target
        )
        expected = oracles.proportional(coef, measured, n, target, 1e4)
        assert next_coef(coef, measured, n, "proportional", target, 1e4) == pytest.approx(expected, rel=1e-9)


def test_running_statistics_are_those_of_all_rewards_so_far():
    rng = np.random.default_rng(0)
    for _ in range(200):
        stats, seen, offset = RunningStats(), [], rng.choice([0.0, 1e4])
        for _ in range(5):
            new = (offset + rng.normal(0, 1, rng.integers(0, 6))).astype("f4")
            stats, seen = stats.updated(torch.tensor(new)), seen + new.astype(float).tolist()
            assert (stats.mean, stats.std) == pytest.approx(oracles.running(seen), rel=1e-9)


@both_types
@pytest.mark.parametrize("rule", ["token", "token_both", "sequence", "icepop", "sequence_mask"])
def test_corrections(dtype, rule):
    for case in cases(SHAPES, dtype):
        setting = Correction(rule=rule, low=0.7, high=1.4)
        weights, _ = correction_weights(case.old, case.rollout, case.mask, setting)
        agree(weights, case.mask, [oracles.correction(s, rule, 0.7, 1.4) for s in case.sequences()])


@both_types
def test_shaping(dtype):
    rng = np.random.default_rng(0)
    for case in cases(SHAPES, dtype):
        pick = lambda *choices: choices[rng.integers(len(choices))]  # noqa: E731
        settings = Shaping(
            clip=pick(None, 0.5), normalize=pick("none", "scale", "standard"),
            overlong_buffer=pick(None, 1, 3), overlong_penalty=pick(0.5, 2.0),
            truncation_scale=pick(None, 0.0, 0.3), missing_eos_penalty=pick(0.0, 0.25),
        )  # fmt: skip
        batch = replace(case.batch(), rewards=case.rewards)
        lengths = case.mask.sum(1).tolist()
        clipped = [r if settings.clip is None else oracles.clip(r, -0.5, 0.5) for r in case.rewards.tolist()]
        seen = [-3.0, 0.5, *(r for r, n in zip(clipped, lengths, strict=True) if n)]
        mean, std = oracles.running(seen)
        start = RunningStats().updated(torch.tensor([-3.0, 0.5]))
        ours, _, _ = shape(batch, settings, start, max_new_tokens=7)
        expected = [
            oracles.shaped(*each, settings, mean=mean, std=std, max_new_tokens=7)
            for each in zip(case.rewards.tolist(), lengths, batch.stopped.tolist(), strict=True)
        ]
        close(ours, expected)


@pytest.mark.parametrize("aggregate", ["token_mean", "sequence_mean", "constant_length"])
def test_token_weights(aggregate):
    for case in cases(SHAPES, torch.float32):
        lengths = case.mask.sum(1).tolist()
        expected = [
            [oracles.token_weight(aggregate, lengths, b, 16)] * n if n else [] for b, n in enumerate(lengths)
        ]
        ours = token_weights(case.mask, aggregate, 16)
        agree(ours, case.mask, expected)
        if aggregate != "constant_length":
            assert ours.double().sum().item() == pytest.approx(1.0 if any(lengths) else 0.0, abs=1e-6)


# algorithms

CONFIGS = {
    "ppo": [
        {}, {"gae_lambda": 1.0, "kl_estimator": "k3"}, {"gae_lambda": 0.0, "gamma": 0.9, "kl_coef": 0.0},
        {"whiten_advantages": False, "dual_clip": 1.5, "clip_high": 0.3},
        {"objective": "penalty", "kl_in": "loss", "kl_estimator": "k2"}, {"objective": "policy_gradient"},
    ],
    "grpo": [{}, {"divide_by_std": False, "kl_coef": 0.1, "kl_in": "reward"}, {"kl_estimator": "k2"}],
    "gspo": [{}, {"clip_low": 0.1}, {"token_form": True, "clip_low": 0.1, "clip_high": 0.2}],
    "gmpo": [{}, {"clip_low": 0.1, "clip_high": 0.2}], "cispo": [{}, {"clip_low": 0.1, "clip_high": 0.2}],
    "reinforce": [{"kl_coef": 0.1}, {"baseline": "none", "gamma": 0.9}],
    "rloo": [{}, {"kl_coef": 0.0}, {"kl_in": "loss", "kl_estimator": "k3"}],
}  # fmt: skip
AROUND = [
    {},
    {"correction": {"rule": "token", "high": 1.2}, "entropy_coef": 0.01},
    {"correction": {"rule": "icepop"}, "kl_coef": 0.2, "kl_in": "loss", "kl_estimator": "k3"},
    {"correction": {"rule": "sequence_mask"}, "kl_coef": 0.2, "kl_in": "loss", "kl_estimator": "k2"},
    *(
        {"kl_coef": 0.2, "kl_in": "loss", "kl_estimator": k, "kl_weighted": True, "entropy_coef": 0.0}
        for k in ("k1", "k2", "k3")
    ),
]


def configured(*, alone=False):
    """``alone``: only those whose loss reads one response at a time; the others have a file of their own."""
    return [
        pytest.param(name, settings, id=f"{name}-{i}")
        for name in plugins.names(PACKAGE)
        for i, settings in enumerate(CONFIGS.get(name, [{}]))
        if not (alone and plugins.find(PACKAGE, name).CONFIG.steps_on_groups)
    ]


def algorithm(name, settings):
    return plugins.find(PACKAGE, name).CONFIG.model_validate(settings)


@both_types
@pytest.mark.parametrize(("name", "settings"), configured())
def test_advantages_of_every_algorithm(dtype, name, settings):
    config = algorithm(name, settings)
    for case in cases(SHAPES, dtype, seed=1):
        experience, _ = config.experience(case.batch(), case.scores(), 0.3)
        used = config.kl_coef if getattr(config, "objective", "") == "penalty" else 0.3
        advantages, returns = oracles.advantages(name, config, case.sequences(), used)
        agree(experience.advantages, case.mask, advantages)
        if returns is not None:
            agree(experience.returns, case.mask, returns)


@both_types
@pytest.mark.parametrize(("name", "settings"), configured(alone=True))
def test_loss_of_every_algorithm(dtype, name, settings):
    rng = np.random.default_rng(2)
    for extra in AROUND:
        config = algorithm(name, {**settings, **extra})
        for size in SHAPES[-5:] + SHAPES[-1:]:
            case = Case(rng, *size, dtype=dtype)
            if name in {"gmpo"}:  # its sign is the response's
                case.per_response()
            output = PolicyOutput(logprobs=case.logp, entropy=case.entropy if config.wants_entropy else None)
            ours = config.policy_loss(output, case.experience(0.3)).values
            pairs = zip(case.sequences(), rows(case.adv, case.mask), strict=True)
            agree(ours, case.mask, [oracles.policy_loss(name, config, s, a, 0.3) for s, a in pairs])


@both_types
@pytest.mark.parametrize("bound", [None, 0.2])
def test_value_loss(dtype, bound):
    for case in cases(SHAPES, dtype):
        ours = PPO(value_clip=bound).value_loss(case.new_values, case.experience(0.0)).values
        columns = (rows(x, case.mask) for x in (case.new_values, case.values, case.returns))
        expected = [oracles.value_loss(*lists, bound) for lists in zip(*columns, strict=True)]
        agree(ours, case.mask, expected)


# gradients


def difference(loss, point, step=1e-5):
    """Central differences of a function of a list."""
    slopes = []
    for t in range(len(point)):
        up, down = ([*point[:t], point[t] + sign * step, *point[t + 1 :]] for sign in (1, -1))
        slopes.append((loss(up) - loss(down)) / (2 * step))
    return slopes


@pytest.mark.parametrize(("name", "settings"), configured(alone=True))
def test_gradient_of_every_loss(name, settings):
    rng = np.random.default_rng(3)
    for extra in AROUND:
        config = algorithm(name, {**settings, **extra})
        case = Case(rng, 8, 5)
        if name in {"gmpo"}:
            case.per_response()
        logprobs = case.logp.clone().requires_grad_()
        output = PolicyOutput(logprobs=logprobs, entropy=case.entropy if config.wants_entropy else None)
        loss = config.policy_loss(output, case.experience(0.3)).values
        (loss * token_weights(case.mask, "sequence_mean")).sum().backward()
        lengths = case.mask.sum(1).tolist()
        expected = []
        for row, (seq, adv) in enumerate(zip(case.sequences(), rows(case.adv, case.mask), strict=True)):
            weight = oracles.token_weight("sequence_mean", lengths, row, 0) if adv else 0.0

            def slow(logp, config=config, seq=seq, adv=adv, weight=weight):
                moved = replace(seq, logp=logp)
                return weight * sum(oracles.policy_loss(name, config, moved, adv, 0.3, at=seq.logp))

            expected.append(difference(slow, seq.logp))
        ours = logprobs.grad[case.mask].tolist()
        assert ours == pytest.approx([x for row in expected for x in row], rel=1e-6, abs=1e-7)
        assert (logprobs.grad[~case.mask] == 0).all()


@pytest.mark.parametrize("bound", [None, 0.2])
def test_gradient_of_the_value_loss(bound):
    case = cases([(12, 5)], torch.float64)[0]
    values = case.new_values.clone().requires_grad_()
    PPO(value_clip=bound).value_loss(values, case.experience(0.0)).values.sum().backward()
    expected = []
    for new, old, target in zip(
        *(rows(x, case.mask) for x in (case.new_values, case.values, case.returns)), strict=True
    ):
        slow = lambda v, old=old, target=target: sum(oracles.value_loss(v, old, target, bound))  # noqa: E731
        expected += difference(slow, new)
    assert values.grad[case.mask].tolist() == pytest.approx(expected, rel=1e-6, abs=1e-7)
