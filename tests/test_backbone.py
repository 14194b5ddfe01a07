"""One base in four roles says what four workers say that have the same weights."""

import asyncio
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from actors.backbone import Backbone
from actors.backbone_group import Meeting, figures_of
from actors.critic import Critic
from actors.errors import RoleError
from actors.group import LearnerGroup
from actors.reference import Reference
from actors.reward import Judge, RewardLearner
from orchestrator.batch import Examples, Loss, PolicyOutput
from orchestrator.collate import collate_examples
from orchestrator.config import Adapter, Model, Optimizer, Run
from orchestrator.examples import Unit
from tests import tiny
from tests.test_workers import (
    OPTIMIZER,
    batch,
    bradley_terry,
    experience,
    make_actor,
    minibatch,
    policy_gradient,
    ready,
    squared_error,
)

ADAPTER = Adapter(rank=4)
PLAIN_STEP = Optimizer(learning_rate=1e8, eps=1e8, max_grad_norm=1e9)  # moves by -gradient
PAIR = ([3, 9, 4, 7], [3, 9, 5])


@pytest.fixture(scope="module", params=[tiny.llama, tiny.gpt2], ids=["llama", "gpt2"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    path = tiny.save(tmp_path_factory.mktemp("base"), request.param())
    return Model(path=path, dtype="float32", adapter=ADAPTER)


def pairs() -> Examples:
    return collate_examples([Unit(rows=((tuple(t), (True,) * len(t)),)) for t in PAIR], pad_id=0)


def backbone(model: Model, *, reward: str | None = None, optimizer: Optimizer = OPTIMIZER,
             value_coef: float | None = 0.1, temperature: float = 0.7) -> Backbone:  # fmt: skip
    return ready(
        Backbone(
            model=model, optimizer=optimizer, total_steps=10, loss=policy_gradient,
            value_loss=None if value_coef is None else squared_error, value_coef=value_coef or 1.0,
            head_rate=None, reward_adapter=reward, reward_model=None, functions={}, temperature=temperature,
        )
    )  # fmt: skip


def test_every_role_says_what_its_own_worker_says(base: Model, tmp_path: Path) -> None:
    """After training, so that every adapter and head differs from where it began."""
    learner = ready(RewardLearner(model=base, optimizer=OPTIMIZER, total_steps=9, loss=bradley_terry))
    for _ in range(5):
        learner.update(minibatch(pairs(), torch.full((2,), 0.5)), [[0, 1]])
    learner.export(tmp_path / "reward")
    worker = backbone(base, reward=str(tmp_path / "reward_adapter"))
    for _ in range(3):
        figures = worker.update(minibatch(experience(torch.ones(3, 6))), [[0], [1, 2]])
    assert {"actor/ratio", "critic/value", "actor/loss", "critic/loss"} <= set(figures)
    worker.export(tmp_path / "actor")
    plan = [[1, 2], [], [0]]

    def alone(path: str | Path) -> Model:
        return base.frozen().model_copy(update={"path": str(path)})

    def equal(ours: Tensor, theirs: Tensor) -> None:
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=0)

    reference = ready(Reference(model=alone(base.path), temperature=0.7))
    equal(worker.score_reference(batch(), plan), reference.score(batch(), plan))
    equal(worker.reference_distributions(batch(), plan), reference.distributions(batch(), plan))
    actor = make_actor(alone(tmp_path / "actor"), temperature=0.7)
    equal(worker.score(batch(), plan), actor.score(batch(), plan))
    assert (worker.score(batch(), plan) - worker.score_reference(batch(), plan)).abs().max() > 0.05

    judge = ready(Judge(model=alone(tmp_path / "reward"), functions={}, micro_batch_tokens=64))
    said = worker.score_rewards(pairs(), [[0, 1]]).tolist()
    assert said == pytest.approx(judge.score([list(tokens) for tokens in PAIR]), abs=2e-5)
    assert said[0] > said[1] + 0.1

    whole = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "actor", num_labels=1, pad_token_id=0
    )
    whole.score.weight.data.copy_(worker.backend.engine.module.value.weight)
    whole.save_pretrained(tmp_path / "critic")
    critic = ready(
        Critic(model=alone(tmp_path / "critic"), optimizer=OPTIMIZER, total_steps=9, loss=squared_error)
    )
    equal(worker.score_values(batch(), plan), critic.score(batch(), plan))
    assert worker.score_values(batch(), plan).abs().max() > 1e-3


def test_only_the_actors_adapter_and_the_value_head_are_trained(base: Model, tmp_path: Path) -> None:
    learner = ready(RewardLearner(model=base, optimizer=OPTIMIZER, total_steps=9, loss=bradley_terry))
    learner.export(tmp_path / "reward")
    worker = backbone(base, reward=str(tmp_path / "reward_adapter"))
    named = dict(worker.backend.engine.module.named_parameters())
    before = {name: tensor.detach().clone() for name, tensor in named.items()}
    for _ in range(2):
        worker.update(minibatch(experience(torch.ones(3, 6))), [[0, 1, 2]])
    moved = {name for name, tensor in named.items() if not torch.equal(tensor, before[name])}
    assert moved == {name for name in named if name == "value.weight" or ".default" in name}
    assert any(".reward." in name for name in named)

    worker.save(tmp_path / "state")
    other = backbone(base, reward=str(tmp_path / "reward_adapter"))
    other.load(tmp_path / "state")
    scores = [[w.score(batch(), [[0, 1, 2]]), w.score_values(batch(), [[0, 1, 2]])] for w in (worker, other)]
    assert all(torch.equal(a, b) for a, b in zip(*scores, strict=True))


