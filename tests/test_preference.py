"""Every preference and reward objective against the formula of its paper in float64, by finite differences,
and on two tokens worked by hand."""

import math

import pytest
import torch

from orchestrator.batch import Examples, PolicyOutput
from orchestrator.objectives import cpo, dpo, ipo, kto, orpo, ranking, regression, simpo
from orchestrator.objectives.bradley_terry import BradleyTerry
from orchestrator.objectives.orpo import log_odds

MASK = [[0, 1, 1, 1], [0, 1, 0, 0], [0, 0, 1, 1], [0, 1, 1, 0]]  # responses of 3, 1, 2 and 2 tokens
REFERENCE = [-3.0, -0.5, -2.25, -1.5]


def examples(mask=MASK, *, ref=REFERENCE, targets=None, groups=None, kl=0.0):
    action_mask = torch.tensor(mask, dtype=torch.bool)
    return Examples(
        tokens=torch.ones_like(action_mask, dtype=torch.int64),
        attention_mask=torch.ones_like(action_mask),
        action_mask=action_mask,
        groups=None if groups is None else torch.tensor(groups),
        targets=None if targets is None else torch.tensor(targets, dtype=torch.float64),
        ref_logprobs=None if ref is None else torch.tensor(ref, dtype=torch.float64),
        kl=kl,
    )


