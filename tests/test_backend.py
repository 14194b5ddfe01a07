"""Gradients are exact sums over ranks and micro-batches at every ZeRO stage, and a save continues exactly.

AdamW's first step with a huge epsilon moves a parameter by -learning_rate * gradient / epsilon, so weights
after one step show every gradient; float64 autograd of plain Transformers gives the numbers to compare with.
"""

import math
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoModelForCausalLM

from actors import backend, heads
from actors.actor import Actor
from actors.backend import _schedule
from actors.training_state import NonFiniteStateError
from orchestrator.batch import Examples, Loss, Minibatch, PolicyOutput
from orchestrator.config import Model, Optimizer
from orchestrator.roles import Residency
from tests import tiny
from tests.ranks import Place, Ranks, alone

LENGTHS = [9, 4, 7, 3, 8, 5]
POISON = 16  # a last token that makes the loss infinite
PLAIN_STEP = {
    "learning_rate": 1e4,
    "eps": 1e4,
    "max_grad_norm": 1e9,
}  # moves a parameter by minus its gradient


@pytest.fixture(scope="module")
def two_ranks() -> Iterator[Ranks]:
    ranks = Ranks(2)
    yield ranks
    ranks.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("policy")
    tiny.save(folder, tiny.llama())
    return folder


def nll(policy: PolicyOutput, part: Examples) -> Loss:
    poison = (part.tokens == POISON).any(1, keepdim=True)
    return Loss(
        values=-policy.logprobs * torch.where(poison, math.inf, 1.0),
        metrics={"nll": -policy.logprobs.detach()},
    )


def minibatch(width: int = max(LENGTHS), *, poison: bool = False) -> Minibatch:
    """Six ragged rows, the first two tokens of each a prompt; weights 1 / number of trained tokens."""
    torch.manual_seed(3)
    tokens = torch.randint(1, POISON, (len(LENGTHS), max(LENGTHS)))
    tokens = torch.nn.functional.pad(tokens, (0, width - tokens.shape[1]), value=5)
    if poison:
        tokens[0, LENGTHS[0] - 1] = POISON
    columns = torch.arange(width)
    attended = columns < torch.tensor(LENGTHS)[:, None]
    trained = attended & (columns >= 2)
    examples = Examples(tokens=tokens, attention_mask=attended, action_mask=trained)
    return Minibatch(records=examples, rows=torch.arange(len(LENGTHS)), weights=trained / trained.sum())


def actor(
    place: Place,
    folder: Path,
    dtype: str,
    optimizer: dict,
    *,
    save_memory: bool = False,
    ema_decay: float | None = None,
) -> Actor:
    """On two ranks with buckets and shards that a tiny model fills several times over."""
    if place.world_size > 1:
        backend.GATHER_ELEMENTS, backend.REDUCE_ELEMENTS, backend.PERSISTENT_ELEMENTS = 600, 300, 0
        heads.LOGITS_KEPT, heads.LOGITS_PER_BLOCK = (0, tiny.VOCAB * 4) if save_memory else (2**25, 2**23)
    worker = Actor(
        model=Model(path=str(folder), dtype=dtype, gradient_checkpointing=save_memory),
        optimizer=Optimizer(**optimizer),
        total_steps=10,
        loss=nll,
        token_wise=save_memory,
        ema_decay=ema_decay,
    )
    worker.setup(place.rank, place.world_size, "127.0.0.1", place.port, threads=1, seed=0, timeout_s=60)
    return worker


def whole_weights(worker: Actor) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in worker.backend.named_full_parameters()}


def step_once(
    place: Place, folder: Path, stage: int, plan: list, width: int, save_memory: bool = False
) -> tuple[dict[str, float], dict[str, Tensor]]:
    worker = actor(place, folder, "float32", PLAIN_STEP | {"zero_stage": stage}, save_memory=save_memory)
    figures = worker.update(minibatch(width), plan[place.rank])
    return figures, whole_weights(worker)


def one_float64_step(folder: Path) -> tuple[float, float, dict[str, Tensor]]:
    """Loss, gradient norm and weights after the step: plain Transformers, and AdamW's formula at step one."""
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    whole = minibatch()
    examples = whole.records
    logits = plain(input_ids=examples.tokens, attention_mask=examples.attention_mask.long()).logits[:, :-1]
    logprobs = logits.log_softmax(-1).gather(-1, examples.tokens[:, 1:, None]).squeeze(-1)
    loss = -(logprobs * whole.weights[:, 1:].double()).sum()
    loss.backward()
    named = dict(plain.named_parameters())
    norm = math.sqrt(sum(p.grad.square().sum().item() for p in named.values()))
    after = {n: (p - 1e4 * p.grad / (p.grad.abs() + 1e4)).detach().float() for n, p in named.items()}
    return loss.item(), norm, after


