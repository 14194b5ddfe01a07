"""Intervals and calibration by hand; the reference asked once answers as the live one."""

import math

import pytest
import torch

from orchestrator.examples import Unit
from orchestrator.heldout import calibration_error, measure, pair_figures, wilson
from orchestrator.objectives import bradley_terry, dpo, kto, sft, simpo
from orchestrator.supervised import KnownReference, LiveReference, fit


class Scorer:
    """Log-prob -token / scale for every action token; takes note of what it learns."""

    def __init__(self, scale):
        self.scale, self.asked, self.seen = scale, 0, []

    async def score(self, batch):
        self.asked += 1
        return (-batch.tokens / self.scale) * batch.action_mask

    async def update(self, minibatch):
        self.seen.append(minibatch.records)
        return {"loss": 1.0, "good_fraction": 0.5, "chosen_reward": 1.0, "rejected_reward": 0.0,
                "chosen_logprob": -1.0, "rejected_logprob": -1.0}  # fmt: skip


def row(*tokens):
    return tokens, (False,) + (True,) * (len(tokens) - 1)


def test_wilson_is_the_textbooks():
    assert wilson(8, 10) == pytest.approx((0.4901624715, 0.9433178485), abs=1e-8)
    assert wilson(0, 10)[0] == pytest.approx(0.0, abs=1e-12)


def test_calibration_compares_sureness_with_being_right():
    sure = math.log(4)  # sigmoid = 0.8
    margins = torch.tensor([sure] * 3 + [-sure] * 2, dtype=torch.float64)  # right in 0.6
    assert calibration_error(margins) == pytest.approx(0.2)
    assert calibration_error(torch.tensor([sure] * 4 + [-sure])) == pytest.approx(0.0, abs=1e-6)
    assert pair_figures(margins)["accuracy"] == pytest.approx(0.6)


async def test_heldout_loss_pools_tokens_and_not_parts():
    units = [Unit(rows=(row(1, 2, 4),))] * 70 + [Unit(rows=(row(1, 6),))] * 5  # two parts of 64 and 11
    figures = (await measure(Scorer(1.0), units, sft.CONFIG(), pad_id=0)).figures
    assert figures["heldout_loss"] == pytest.approx((70 * 6 + 5 * 6) / (70 * 2 + 5))


async def test_the_loss_has_the_interval_of_its_units():
    """Tokens 3 | 1 3 | 2 as losses of three rows: mean 9 / 4. What is left of the row sums 3, 4, 2 after
    9 / 4 a token is 3/4, -1/2, -1/4: squares sum to 7/8, x 3/2, the root over 4 tokens: sqrt(21 / 16) / 4."""
    units = [Unit(rows=(row(1, 3),)), Unit(rows=(row(1, 1, 3),)), Unit(rows=(row(1, 2),))]
    figures = (await measure(Scorer(1.0), units, sft.CONFIG(), pad_id=0)).figures
    half = 1.959963984540054 * math.sqrt(21 / 16) / 4
    assert figures["heldout_loss_low"] == pytest.approx(9 / 4 - half)
    assert figures["heldout_loss_high"] == pytest.approx(9 / 4 + half)


async def test_the_loss_of_pairs_has_the_interval_of_pairs():
    """Two pairs of margins 1 and 3 under SimPO's loss log(1 + exp(-margin)): half their difference is the
    standard error of their mean."""
    units = [Unit(rows=(row(1, 2), row(1, 3))), Unit(rows=(row(1, 2), row(1, 5)))]
    figures = (await measure(Scorer(1.0), units, simpo.CONFIG(beta=1, gamma=0), pad_id=0)).figures
    a, b = (math.log(1 + math.exp(-margin)) for margin in (1, 3))
    assert figures["heldout_loss_high"] == pytest.approx((a + b) / 2 + 1.959963984540054 * (a - b) / 2)


