"""What a run needs in bytes, before it starts: against published counts, models that Transformers builds,
and sums by hand."""

import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from launch.cli import main
from launch.foresight import refuse_what_cannot_fit
from orchestrator.config import Run
from orchestrator.plan.devices import DEVICES, GIB, parse_cluster
from orchestrator.plan.fit import Planned, fits
from orchestrator.plan.memory import Overheads
from orchestrator.plan.remedy import why_not
from orchestrator.plan.shapes import NAMED, check_parallel, named_shape, read_shape, shape_of
from orchestrator.plan.stages import Shapes
from orchestrator.plan.workload import workload


def grpo(**fields) -> Run:
    tree = {
        "model": {"path": "Qwen/Qwen2.5-7B", "max_length": 2048, "gradient_checkpointing": True},
        "rl": {
            "algorithm": {"name": "grpo", "kl_coef": 0.001},
            "prompts_per_step": 64, "samples_per_prompt": 8, "sampling": {"max_new_tokens": 1024},
        },
        "roles": {
            "actor": {"gpus": 4, "micro_batch_tokens": 4096}, "reference": {"gpus": 1},
            "reward": {"function": "exact_match"},
        },
        "engine": {"replicas": 3, "gpus": 3},
    }  # fmt: skip
    return Run(**{**tree, **fields})


def planned(run: Run, cluster: str = "1x8xH200", model: str = "qwen2.5-7b") -> Planned:
    flow = workload(run, run.rl, prompt=512, response=500)
    shapes = Shapes(base=NAMED[model], by_role={})
    return Planned(
        run=run, shapes=shapes, cluster=parse_cluster(cluster), workload=flow, overheads=Overheads()
    )


def parts_of(plan: Planned, role: str) -> dict[str, float]:
    pools = [pool for fit in fits(plan) for pool in fit.pools if f" of {role}" in pool.where]
    return {part.name.removeprefix(f"{role}: "): part.bytes for part in pools[0].parts}


def test_named_shapes_have_the_published_number_of_parameters():
    """From the model cards and the index files of the weights."""
    published = {
        "smollm2-135m": 134_515_008, "qwen2.5-0.5b": 494_032_768, "qwen2.5-7b": 7_615_616_512,
        "llama-3.1-8b": 8_030_261_248, "llama-3.1-70b": 70_553_706_496, "llama-3.1-405b": 405_853_388_800,
    }  # fmt: skip
    assert {name: NAMED[name].params for name in published} == published
    assert named_shape("meta-llama/Llama-3.1-70B-Instruct") is NAMED["llama-3.1-70b"]


@pytest.mark.parametrize(
    ("model", "config"),
    [
        (LlamaForCausalLM, LlamaConfig(
            vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, attention_bias=True, mlp_bias=True)),
        (Qwen2ForCausalLM, Qwen2Config(
            vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=1, tie_word_embeddings=True)),
    ],
)  # fmt: skip
def test_parameters_are_those_that_transformers_makes(model, config, tmp_path):
    config.save_pretrained(tmp_path)
    with torch.device("meta"):
        made = sum(p.numel() for p in model(config).parameters())
    assert read_shape(tmp_path / "config.json", field="model.path").params == made


def test_an_expert_layer_by_hand():
    """One layer, h 4, 2 heads of 2, 3 experts of f 8 of which 2 answer, vocabulary 10, untied: attention 4 x
    16, router 12, experts 3 x 96, norms 8; embedding and head 40 each, last norm 4."""
    config = {
        "model_type": "mixtral", "hidden_size": 4, "intermediate_size": 8, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 10, "num_local_experts": 3,
        "num_experts_per_tok": 2,
    }  # fmt: skip
    shape = shape_of(config, where="x")
    assert shape.params == 64 + 12 + 288 + 8 + 40 + 40 + 4
    assert shape.active_params == 64 + 12 + 192 + 8 + 40


def test_training_state_of_7b_on_four_ranks_by_hand():
    """bfloat16 under ZeRO-2: weights 2 bytes everywhere; a fourth of masters and moments (12), of gradients
    twice (8)."""
    parts, count = parts_of(planned(grpo()), "actor"), 7_615_616_512
    assert parts["parameters"] == 2 * count
    assert parts["optimizer"] == 12 * count / 4
    assert parts["gradients"] == 8 * count / 4


def test_vllm_takes_its_share_of_the_device_whatever_it_needs():
    """0.8 of an H200 less the weights and the working memory is cache."""
    parts = parts_of(planned(grpo()), "engine")
    taken = parts["KV cache"] + parts["parameters"] + parts["activations"]
    assert taken == pytest.approx(0.8 * DEVICES["H200"].memory)
    assert parts["parameters"] == 2 * 7_615_616_512


def test_what_does_not_fit_names_a_knob_and_the_knob_makes_it_fit():
    """7B under ZeRO-2 on two 80 GB devices: 15.2 + 22.9 x 2 + 30.5 GB of state alone."""
    roles = {"actor": {"gpus": 2}, "reference": {"gpus": 1}, "reward": {"function": "exact_match"}}
    plan = planned(grpo(roles=roles), "1x8xH100")
    (found,) = fits(plan)
    assert found.cannot
    why = why_not(plan, found)
    assert "stage rl wants at least" in why
    assert "fits with roles.actor.gpus=4" in why
    roles["actor"]["gpus"] = 4
    (found,) = fits(planned(grpo(roles=roles, engine={"replicas": 3, "gpus": 3}), "1x8xH100"))
    assert not found.cannot