def test_the_joint_gradient_is_that_of_both_losses(base: Model) -> None:
    """Moves of the adapter: policy's + 0.1 x value's, from three workers that differ in the losses only."""

    def move(value_coef: float | None, loss: object) -> dict[str, Tensor]:
        worker = backbone(base, optimizer=PLAIN_STEP, value_coef=value_coef, temperature=1.0)
        if value_coef is None:
            worker.loss = loss
        else:
            with torch.no_grad():  # a head of 0 sends no gradient on
                worker.backend.engine.module.value.weight.copy_(torch.linspace(-1, 1, 16)[None])
        named = {n: p for n, p in worker.backend.engine.module.named_parameters() if ".lora_B" in n}
        before = {n: p.detach().clone() for n, p in named.items()}
        worker.update(minibatch(experience(torch.full((3, 6), 0.5))), [[0], [1, 2]])
        return {n: p.detach() - before[n] for n, p in named.items()}

    policy, joint, more = move(None, policy_gradient), move(0.1, None), move(1.1, None)
    for name, delta in joint.items():
        value = more[name] - delta  # once the value loss's
        torch.testing.assert_close(delta, policy[name] + 0.1 * value, atol=1e-5, rtol=1e-3)
    assert max(float((more[n] - joint[n]).abs().max()) for n in joint) > 1e-3


def test_the_joint_loss_is_worked_by_hand() -> None:
    from actors.backbone import joint_loss

    def policy_loss(policy: PolicyOutput, part: object) -> Loss:
        return Loss(values=policy.logprobs * 2, metrics={"ratio": torch.tensor([[1.0]])})

    def value_loss(values: Tensor, part: object) -> Loss:
        return Loss(values=values - 1, metrics={"ratio": torch.tensor([[9.0]])})

    policy = PolicyOutput(logprobs=torch.tensor([[-3.0]]), entropy=None, distribution=None)
    loss = joint_loss(policy_loss, value_loss, 0.5, (policy, torch.tensor([[5.0]])), None)
    assert loss.values.item() == -6 + 0.5 * 4
    assert {name: metric.item() for name, metric in loss.metrics.items()} == {
        "actor/loss": -6.0, "critic/loss": 4.0, "actor/ratio": 1.0, "critic/ratio": 9.0,
    }  # fmt: skip


class Host:
    """Answers every joint update with the same figures."""

    workers = (SimpleNamespace(deadlines=SimpleNamespace(call_s=0.2)),)


FIGURES = {"loss": 1.4, "grad_norm": 2.0, "actor/loss": 1.0, "critic/loss": 4.0}


async def test_actor_and_critic_meet_in_one_update(monkeypatch: pytest.MonkeyPatch) -> None:
    updates = []

    async def update(host: object, records: object) -> dict[str, float]:
        updates.append(records)
        return FIGURES

    monkeypatch.setattr(LearnerGroup, "update", update)
    meeting, first, second = Meeting(Host()), object(), object()
    for records in (first, second):
        answers = await asyncio.gather(meeting.update("actor", records), meeting.update("critic", records))
        assert answers == [{"loss": 1.0, "grad_norm": 2.0}, {"loss": 4.0, "grad_norm": 2.0}]
    assert updates == [first, second]
    outcomes = await asyncio.gather(
        meeting.update("actor", first), meeting.update("critic", second), return_exceptions=True
    )
    assert [type(outcome) for outcome in outcomes] == [RoleError, RoleError]
    with pytest.raises(RoleError, match="no update from the other"):
        await meeting.update("actor", first)
    assert figures_of("critic", FIGURES) == {"loss": 4.0, "grad_norm": 2.0}


LORA = {"path": "x", "adapter": {}}
RL = {"rl": {}, "placement": {"backbone": "shared"}}
FUNCTION = {"reward": {"function": "exact_match"}}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": {"path": "x"}, "roles": FUNCTION}, "roles.actor.adapter.kind=none: the base must stay"),
        ({"model": LORA, "roles": FUNCTION, "rl": {"critic_warmup": 2}}, "rl.critic_warmup=2"),
        ({"model": LORA, "roles": {**FUNCTION, "reference": {"model": "y"}}}, "roles.reference.model='y'"),
        ({"model": LORA, "roles": {**FUNCTION, "critic": {"adapter": {}}}}, "a head on the actor's adapter"),
        ({"model": LORA, "reward_model": {"adapter": {"kind": "none"}}}, "reward_model.adapter.kind=none"),
        ({"model": LORA, "reward_model": {}, "preference": {}}, "before the preference stage"),
    ],
)
def test_what_a_shared_backbone_cannot_carry_is_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Run(**{**RL, **settings})