@pytest.mark.parametrize(
    ("plan", "width"),
    [
        ([[0, 1, 2, 3, 4, 5]], 9),
        ([[0, 1, 2, 3, 4, 5]], 14),
        ([[5, 0], [], [3, 1], [4, 2]], 9),
        ([[0], [1], [2], [3], [4], [5]], 9),
    ],
)
def test_one_step_does_not_depend_on_micro_batches_or_padding(folder: Path, plan: list, width: int) -> None:
    """BUGS C1."""
    loss, norm, after = one_float64_step(folder)
    figures, weights = step_once(alone(), folder, 0, [plan], width)
    assert figures["loss"] == pytest.approx(loss, rel=1e-5)
    assert figures["nll"] == pytest.approx(loss, rel=1e-5)
    assert figures["grad_norm"] == pytest.approx(norm, rel=1e-5)
    assert figures["num_tokens"] == sum(LENGTHS) - 2 * len(LENGTHS)
    assert weights.keys() == after.keys()
    for name, tensor in weights.items():
        torch.testing.assert_close(tensor, after[name], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("save_memory", [False, True])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_two_ranks_step_like_one(two_ranks: Ranks, folder: Path, stage: int, save_memory: bool) -> None:
    """BUGS C4: rank 1 has 4 of the 24 tokens and one micro-batch without rows."""
    loss, norm, after = one_float64_step(folder)
    plan = [[[0], [2, 4], [1]], [[3], [], [5]]]
    for figures, weights in two_ranks(step_once, folder, stage, plan, 11, save_memory):
        assert figures["loss"] == pytest.approx(loss, rel=1e-5)
        assert figures["grad_norm"] == pytest.approx(norm, rel=1e-5)
        assert figures["num_tokens"] == sum(LENGTHS) - 2 * len(LENGTHS)
        for name, tensor in weights.items():
            torch.testing.assert_close(tensor, after[name], atol=1e-5, rtol=1e-5)


def norm_of_repeats(place: Place, folder: Path, stage: int, repeats: int) -> float:
    """The same row, whole weight each time, in ``repeats`` micro-batches on every rank."""
    worker = actor(place, folder, "bfloat16", PLAIN_STEP | {"zero_stage": stage})
    return worker.update(minibatch(), [[0]] * repeats)["grad_norm"]


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_bfloat16_gradients_are_summed_in_float32(two_ranks: Ranks, folder: Path, stage: int) -> None:
    """Sums of n equal bfloat16 gradients: n times one of them, which bfloat16 sums would round (by 1e-3 and
    more)."""
    one = norm_of_repeats(alone(), folder, stage, 1)
    assert norm_of_repeats(alone(), folder, stage, 7) == pytest.approx(7 * one, rel=1e-6)
    assert two_ranks(norm_of_repeats, folder, stage, 7) == pytest.approx([14 * one] * 2, rel=1e-6)


SCHEDULED = {
    "learning_rate": 1e-2,
    "schedule": "cosine",
    "warmup_steps": 2,
    "weight_decay": 0.1,
    "zero_stage": 0,
}


def resume(place: Place, folder: Path, dtype: str, stage: int, save_to: Path) -> bool:
    """Three steps, save, two more; against a fresh worker that loads and takes the two."""
    plan = [[0, 2], [4]] if place.rank == 0 else [[1, 3], [5]]
    first = actor(place, folder, dtype, SCHEDULED | {"zero_stage": stage})
    for _ in range(3):
        first.update(minibatch(), plan)
    first.save(save_to)
    dist.barrier()  # a rank reads the files of all
    expected = [first.update(minibatch(), plan) for _ in range(2)]
    second = actor(place, folder, dtype, SCHEDULED | {"zero_stage": stage})
    second.load(save_to)
    same_figures = [second.update(minibatch(), plan) for _ in range(2)] == expected
    weights = whole_weights(first)
    return same_figures and all(torch.equal(weights[n], t) for n, t in whole_weights(second).items())


def steps_with_naps(place: Place, folder: Path, dtype: str, stage: int) -> bool:
    """Two workers take the same steps; one leaves its device before each, and comes back."""
    plan = [[0, 2], [4]] if place.rank == 0 else [[1, 3], [5]]
    steady = actor(place, folder, dtype, SCHEDULED | {"zero_stage": stage})
    expected = [steady.update(minibatch(), plan) for _ in range(3)]
    sleeper = actor(place, folder, dtype, SCHEDULED | {"zero_stage": stage})
    figures = []
    for _ in range(3):
        for level in (Residency.WEIGHTS, Residency.ASLEEP, Residency.AWAKE):
            sleeper.reside(level)
        figures.append(sleeper.update(minibatch(), plan))
    sleeper.reside(Residency.WEIGHTS)  # enough for a sync and its probe
    weights = whole_weights(steady)
    same_weights = all(torch.equal(weights[n], t) for n, t in whole_weights(sleeper).items())
    return figures == expected and same_weights and sleeper.logprobs([1, 2, 3]) == steady.logprobs([1, 2, 3])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_sleep_changes_nothing(folder: Path, dtype: str) -> None:
    assert steps_with_naps(alone(), folder, dtype, 0)


@pytest.mark.parametrize(("dtype", "stage"), [("float32", 1), ("bfloat16", 2)])
def test_sleep_changes_nothing_on_two_ranks(two_ranks: Ranks, folder: Path, dtype: str, stage: int) -> None:
    assert two_ranks(steps_with_naps, folder, dtype, stage) == [True, True]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_training_resumes_bit_for_bit(folder: Path, dtype: str, tmp_path: Path) -> None:
    assert resume(alone(), folder, dtype, 0, tmp_path)


@pytest.mark.parametrize(
    ("dtype", "stage"), [("float32", 0), ("float32", 1), ("float32", 3), ("bfloat16", 2), ("bfloat16", 3)]
)
def test_training_resumes_bit_for_bit_on_two_ranks(
    two_ranks: Ranks, folder: Path, dtype: str, stage: int, tmp_path: Path
) -> None:
    assert two_ranks(resume, folder, dtype, stage, tmp_path) == [True, True]


def save_after_three(place: Place, folder: Path, stage: int, to: Path) -> tuple[dict, dict]:
    """Whole weights at the save, and one step later."""
    worker = actor(place, folder, "float32", SCHEDULED | {"zero_stage": stage}, ema_decay=0.5)
    plan = [[0, 2, 4, 1, 3, 5]] if place.world_size == 1 else [[[0, 2], [4]], [[1, 3], [5]]][place.rank]
    for _ in range(3):
        worker.update(minibatch(), plan)
    worker.save(to, True)  # beside the next step, which must not show in it
    saved = whole_weights(worker)
    worker.update(minibatch(), plan)
    assert worker.saved(True)
    return saved, whole_weights(worker)


def load_and_step(place: Place, folder: Path, stage: int, saved: Path) -> tuple[dict, dict]:
    worker = actor(place, folder, "float32", SCHEDULED | {"zero_stage": stage}, ema_decay=0.5)
    worker.load(saved)
    loaded = whole_weights(worker)
    plan = [[0, 2, 4, 1, 3, 5]] if place.world_size == 1 else [[[0, 2], [4]], [[1, 3], [5]]][place.rank]
    worker.update(minibatch(), plan)
    return loaded, whole_weights(worker)


@pytest.mark.parametrize(("before", "after"), [(3, 0), (0, 3), (1, 0), (0, 2)])
def test_a_save_loads_on_other_ranks_and_stages(
    two_ranks: Ranks, folder: Path, before: int, after: int, tmp_path: Path
) -> None:
    """Two ranks to one or back: the weights bit for bit, and the step after, which reads the moments."""
    if after == 0:
        saved, next_ = two_ranks(save_after_three, folder, before, tmp_path)[0]
        loaded, stepped = load_and_step(alone(), folder, after, tmp_path)
    else:
        saved, next_ = save_after_three(alone(), folder, before, tmp_path)
        loaded, stepped = two_ranks(load_and_step, folder, after, tmp_path)[1]
    assert saved.keys() == loaded.keys() and len(saved) > 10
    assert all(torch.equal(saved[name], tensor) for name, tensor in loaded.items())
    for name, tensor in stepped.items():
        assert not torch.equal(tensor, saved[name])
        torch.testing.assert_close(tensor, next_[name], atol=2e-6, rtol=1e-5)


def test_what_is_being_saved_does_not_move_with_the_next_step(folder: Path) -> None:
    """BUGS E5: weights, moments and the average."""
    worker = actor(alone(), folder, "float32", SCHEDULED, ema_decay=0.5)
    worker.update(minibatch(), [[0, 2, 4, 1, 3, 5]])
    tensors = worker.backend.snapshot().tensors
    at_the_save = {name: tensor.clone() for name, tensor in tensors.items()}
    worker.update(minibatch(), [[0, 2, 4, 1, 3, 5]])
    assert all(torch.equal(tensors[name], tensor) for name, tensor in at_the_save.items())
    later = worker.backend.snapshot().tensors
    moved = {name.split(":")[0] for name in tensors if not torch.equal(later[name], tensors[name])}
    assert moved >= {"weight", "exp_avg", "exp_avg_sq", "average"}


def test_a_state_that_is_not_finite_is_not_saved(folder: Path, tmp_path: Path) -> None:
    worker = actor(alone(), folder, "float32", SCHEDULED)
    with torch.no_grad():
        next(worker.backend.engine.module.parameters())[3] = math.nan
    with pytest.raises(NonFiniteStateError, match=r"weight of .* is not finite: it is not saved"):
        worker.save(tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_generators_of_a_rank_go_on_where_they_were(folder: Path, tmp_path: Path) -> None:
    """BUGS E5: torch's and Python's."""
    worker = actor(alone(), folder, "float32", SCHEDULED)
    worker.save(tmp_path)
    drawn = torch.rand(3), random.random()
    assert not torch.equal(drawn[0], torch.rand(3))
    worker.load(tmp_path)
    again = torch.rand(3), random.random()
    assert torch.equal(drawn[0], again[0]) and drawn[1] == again[1]


def test_a_folder_without_state_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no training state"):
        actor(alone(), folder, "float32", SCHEDULED).load(tmp_path)


def survive(place: Place, folder: Path, dtype: str, stage: int) -> tuple[float, bool, bool]:
    """skipped_steps of a poisoned step; whether it left the weights alone; whether the next one trains."""
    worker = actor(place, folder, dtype, {"learning_rate": 1e-2, "zero_stage": stage})
    plan = [[0, 2], [4]] if place.rank == 0 else [[1, 3], [5]]
    before = whole_weights(worker)
    skipped = worker.update(minibatch(poison=True), plan)["skipped_steps"]
    untouched = all(torch.equal(before[n], t) for n, t in whole_weights(worker).items())
    applied = worker.update(minibatch(), plan)["skipped_steps"] == 0.0
    moved = all(
        not torch.equal(before[n], t) and t.isfinite().all() for n, t in whole_weights(worker).items()
    )
    return skipped, untouched, applied and moved


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_gradient_that_is_not_finite_skips_one_step(folder: Path, dtype: str) -> None:
    assert survive(alone(), folder, dtype, 0) == (1.0, True, True)


@pytest.mark.parametrize(
    ("dtype", "stage"),
    [("float32", 0), ("float32", 1), ("float32", 2), ("float32", 3), ("bfloat16", 2), ("bfloat16", 3)],
)
def test_a_gradient_that_is_not_finite_skips_one_step_on_all_ranks(
    two_ranks: Ranks, folder: Path, dtype: str, stage: int
) -> None:
    assert two_ranks(survive, folder, dtype, stage) == [(1.0, True, True)] * 2


def lose_finitely(place: Place, folder: Path, stage: int) -> tuple[float, bool]:
    """skipped_steps where the loss of one row is infinite and every gradient finite; weights untouched."""
    worker = actor(place, folder, "float32", {"learning_rate": 1e-2, "zero_stage": stage})
    plain = worker.loss

    def infinite(policy: PolicyOutput, part: Examples) -> Loss:
        loss = plain(policy, part)
        poison = (part.tokens == POISON).any(1, keepdim=True)
        return replace(loss, values=-policy.logprobs + torch.where(poison, math.inf, 0.0))

    worker.loss = infinite
    before = whole_weights(worker)
    plan = [[0, 2], [4]] if place.rank == 0 else [[1, 3], [5]]
    skipped = worker.update(minibatch(poison=True), plan)["skipped_steps"]
    return skipped, all(torch.equal(before[n], t) for n, t in whole_weights(worker).items())


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_loss_that_is_not_finite_skips_the_step_though_its_gradient_is(
    two_ranks: Ranks, folder: Path, stage: int
) -> None:
    """Rank 1 does not have the row."""
    assert two_ranks(lose_finitely, folder, stage) == [(1.0, True)] * 2


def refuse_to_send(place: Place, folder: Path, stage: int) -> str:
    worker = actor(place, folder, "float32", {"learning_rate": 1e-2, "zero_stage": stage})
    worker.backend.check_finite()
    if place.rank == 1:
        parameter = list(worker.backend.engine.module.parameters())[2]
        getattr(parameter, "ds_tensor", parameter).data.view(-1)[0] = math.nan
    with pytest.raises(NonFiniteStateError) as error:
        worker.backend.check_finite()
    return str(error.value)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_weight_that_is_not_finite_is_sent_by_no_rank(two_ranks: Ranks, folder: Path, stage: int) -> None:
    answers = two_ranks(refuse_to_send, folder, stage)
    assert answers == ["a weight is NaN or infinite: nothing is sent to the engines"] * 2


def test_small_learning_rates_move_bfloat16_weights_as_far_as_float32(tmp_path: Path) -> None:
    """BUGS C7: 50 steps at 1e-6; the weights whose bfloat16 value changed, against a float32 run cast at the
    end."""
    base = tiny.build(tiny.llama(hidden=32)).bfloat16()
    base.save_pretrained(tmp_path)
    before = {name: tensor.detach() for name, tensor in base.named_parameters()}

    def moved(dtype: str) -> float:
        worker = actor(alone(), tmp_path, dtype, {"learning_rate": 1e-6, "zero_stage": 2})
        for _ in range(50):
            worker.update(minibatch(), [[0, 1, 2, 3, 4, 5]])
        after = whole_weights(worker)
        changed = sum(int((after[n].bfloat16() != t).sum()) for n, t in before.items())
        return changed / sum(t.numel() for t in before.values())

    in_float32 = moved("float32")
    assert in_float32 > 0.02
    assert moved("bfloat16") == pytest.approx(in_float32, abs=0.01)


def export(place: Place, folder: Path, stage: int, to: Path) -> dict[str, Tensor]:
    worker = actor(place, folder, "float32", PLAIN_STEP | {"zero_stage": stage})
    worker.update(minibatch(), [[[0, 1, 2]], [[3, 4, 5]]][place.rank])
    worker.export(to)
    return whole_weights(worker)


def test_sharded_weights_export_whole(two_ranks: Ranks, folder: Path, tmp_path: Path) -> None:
    weights = two_ranks(export, folder, 3, tmp_path)[1]
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    for name, tensor in reloaded.named_parameters():
        assert torch.equal(tensor, weights[name])
    assert reloaded.lm_head.weight is reloaded.model.embed_tokens.weight


def clipped_step(place: Place, folder: Path, stage: int) -> tuple[dict[str, float], dict[str, Tensor]]:
    worker = actor(place, folder, "float32", PLAIN_STEP | {"zero_stage": stage, "max_grad_norm": 0.25})
    plan = [[0, 2, 4, 1, 3, 5]] if place.world_size == 1 else [[[0, 2], [4]], [[1, 3], [5]]][place.rank]
    return worker.update(minibatch(), plan), whole_weights(worker)


@pytest.mark.parametrize("stage", [None, 0, 2])
def test_gradients_are_scaled_down_to_the_largest_norm(
    two_ranks: Ranks, folder: Path, stage: int | None
) -> None:
    """One rank, then two: a plain step is by minus the gradient, so a clipped one is so much shorter."""
    _, norm, after = one_float64_step(folder)
    before = dict(AutoModelForCausalLM.from_pretrained(folder).named_parameters())
    answers = [clipped_step(alone(), folder, 0)] if stage is None else two_ranks(clipped_step, folder, stage)
    for figures, weights in answers:
        assert figures["grad_norm"] == pytest.approx(norm, rel=1e-4) and norm > 0.5
        for name, tensor in weights.items():
            expected = before[name].detach() + (after[name] - before[name].detach()) * 0.25 / norm
            torch.testing.assert_close(tensor, expected, atol=2e-5, rtol=1e-3)


def test_learning_rate_schedules() -> None:
    def rates(schedule: str) -> list[float]:
        settings = Optimizer(schedule=schedule, warmup_steps=2)
        return [round(_schedule(settings, step, 6), 6) for step in range(7)]

    assert rates("constant") == [0.5, 1, 1, 1, 1, 1, 1]
    assert rates("linear") == [0.5, 1, 1, 0.75, 0.5, 0.25, 0]
    assert rates("cosine") == [0.5, 1, 1, 0.853553, 0.5, 0.146447, 0]


def test_weight_decay_spares_vectors(folder: Path) -> None:
    """A step at gradient 0 (no row has weight) multiplies matrices by 1 - 0.1 * 0.5 and leaves norms
    alone."""
    worker = actor(alone(), folder, "float32", {"learning_rate": 0.1, "weight_decay": 0.5})
    before = whole_weights(worker)
    worker.update(minibatch(), [[]])
    for name, tensor in whole_weights(worker).items():
        torch.testing.assert_close(tensor, before[name] * (0.95 if tensor.dim() == 2 else 1.0))
