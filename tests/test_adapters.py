"""Every kind of adapter in a worker: trained, sent, exported, resumed as what PEFT makes of the same tensors.

PEFT's own models, loaded from the folders that the workers write, are what the numbers are compared with.
"""

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from actors.actor import Actor
from actors.adalora import RankSchedule
from actors.adapter import adapt, freeze, peft_config
from actors.model import PolicyModel
from actors.reward import Judge, RewardLearner
from launch import cli
from launch.prepare import load_tokenizer
from launch.trainable import check_trainable
from orchestrator.batch import Examples
from orchestrator.config import Adapter, Model, Run
from orchestrator.plan.memory import trained_params
from orchestrator.plan.shapes import Shape
from tests import tiny
from tests.models import tiny_model
from tests.ranks import Place, Ranks
from tests.test_workers import (
    OPTIMIZER,
    batch,
    bradley_terry,
    columns,
    experience,
    minibatch,
    policy_gradient,
    ready,
    weights_of,
)

MERGED = ("lora", "dora", "adalora")
BESIDE = ("prefix", "prompt", "p_tuning")
ARCHITECTURES = {"llama": tiny.llama(), "gpt2": tiny.gpt2()}  # nn.Linear, tied and rotary; Conv1D, [in, out]


@pytest.fixture(scope="module", params=list(ARCHITECTURES))
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny.save(tmp_path_factory.mktemp(request.param), ARCHITECTURES[request.param])


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny.save(tmp_path_factory.mktemp("llama"), tiny.llama())


def actor(path: str, kind: str, **settings: object) -> Actor:
    adapter = Adapter(kind=kind, rank=4, initial_rank=6, virtual_tokens=5)
    model = Model(path=path, dtype="float32", adapter=adapter)
    return ready(Actor(model=model, optimizer=OPTIMIZER, total_steps=10, loss=policy_gradient, **settings))


def step(worker: Actor) -> dict[str, float]:
    return worker.update(minibatch(experience(torch.ones(3, 6))), [[0], [1, 2]])


def scores(worker: Actor) -> Tensor:
    return worker.score(batch(), [[0, 1, 2]])


@torch.no_grad()
def plainly(model: torch.nn.Module) -> Tensor:
    """Log-probs of the actions by a model of Transformers or PEFT."""
    given = columns()
    model.eval()
    logits = model(input_ids=given["tokens"], attention_mask=given["attention_mask"].long()).logits
    every = logits[:, -given["tokens"].shape[1] :].log_softmax(-1)[:, :-1]  # virtual tokens come before
    logprobs = torch.zeros(given["tokens"].shape)
    logprobs[:, 1:] = every.gather(-1, given["tokens"][:, 1:, None]).squeeze(-1)
    return logprobs.where(given["action_mask"], 0.0)


@pytest.mark.parametrize("kind", MERGED)
def test_what_is_exported_and_sent_is_the_adapter_merged(path: str, kind: str, tmp_path: Path) -> None:
    worker = actor(path, kind)
    base = AutoModelForCausalLM.from_pretrained(path)
    if kind != "adalora":  # which starts with random singular vectors, and values of 0
        torch.testing.assert_close(scores(worker), plainly(base), atol=1e-5, rtol=0)
    kept = {n: p.clone() for n, p in worker.backend.engine.module.named_parameters() if not p.requires_grad}
    for _ in range(3):
        step(worker)
    after = scores(worker)
    assert (after - plainly(base)).abs().max() > 0.01
    worker.export(tmp_path / "model")

    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    torch.testing.assert_close(plainly(merged), after, atol=1e-5, rtol=0)
    theirs = PeftModel.from_pretrained(base, tmp_path / "model_adapter")
    torch.testing.assert_close(plainly(theirs), after, atol=1e-6, rtol=0)

    sent = weights_of(worker)
    assert worker.backend.parameter_shapes() == [(n, tuple(p.shape)) for n, p in merged.named_parameters()]
    assert all(torch.equal(sent[name], p) for name, p in merged.named_parameters())
    now = dict(worker.backend.engine.module.named_parameters())
    assert all(torch.equal(now[name], tensor) for name, tensor in kept.items())  # nothing is merged in place