def logprobs(seed=0):
    noise = torch.rand((4, 4), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return -2 * noise - 0.05


def total(objective, values, part):
    output = PolicyOutput(logprobs=values, entropy=None)
    return (objective.weights(part).double() * objective.loss(output, part).values).sum()


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def of(values):
    """Sum and length of each response, from plain lists."""
    rows = [
        [x for x, m in zip(row, mask, strict=True) if m]
        for row, mask in zip(values.tolist(), MASK, strict=True)
    ]
    return [sum(row) for row in rows], [len(row) for row in rows]


def paper_dpo(values, beta=0.3, e=0.1):
    sums, _ = of(values)
    h = [beta * ((sums[i] - REFERENCE[i]) - (sums[i + 1] - REFERENCE[i + 1])) for i in (0, 2)]
    return sum(-(1 - e) * math.log(sigmoid(x)) - e * math.log(sigmoid(-x)) for x in h) / 2


def paper_ipo(values, beta=0.3, average=False):
    sums, lengths = of(values)
    ratio = [(s - r) / (n if average else 1) for s, r, n in zip(sums, REFERENCE, lengths, strict=True)]
    return sum((ratio[i] - ratio[i + 1] - 1 / (2 * beta)) ** 2 for i in (0, 2)) / 2


def paper_kto(values, beta=0.3, z=0.4, good=(1, 0, 0, 1), weights=(1.0, 1.5)):
    sums, _ = of(values)
    loss = 0.0
    for s, ref, is_good in zip(sums, REFERENCE, good, strict=True):
        value = sigmoid(beta * (s - ref - z)) if is_good else sigmoid(beta * (z - (s - ref)))
        weight = weights[0] if is_good else weights[1]
        loss += weight - weight * value
    return loss / 4


def paper_cpo(values, beta=0.3, alpha=0.7, summed=False):
    sums, lengths = of(values)
    return sum(
        -math.log(sigmoid(beta * (sums[i] - sums[i + 1]))) - alpha * sums[i] / (1 if summed else lengths[i])
        for i in (0, 2)
    ) / 2  # fmt: skip


def paper_orpo(values, coef=0.25):
    sums, lengths = of(values)
    p = [math.exp(s / n) for s, n in zip(sums, lengths, strict=True)]
    odds = [x / (1 - x) for x in p]
    return sum(
        -math.log(p[i]) - coef * math.log(sigmoid(math.log(odds[i] / odds[i + 1]))) for i in (0, 2)
    ) / 2  # fmt: skip


def paper_simpo(values, beta=2.5, gamma=0.8):
    sums, lengths = of(values)
    r = [beta * s / n for s, n in zip(sums, lengths, strict=True)]
    return sum(-math.log(sigmoid(r[i] - r[i + 1] - gamma)) for i in (0, 2)) / 2


CASES = {
    "dpo": (dpo.CONFIG(beta=0.3, label_smoothing=0.1), paper_dpo, examples()),
    "ipo": (ipo.CONFIG(beta=0.3), paper_ipo, examples()),
    "ipo averaged": (
        ipo.CONFIG(beta=0.3, length_average=True), lambda v: paper_ipo(v, average=True), examples()
    ),
    "kto": (
        kto.CONFIG(beta=0.3, desirable=1.0, undesirable=1.5), paper_kto,
        examples(targets=[1, 0, 0, 1], kl=0.4),
    ),
    "cpo": (cpo.CONFIG(beta=0.3, nll_coef=0.7), paper_cpo, examples(ref=None)),
    "cpo summed": (
        cpo.CONFIG(beta=0.3, nll_coef=0.7, nll_sum=True), lambda v: paper_cpo(v, summed=True),
        examples(ref=None),
    ),
    "orpo": (orpo.CONFIG(odds_coef=0.25), paper_orpo, examples(ref=None)),
    "simpo": (simpo.CONFIG(beta=2.5, gamma=0.8), paper_simpo, examples(ref=None)),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_the_loss_is_the_papers(name):
    objective, paper, part = CASES[name]
    for seed in range(3):
        values = logprobs(seed)
        assert total(objective, values, part).item() == pytest.approx(paper(values), abs=1e-7)


@pytest.mark.parametrize("name", CASES)
def test_the_gradient_is_the_papers_finite_difference(name):
    objective, paper, part = CASES[name]
    values = logprobs().requires_grad_()
    total(objective, values, part).backward()
    step = 1e-6
    for row in range(4):
        for column in range(4):
            shift = torch.zeros((4, 4), dtype=torch.float64)
            shift[row, column] = step
            slope = (paper(values.detach() + shift) - paper(values.detach() - shift)) / (2 * step)
            assert values.grad[row, column].item() == pytest.approx(slope, abs=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_what_is_no_response_has_no_part_in_it(name):
    objective, _, part = CASES[name]
    values = logprobs()
    broken = values.where(part.action_mask, math.nan).requires_grad_()
    loss = total(objective, broken, part)
    loss.backward()
    assert loss.item() == pytest.approx(total(objective, values, part).item())
    assert torch.isfinite(broken.grad).all()


def pair(chosen, rejected):
    """One pair of one-token responses, and a reference that gives each 1/2."""
    part = examples([[0, 1], [0, 1]], ref=[math.log(0.5)] * 2)
    return torch.tensor([[0.0, math.log(chosen)], [0.0, math.log(rejected)]], dtype=torch.float64), part


def test_two_tokens_by_hand():
    values, part = pair(0.75, 0.25)
    # log-ratios ln 1.5 and ln 0.5, their difference ln 3
    found = {
        "dpo": total(dpo.CONFIG(beta=1), values, part),  # sigmoid(ln 3) = 3/4
        "ipo": total(ipo.CONFIG(beta=0.5), values, part),  # (ln 3 - 1)^2
        "cpo": total(cpo.CONFIG(beta=1), values, part),  # -ln 3/4 - ln 3/4
        "orpo": total(orpo.CONFIG(odds_coef=1), values, part),  # odds 3 and 1/3: sigmoid(ln 9) = 9/10
        "simpo": total(simpo.CONFIG(beta=1, gamma=0), values, part),  # sigmoid(ln 3)
    }
    wanted = {
        "dpo": -math.log(0.75),
        "ipo": (math.log(3) - 1) ** 2,
        "cpo": -2 * math.log(0.75),
        "orpo": -math.log(0.75) - math.log(0.9),
        "simpo": -math.log(0.75),
    }
    assert {name: loss.item() for name, loss in found.items()} == pytest.approx(wanted)


def test_kto_by_hand():
    values, part = pair(0.75, 0.25)
    part = examples([[0, 1], [0, 1]], ref=[math.log(0.5)] * 2, targets=[1, 0], kl=math.log(1.5))
    objective = kto.CONFIG(beta=1)
    output = PolicyOutput(logprobs=values, entropy=None)
    loss = objective.loss(output, part)
    # good: 1 - sigmoid(ln 1.5 - ln 1.5) = 1/2; bad: 1 - sigmoid(ln 1.5 - ln 0.5) = 1 - 3/4
    assert loss.values.tolist() == pytest.approx([0.5, 0.25])
    means = {name: float(figure.mean()) for name, figure in loss.metrics.items()}
    figures = objective.summarize(means)
    assert figures["chosen_reward"] == pytest.approx(math.log(1.5))
    assert figures["rejected_reward"] == pytest.approx(math.log(0.5))
    assert figures["margin"] == pytest.approx(math.log(3))


def test_the_figures_of_a_pair_are_logged_on_its_first_row():
    values, part = pair(0.75, 0.25)
    metrics = dpo.CONFIG(beta=2).loss(PolicyOutput(logprobs=values, entropy=None), part).metrics
    expected = {
        "accuracy": 1.0, "margin": 2 * math.log(3), "chosen_reward": 2 * math.log(1.5),
        "rejected_reward": 2 * math.log(0.5), "chosen_logprob": math.log(0.75),
        "rejected_logprob": math.log(0.25),
    }  # fmt: skip
    assert {name: row.tolist() for name, row in metrics.items()} == {
        name: pytest.approx([value, 0.0]) for name, value in expected.items()
    }


def test_odds_stay_finite_where_the_policy_is_certain():
    values = torch.tensor([0.0, -1e-12, -50.0], requires_grad=True)
    odds = log_odds(values)
    odds.sum().backward()
    assert torch.isfinite(odds).all() and torch.isfinite(values.grad).all()
    assert odds[2].item() == pytest.approx(-50.0)


def test_who_needs_a_reference_says_so_and_refuses_to_go_without():
    needs = {o.CONFIG.name for o in (cpo, dpo, ipo, kto, orpo, simpo) if o.CONFIG.needs_reference}
    assert needs == {"dpo", "ipo", "kto"}
    with pytest.raises(ValueError, match="no ref_logprobs"):
        total(dpo.CONFIG(), logprobs(), examples(ref=None))


class TestRewardModels:
    def test_a_margin_and_smoothing_by_hand(self):
        part = examples([[1], [1]], ref=None, targets=[math.log(2), 0.0])
        scores = torch.tensor([math.log(6), 0.0], dtype=torch.float64)
        # ln 6 - ln 2 = ln 3
        loss = BradleyTerry(label_smoothing=0.1).loss(scores, part)
        assert loss.values.tolist() == pytest.approx([-0.9 * math.log(0.75) - 0.1 * math.log(0.25), 0.0])
        assert loss.metrics["margin"].tolist() == pytest.approx([math.log(6), 0.0])

    def test_a_ranking_is_the_mean_of_its_comparisons(self):
        """Groups of 3 and 2; the second has a tie with nothing to say about one of its pairs."""
        scores = torch.tensor([2.0, 0.5, 1.0, 0.0, 3.0], dtype=torch.float64, requires_grad=True)
        part = examples([[1]] * 5, ref=None, targets=[-1, -2, -2, -2, -1], groups=[4, 4, 4, 7, 7])
        objective = ranking.CONFIG()
        loss = objective.loss(scores, part)
        first = -(math.log(sigmoid(1.5)) + math.log(sigmoid(1.0))) / 2
        second = -math.log(sigmoid(3.0))
        assert loss.values.tolist() == pytest.approx([first, 0, 0, second, 0])
        assert objective.weights(part).tolist() == [0.5, 0, 0, 0.5, 0]
        assert loss.metrics["accuracy"].tolist() == [1, 0, 0, 1, 0]
        (objective.weights(part) * loss.values).sum().backward()
        # d/ds of -log sigmoid(d) is -(1 - sigmoid(d))
        a, b, c = 1 - sigmoid(1.5), 1 - sigmoid(1.0), 1 - sigmoid(3.0)
        assert scores.grad.tolist() == pytest.approx([-(a + b) / 4, a / 4, b / 4, c / 2, -c / 2])

    def test_a_ranking_of_four_makes_six_comparisons_in_one_pass(self):
        scores = torch.tensor([0.3, -1.0, 0.7, 2.0], dtype=torch.float64)
        part = examples([[1]] * 4, ref=None, targets=[3, 2, 1, 0], groups=[0] * 4)
        s = scores.tolist()
        expected = [-math.log(sigmoid(s[i] - s[j])) for i in range(4) for j in range(i + 1, 4)]
        assert len(expected) == 6
        assert ranking.CONFIG().loss(scores, part).values[0].item() == pytest.approx(sum(expected) / 6)

    def test_regression_is_the_squared_error(self):
        part = examples([[1], [1]], ref=None, targets=[3.0, 1.0])
        loss = regression.CONFIG().loss(torch.tensor([1.0, 1.5], dtype=torch.float64), part)
        assert loss.values.tolist() == [4.0, 0.25]
        assert loss.metrics["absolute_error"].tolist() == [2.0, 0.5]
