"""Muon, the average of the weights and the schedule, at every ZeRO stage, against formulas in float64."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoModelForCausalLM

from actors.actor import Actor
from orchestrator.config import Optimizer
from tests import tiny
from tests.ranks import Place, Ranks, alone
from tests.test_backend import actor, minibatch, whole_weights

MUON = {"name": "muon", "learning_rate": 0.02, "adam_learning_rate": 0.003, "weight_decay": 0.1}
MUON |= {"betas": (0.9, 0.95), "eps": 1e-12, "momentum": 0.95, "max_grad_norm": 1e9}
PLANS = [[[0, 2], [4]], [[1, 3], [5]]]  # micro-batches of two ranks
WHOLE = [[[0, 1, 2, 3, 4, 5]]]
EVERY_STAGE = pytest.mark.parametrize("stage", [0, 1, 2, 3])


@pytest.fixture(scope="module")
def two_ranks() -> Iterator[Ranks]:
    ranks = Ranks(2)
    yield ranks
    ranks.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("policy")
    tiny.save(folder, tiny.llama(tied=False))
    return folder


def gradients(folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights and gradients of the minibatch by plain Transformers, float64."""
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    whole = minibatch()
    logits = plain(input_ids=whole.records.tokens).logits[:, :-1]
    logprobs = logits.log_softmax(-1).gather(-1, whole.records.tokens[:, 1:, None]).squeeze(-1)
    (-(logprobs * whole.weights[:, 1:].double()).sum()).backward()
    named = dict(plain.named_parameters())
    return {n: p.detach() for n, p in named.items()}, {n: p.grad for n, p in named.items()}


def by_svd(gradient: Tensor) -> Tensor:
    """Muon's update from the singular values: the quintic acts on each of them alone."""
    u, s, v = torch.linalg.svd(gradient, full_matrices=False)
    s = s / s.square().sum().sqrt()
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return 0.2 * max(gradient.shape) ** 0.5 * (u * s) @ v


def one_muon_step(folder: Path) -> dict[str, Tensor]:
    """At step one both momenta point along the gradient, so AdamW's update is its sign."""
    after = {}
    weights, gradient = gradients(folder)
    for name, weight in weights.items():
        inner = weight.dim() == 2 and "embed" not in name and "lm_head" not in name
        decay = 0.1 if weight.dim() == 2 else 0.0
        rate = 0.02 if inner else 0.003
        update = by_svd(gradient[name]) if inner else gradient[name].sign()
        after[name] = (weight * (1 - rate * decay) - rate * update).float()
    return after


def step_once(place: Place, folder: Path, optimizer: dict, plans: list) -> tuple[dict, dict, list]:
    worker = actor(place, folder, "float32", optimizer)
    figures = worker.update(minibatch(), plans[place.rank])
    rates = [(group["muon"], group["lr"]) for group in worker.backend.optimizer.param_groups]
    return whole_weights(worker), figures, rates


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor], absolute: float = 2e-5) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(
            tensor, theirs[name], atol=absolute, rtol=1e-4, msg=lambda m, n=name: n + m
        )


@EVERY_STAGE
def test_muon_steps_alike_at_every_stage(two_ranks: Ranks, folder: Path, stage: int) -> None:
    """Groups keep their own learning rates (BUGS C9), read back and seen in the weights."""
    for weights, _, rates in two_ranks(step_once, folder, MUON | {"zero_stage": stage}, PLANS):
        same(weights, one_muon_step(folder))
        assert rates == [(True, 0.02), (False, 0.003), (False, 0.003)]


def test_muon_steps_alike_alone(folder: Path) -> None:
    weights, figures, _ = step_once(alone(), folder, MUON, WHOLE)
    same(weights, one_muon_step(folder))
    assert figures["learning_rate"] == 0.02


@EVERY_STAGE
def test_gradients_are_clipped_before_they_are_made_orthogonal(
    two_ranks: Ranks, folder: Path, stage: int
) -> None:
    """A clip scales the gradient, and an orthogonal update has no scale: the step is as long as without."""
    clipped = MUON | {"zero_stage": stage, "max_grad_norm": 0.05}
    for weights, figures, _ in two_ranks(step_once, folder, clipped, PLANS):
        assert figures["grad_norm"] > 1  # so the clip is at work
        same(weights, one_muon_step(folder), absolute=1e-4)