@pytest.mark.parametrize("kind", BESIDE)
def test_virtual_tokens_are_those_of_peft(path: str, kind: str, tmp_path: Path) -> None:
    worker = actor(path, kind)
    before = scores(worker)
    for _ in range(3):
        step(worker)
    after = scores(worker)
    assert (after - before).abs().max() > 0.01
    worker.export(tmp_path)
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(path), tmp_path)
    torch.testing.assert_close(plainly(theirs), after, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", MERGED + BESIDE)
def test_checkpoints_hold_only_what_is_trained_and_resume_bit_for_bit(
    llama: str, kind: str, tmp_path: Path
) -> None:
    first = actor(llama, kind)
    for _ in range(3):
        step(first)
    first.save(tmp_path)
    second = actor(llama, kind)
    second.load(tmp_path)
    assert [step(first) for _ in range(3)] == [step(second) for _ in range(3)]
    assert torch.equal(scores(first), scores(second))

    trained = {n: p for n, p in first.backend.engine.module.named_parameters() if p.requires_grad}
    saved = load_file(tmp_path / "rank-00000.safetensors")
    # Not the base, and not the second name of its tied embedding. PEFT's ranknum is a buffer in all but name.
    assert {key.removeprefix("weight:0:") for key in saved if key.startswith("weight:")} == set(trained)
    moments = [tensor.numel() for key, tensor in saved.items() if key.startswith("exp_avg:")]
    assert sum(moments) == sum(p.numel() for p in trained.values())


def test_a_checkpoint_of_other_tensors_is_refused(llama: str, tmp_path: Path) -> None:
    actor(llama, "lora").save(tmp_path)
    with pytest.raises(ValueError, match="the checkpoint is of other models or optimizers"):
        actor(llama, "prompt").load(tmp_path)


def test_the_exported_average_is_that_of_the_adapter(llama: str, tmp_path: Path) -> None:
    """A and B are averaged (0.5 each), then merged: not the average of merged weights."""
    worker = actor(llama, "lora", ema_decay=0.5)
    name = "model.layers.0.self_attn.q_proj"
    layer = worker.backend.engine.module.model.get_submodule(name)
    parts = [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    before = [p.detach().clone() for p in parts]
    step(worker)
    a, b = (0.5 * old + 0.5 * p.detach() for old, p in zip(before, parts, strict=True))
    by_hand = layer.base_layer.weight + 16 / 4 * b @ a
    worker.export(tmp_path, averaged=True)
    exported = AutoModelForCausalLM.from_pretrained(tmp_path).get_submodule(name).weight
    torch.testing.assert_close(exported, by_hand, atol=1e-6, rtol=0)


def test_a_reward_model_of_lora_trains_its_head_too(llama: str, tmp_path: Path) -> None:
    model = Model(path=llama, dtype="float32", adapter=Adapter(rank=4))
    learner = ready(RewardLearner(model=model, optimizer=OPTIMIZER, total_steps=20, loss=bradley_terry))
    chosen, rejected = [3, 9, 4, 7], [3, 9, 5]
    examples = Examples(
        tokens=torch.tensor([chosen, [*rejected, 0]]),
        attention_mask=torch.tensor([[True] * 4, [True] * 3 + [False]]),
        action_mask=torch.tensor([[False, False, True, True], [False, False, True, False]]),
    )
    for _ in range(20):
        figures = learner.update(minibatch(examples, torch.full((2,), 0.5)), [[0, 1]])
    assert figures["accuracy"] == 1.0 and figures["loss"] < 0.1
    expected = learner.score(examples, [[0, 1]])
    learner.export(tmp_path / "model")
    served = model.frozen().model_copy(update={"path": str(tmp_path / "model")})
    judge = ready(Judge(functions={}, model=served, micro_batch_tokens=8))
    assert judge.score([chosen, rejected]) == pytest.approx(expected.tolist(), abs=1e-5)
    base = AutoModelForSequenceClassification.from_pretrained(llama, num_labels=1, pad_token_id=0)
    theirs = PeftModel.from_pretrained(base, tmp_path / "model_adapter").eval()
    said = theirs(input_ids=torch.tensor([chosen])).logits.item()
    assert said == pytest.approx(expected[0].item(), abs=1e-5)


def lora_step(place: Place, path: str, kind: str, stage: int, dtype: str) -> tuple[float, dict[str, Tensor]]:
    adapter = Adapter(kind=kind, rank=4)
    worker = Actor(
        model=Model(path=path, dtype=dtype, adapter=adapter), total_steps=10, loss=policy_gradient,
        optimizer=OPTIMIZER.model_copy(update={"zero_stage": stage}),
    )  # fmt: skip
    worker.setup(place.rank, place.world_size, "127.0.0.1", place.port, threads=1, seed=5, timeout_s=60)
    plan = [[[0], [1]], [[2], []]] if place.world_size == 2 else [[[0, 1, 2]]]
    norm = worker.update(minibatch(experience(torch.ones(3, 6))), plan[place.rank])["grad_norm"]
    return norm, {name: tensor.clone() for name, tensor in worker.backend.adapter_tensors()}


@pytest.mark.slow
def test_two_ranks_train_an_adapter_like_one(llama: str) -> None:
    ranks = Ranks(2)
    try:
        for kind, stage in [("lora", 0), ("lora", 2), ("lora", 3), ("dora", 2)]:
            norm, alone = Ranks(1)(lora_step, llama, kind, 0, "float32")[0]
            for their_norm, tensors in ranks(lora_step, llama, kind, stage, "float32"):
                assert their_norm == pytest.approx(norm, rel=1e-5)
                assert tensors.keys() == alone.keys()
                for name, tensor in tensors.items():
                    torch.testing.assert_close(tensor, alone[name], atol=1e-5, rtol=0)
    finally:
        ranks.close()


def test_adalora_falls_to_its_rank_and_keeps_the_most_important(llama: str) -> None:
    """14 layers start with 6 singular values each, 84, and end with 4 each on average, 56."""
    worker = actor(llama, "adalora")
    left = []
    for _ in range(8):
        step(worker)
        named = worker.backend.engine.module.named_parameters()
        left.append(sum(int((p != 0).sum()) for n, p in named if ".lora_E." in n))
    assert left[0] == 84 and left[4] == left[-1] == 56 and sorted(left, reverse=True) == left


def test_adalora_penalty_is_the_distance_from_orthogonal() -> None:
    """A = [[2, 0]], B = [[0], [1]]: |4 - 1| and |1 - 1|, their mean 1.5 times the weight 0.5."""
    backbone = torch.nn.Module()
    backbone.layer = torch.nn.Module()
    backbone.layer.lora_A = torch.nn.ParameterDict({"default": torch.tensor([[2.0, 0.0]])})
    backbone.layer.lora_B = torch.nn.ParameterDict({"default": torch.tensor([[0.0], [1.0]])})
    config = peft_config(Adapter(kind="adalora", orthogonal_weight=0.5), 10)
    assert RankSchedule(backbone, config, "default").penalty().item() == pytest.approx(0.75)


def test_frozen_weights_stay_and_the_rest_moves(llama: str) -> None:
    model = Model(path=llama, dtype="float32", freeze=("model.embed_tokens.*", "model.layers.0.*"))
    worker = ready(Actor(model=model, optimizer=OPTIMIZER, total_steps=10, loss=policy_gradient))
    before = weights_of(worker)
    step(worker)
    for name, tensor in weights_of(worker).items():
        frozen = name.startswith(("model.embed_tokens.", "model.layers.0."))
        assert torch.equal(tensor, before[name]) == frozen, name


def test_what_is_not_there_is_named(llama: str) -> None:
    def fresh() -> PolicyModel:
        return PolicyModel.load(Model(path=llama, dtype="float32"))

    with pytest.raises(ValueError, match=r"'head\*' matches no weight of LlamaForCausalLM"):
        freeze(fresh(), ("head*",))
    with pytest.raises(ValueError, match="leaves nothing to train"):
        freeze(fresh(), ("*",))
    with pytest.raises(ValueError, match="its linear layers are down_proj, gate_proj, k_proj"):
        adapt(fresh(), Adapter(target_modules=("query",)), total_steps=1)
    with pytest.raises(ValueError, match="names embed_tokens, which is no linear layer"):
        adapt(fresh(), Adapter(target_modules=("embed_tokens",)), total_steps=1)


REWARD = {"reward": {"function": "exact_match"}}
RL = {"rl": {}, "roles": REWARD}
GPUS = {"actor": {"gpus": 2, "optimizer": {"zero_stage": 3}}}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": {"adapter": {"kind": "prompt"}}, **RL}, "roles.actor.adapter.kind=prompt in the rl stage"),
        ({"model": {"adapter": {"kind": "prefix"}}, "sft": {}, "preference": {}}, "preference would start"),
        ({"model": {"adapter": {"kind": "dora"}}, **RL, "engine": {"receive": "adapter"}},
         "engine.receive=adapter with roles.actor.adapter.kind=dora"),
        ({**RL, "engine": {"receive": "adapter"}}, "adapter.kind=none"),
        ({"model": {"adapter": {"rank": 600}}, **RL, "engine": {"receive": "adapter"}}, "ranks up to 512"),
        ({"model": {"adapter": {"kind": "adalora"}}, "sft": {}}, "use model.dtype=float32"),
        ({"model": {"adapter": {"kind": "dora"}}, "sft": {"optimizer": {"zero_stage": 3}}, "roles": GPUS},
         "that ZeRO stage 3 gathers"),
        ({"model": {"adapter": {}, "freeze": ["*"]}, "sft": {}}, "keep one of them"),
        ({"model": {"adapter": {"kind": "adalora", "rank": 12}}, "sft": {}}, "adapter.initial_rank=12"),
        ({"model": {"adapter": {"kind": "dora", "quantize": "nf4"}}, "sft": {}}, "QLoRA is lora on a 4-bit"),
        ({"model": {"adapter": {"kind": "prompt"}}, "sft": {"packing": True}}, "use packing: false"),
    ],
)  # fmt: skip
def test_what_cannot_be_carried_is_refused(settings: dict, message: str) -> None:
    tree = {"model": {"path": "x", **settings.pop("model", {})}, **settings}
    with pytest.raises(ValueError, match=message):
        Run(**tree)