def test_engine_beside_the_actor_needs_a_smaller_share_of_the_device():
    fields = {
        "roles": {"actor": {"gpus": 4}, "reference": {"gpus": 4}, "reward": {"function": "exact_match"}},
        "engine": {"replicas": 4, "gpus": 4},
        "placement": {"share": [["actor", "reference", "engine"]]},
    }
    plan = planned(grpo(**fields), "1x4xH200")
    (found,) = fits(plan)
    assert found.cannot
    assert "engine.gpu_memory_fraction=" in why_not(plan, found)


@pytest.mark.parametrize(
    ("cluster", "complaint"),
    [
        ("8xH300", "unknown device 'H300', did you mean 'H200'"),
        ("0x8xH200", "counts 0 nodes or devices; give 1 or more"),
        ("2x-8xH200", "counts -8 nodes or devices"),
        ("plenty", "is no cluster; expected NODESxDEVICESxKIND"),
    ],
)
def test_a_cluster_that_cannot_be_is_refused(cluster, complaint):
    with pytest.raises(ValueError, match=complaint):
        parse_cluster(cluster)


def test_heads_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match=r"does not divide the 28 attention heads; use one of 1, 2, 4"):
        check_parallel(NAMED["qwen2.5-7b"], 8)
    check_parallel(NAMED["qwen2.5-7b"], 2)


def test_command_refuses_without_a_traceback(tmp_path, capsys):
    """A model whose config cannot be read, and one with nonsense in it."""
    run = tmp_path / "run.yaml"
    run.write_text(
        f"model: {{path: {tmp_path}}}\nrl: {{algorithm: {{name: grpo}}}}\nroles: "
        "{reward: {function: exact_match}}"
    )
    assert main(["plan", str(run), "--cluster", "8xH200"]) == 2
    error = capsys.readouterr().err
    assert "cannot be read" in error and "known shapes" in error
    Path(tmp_path, "config.json").write_text(json.dumps({"model_type": "gpt2", "n_embd": 8}))
    assert main(["plan", str(run), "--cluster", "8xH200"]) == 2
    assert "num_attention_heads=None of model_type='gpt2'" in capsys.readouterr().err


def test_train_refuses_what_cannot_fit_this_machine(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    cpu = {"roles": {"reward": {"function": "exact_match"}}, "engine": {"kv_cache_mb": 2048}}
    model = {"path": "meta-llama/Llama-3.1-405B", "max_length": 2048}
    with pytest.raises(ValueError, match=r"cannot fit this machine: stage rl wants at least .* GiB"):
        refuse_what_cannot_fit(grpo(model=model, **cpu))
    refuse_what_cannot_fit(grpo(model=model, ray_address="auto", **cpu))
    with pytest.raises(
        ValueError, match=r"KV cache holds .* model.max_length=2048 .* raise engine.kv_cache_mb"
    ):
        refuse_what_cannot_fit(grpo(roles=cpu["roles"], engine={"kv_cache_mb": 16}))
    small = {"path": "HuggingFaceTB/SmolLM2-135M", "max_length": 2048}
    refuse_what_cannot_fit(grpo(model=small, **cpu))


def test_lengths_are_drawn_with_the_mean_that_was_given():
    """A long tail: the mean as given, the longest cut at the limit."""
    import random

    flow = workload(grpo(), grpo().rl, prompt=100, response=300)
    chance = random.Random(0)
    lengths = [flow.draw(chance) for _ in range(20000)]
    assert sum(lengths) / len(lengths) == pytest.approx(300, rel=0.03)
    assert max(lengths) == 1024
    assert sorted(lengths)[len(lengths) // 2] < 260
    assert flow.assumed == ()


def test_memory_of_the_host_counts_what_passes_through_it():
    """Four ranks of 7B load 15.2 GB each on one node of 8 x 240 GiB."""
    (found,) = fits(planned(grpo()))
    host = found.pools[-1]
    assert host.where == "the memory of a node"
    assert host.capacity == 8 * 240 * GIB
    loading = next(part for part in host.parts if part.name == "actor: loading")
    assert loading.bytes == 4 * 2 * 7_615_616_512


def test_roles_that_take_turns_need_not_fit_at_once():
    """7B on one H200: 0.8 of it for the engine beside 20 bytes a parameter of training do not fit, in turns
    they do. What sleeps waits in the host's memory: weights 2, masters and moments 12, gradients 8 bytes a
    parameter."""
    fields = {
        "roles": {"actor": {"gpus": 4, "micro_batch_tokens": 4096}, "reward": {"function": "exact_match"}},
        "engine": {"replicas": 4, "gpus": 4},
        "rl": {"algorithm": {"name": "grpo"}, "sampling": {"max_new_tokens": 1024}},
    }
    together = grpo(**fields, placement={"share": [["actor", "engine"]]})
    turns = grpo(**fields, placement={"share": [["actor", "engine"]], "take_turns": True})
    assert fits(planned(together, "1x4xH200"))[0].cannot
    (found,) = fits(planned(turns, "1x4xH200"))
    assert not found.cannot
    asleep = next(part for part in found.pools[-1].parts if part.name == "actor: asleep")
    assert asleep.bytes == 4 * (2 + 20 / 4) * 7_615_616_512