def resume_muon(place: Place, folder: Path, dtype: str, stage: int, to: Path) -> bool:
    """Two steps, save, one more; against a fresh worker that loads and takes the one. With an average."""
    first, second = (averaging(place, folder, dtype, stage) for _ in range(2))
    for _ in range(2):
        first.update(minibatch(), PLANS[place.rank])
    first.save(to)
    dist.barrier()  # a rank reads the files of all
    second.load(to)
    for worker in (first, second):
        worker.update(minibatch(), PLANS[place.rank])
    weights, averages = whole_weights(first), averages_of(first)
    return all(torch.equal(weights[n], t) for n, t in whole_weights(second).items()) and all(
        torch.equal(averages[n], t) for n, t in averages_of(second).items()
    )


@pytest.mark.parametrize(
    ("dtype", "stage"), [("float32", 0), ("float32", 1), ("float32", 3), ("bfloat16", 2), ("bfloat16", 3)]
)
def test_muon_and_the_average_resume_bit_for_bit(
    two_ranks: Ranks, folder: Path, dtype: str, stage: int, tmp_path: Path
) -> None:
    assert two_ranks(resume_muon, folder, dtype, stage, tmp_path) == [True, True]


def averaging(place: Place, folder: Path, dtype: str, stage: int) -> Actor:
    return actor(place, folder, dtype, MUON | {"zero_stage": stage}, ema_decay=0.7)


def averages_of(worker: Actor) -> dict[str, Tensor]:
    names = {id(p): name for name, p in worker.backend.engine.module.model.named_parameters()}
    return {names[id(p)]: tensor.clone() for p, tensor in worker.backend.average.whole()}


def average_three(
    place: Place, folder: Path, stage: int, to: Path
) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
    """Weights before the first and after each of three steps, the second of them skipped; the average."""
    worker = averaging(place, folder, "float32", stage)
    seen = [whole_weights(worker)]
    for poison in (False, True, False):
        worker.update(minibatch(poison=poison), PLANS[place.rank])
        seen.append(whole_weights(worker))
    worker.export(to, averaged=True)
    return seen, averages_of(worker)


@EVERY_STAGE
def test_the_average_follows_the_steps_taken_and_exports_whole(
    two_ranks: Ranks, folder: Path, stage: int, tmp_path: Path
) -> None:
    """0.7 of the old and 0.3 of the new, twice: 0.49 w0 + 0.21 w1 + 0.3 w3."""
    seen, average = two_ranks(average_three, folder, stage, tmp_path)[1]
    expected = {
        n: (0.49 * w.double() + 0.21 * seen[1][n].double() + 0.3 * seen[3][n].double()).float()
        for n, w in seen[0].items()
    }
    same(average, expected, absolute=1e-6)
    exported = dict(AutoModelForCausalLM.from_pretrained(tmp_path).named_parameters())
    same({name: p.detach() for name, p in exported.items()}, expected, absolute=1e-6)


def test_a_checkpoint_without_an_average_is_refused_where_one_is_kept(folder: Path, tmp_path: Path) -> None:
    actor(alone(), folder, "float32", MUON).save(tmp_path)
    with pytest.raises(ValueError, match=r"holds no moving average: .* without rl\.ema_decay"):
        averaging(alone(), folder, "float32", 0).load(tmp_path)


def test_a_skipped_step_moves_no_schedule_and_the_last_step_has_the_last_rate(folder: Path) -> None:
    """Five calls, the second skipped: it would have had 4/5; from then on it is a line of four, 1, 3/4, 2/4,
    1/4, whose last rung is the last call's."""
    worker = actor(alone(), folder, "float32", {"learning_rate": 1.0, "schedule": "linear", "zero_stage": 0})
    worker.backend.total_steps = 5
    worker.backend.optimizer.param_groups[0]["peak"] = 1.0
    rates = [
        worker.update(minibatch(poison=poison), WHOLE[0])["learning_rate"]
        for poison in (False, True, False, False, False)
    ]
    assert rates == pytest.approx([1, 4 / 5, 3 / 4, 2 / 4, 1 / 4])


def test_a_rate_for_adam_is_refused_without_muon() -> None:
    with pytest.raises(ValueError, match=r"adam_learning_rate=0\.1 is for name=muon"):
        Optimizer(adam_learning_rate=0.1)