def test_a_role_and_a_stage_can_say_otherwise_than_the_model() -> None:
    run = Run(
        model={"path": "x", "adapter": {"rank": 4}}, sft={"adapter": {"kind": "none"}}, rl={},
        roles={**REWARD, "critic": {"adapter": {"kind": "dora", "rank": 2}}},
    )  # fmt: skip
    assert run.model.training(run.sft.adapter).adapter is None
    assert run.model.training(run.roles.actor.adapter).adapter.rank == 4
    assert run.model.training(run.roles.critic.adapter).adapter.kind == "dora"
    assert run.model.frozen().adapter is None


def test_the_plan_counts_what_lora_trains() -> None:
    """Rank 8 on the linear layers of SmolLM2-135M: 30 x (q, o 576 x 576; k, v 576 x 192; gate, up and
    down 576 x 1536)."""
    shape = Shape(hidden=576, intermediate=1536, layers=30, heads=9, kv_heads=3, head_dim=64, vocab=49152,
                  tied=True, max_positions=8192)  # fmt: skip
    by_hand = 30 * 8 * (2 * (576 + 576) + 2 * (576 + 192) + 3 * (576 + 1536))
    assert trained_params(shape, Adapter(rank=8)) == by_hand == 2442240
    assert trained_params(shape, None) == shape.params