async def test_the_change_of_a_loss_has_the_interval_of_differences():
    """Losses a token of 3, 2 and 2 halve: row sums fall by 3/2, 2 and 1 over 1, 2 and 1 tokens, in the mean
    by 9/8. What is left of the falls is 3/8, -1/4, -1/8: squares sum to 7/32, x 3/2, the root over 4."""
    units = [Unit(rows=(row(1, 3),)), Unit(rows=(row(1, 1, 3),)), Unit(rows=(row(1, 2),))]
    before, after = [await measure(Scorer(scale), units, sft.CONFIG(), pad_id=0) for scale in (1.0, 2.0)]
    figures = after.figures_since(before)
    assert figures["heldout_loss"] == pytest.approx(9 / 8)
    assert figures["heldout_loss_change"] == pytest.approx(-9 / 8)
    half = 1.959963984540054 * math.sqrt(21 / 64) / 4
    assert figures["heldout_loss_change_high"] == pytest.approx(-9 / 8 + half)
    assert "heldout_loss_change" not in after.figures_since(None)


async def test_heldout_figures_of_dpo_read_the_reference():
    units = [Unit(rows=(row(1, 2), row(1, 4)))]
    policy, reference = Scorer(1.0), LiveReference(Scorer(2.0))
    figures = (await measure(policy, units, dpo.CONFIG(beta=1), pad_id=0, reference=reference)).figures
    # log-ratios -2 + 1 = -1 and -4 + 2 = -2: margin 1
    assert figures["heldout_margin"] == pytest.approx(1.0)
    assert figures["heldout_loss"] == pytest.approx(math.log(1 + math.exp(-1)))
    assert figures["heldout_accuracy"] == 1.0


async def test_a_reward_model_is_measured_on_its_scores():
    class Judge(Scorer):
        async def score(self, batch):
            return batch.tokens[:, 1].float()

    figures = (
        await measure(Judge(1), [Unit(rows=(row(1, 5), row(1, 3)))], bradley_terry.CONFIG(), pad_id=0)
    ).figures
    assert figures["heldout_margin"] == 2.0 and figures["heldout_accuracy"] == 1.0


UNITS = [
    Unit(rows=(row(1, 2, 3),), targets=(1.0,), mismatched=row(1, 7)),
    Unit(rows=(row(1, 7),), targets=(0.0,), mismatched=row(1, 2, 3)),
    Unit(rows=(row(1, 4, 4, 4),), targets=(1.0,), mismatched=row(1, 2)),
]


async def test_a_reference_asked_once_answers_as_the_live_one():
    reference = Scorer(2.0)
    known = await KnownReference.ask(reference, UNITS, pad_id=0)
    seen = {}
    for name, source in (("live", LiveReference(Scorer(2.0))), ("known", known)):
        learner = Scorer(1.0)
        await fit(
            learner, UNITS, objective=kto.CONFIG(), reference=source, batch_size=2, steps=3, seed=5,
            pad_id=0, log=lambda *_: None,
        )  # fmt: skip
        seen[name] = learner.seen
    assert reference.asked == 2  # rows and mismatched rows, once
    for a, b in zip(seen["live"], seen["known"], strict=True):
        assert torch.equal(a.tokens, b.tokens)
        assert torch.allclose(a.ref_logprobs, b.ref_logprobs) and a.kl == pytest.approx(b.kl)


async def test_a_stage_goes_on_with_the_rows_it_would_have_met():
    async def trained(steps, start):
        learner, done = Scorer(1.0), []

        async def stepped(step):
            done.append(step)

        await fit(
            learner, UNITS, objective=kto.CONFIG(), reference=LiveReference(Scorer(2.0)), batch_size=2,
            steps=steps, seed=5, pad_id=0, log=lambda *_: None, start=start, stepped=stepped,
        )  # fmt: skip
        return [examples.tokens.tolist() for examples in learner.seen], done

    (whole, _), (before, _), (after, done) = await trained(5, 0), await trained(2, 0), await trained(5, 2)
    assert before + after == whole and done == [3, 4, 5]


async def test_the_kl_is_the_mean_over_mismatched_rows_and_never_negative():
    for scale, expected in ((1.0, 0.0), (4.0, (7 / 4 + 5 / 4 + 2 / 4) / 3)):
        learner = Scorer(scale)
        await fit(
            learner, UNITS, objective=kto.CONFIG(), reference=LiveReference(Scorer(2.0)), batch_size=3,
            steps=1, seed=0, pad_id=0, log=lambda *_: None,
        )  # fmt: skip
        assert learner.seen[0].kl == pytest.approx(expected)