@pytest.mark.parametrize("kind", MERGED)
def test_quartet_export_merges_the_adapter_of_a_checkpoint(kind: str, tmp_path: Path) -> None:
    path = tiny_model(tmp_path / "base", tied=True)
    worker = actor(path, kind)
    for _ in range(3):
        step(worker)
    worker.save(tmp_path / "actor")
    words = ["export", str(tmp_path / "actor" / "adapter"), "--to", str(tmp_path / "out")]
    assert cli.main(words) == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(plainly(merged), scores(worker), atol=1e-5, rtol=0)
    assert cli.main(words) == cli.REFUSED  # it is there now


def test_quartet_export_refuses_what_cannot_be_merged(
    llama: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    actor(llama, "prompt").export(tmp_path / "prompt")
    assert cli.main(["export", str(tmp_path / "prompt"), "--to", str(tmp_path / "out")]) == cli.REFUSED
    assert "which no weights can stand for" in capsys.readouterr().err
    assert cli.main(["export", llama, "--to", str(tmp_path / "out")]) == cli.REFUSED
    assert "is no PEFT folder" in capsys.readouterr().err


def test_four_bits_are_refused_where_they_do_not_run() -> None:
    adapter = {"adapter": {"quantize": "nf4"}}
    with pytest.raises(ValueError, match=r"sft.adapter.quantize=nf4 on CPUs.*set roles.actor.gpus"):
        check_trainable(Run(model={"path": "x", **adapter}, sft={}))
    with pytest.raises(ValueError, match=r"reward_model.adapter.quantize=nf4 on CPUs.*roles.reward.gpus"):
        check_trainable(Run(model={"path": "x"}, reward_model=adapter))


def test_an_adapter_is_no_model(llama: str, tmp_path: Path) -> None:
    actor(llama, "lora").save(tmp_path)
    with pytest.raises(ValueError, match=r"model.path=.*is an adapter and no model; merge it first"):
        load_tokenizer(str(tmp_path / "adapter"), None, field="model.path")
