"""The command with adapters everywhere: real Ray, DeepSpeed and vLLM, four roles on one base."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.test_end_to_end import metrics, quartet

SMALL = [
    "seed=3", "task.num_train=60", "task.num_heldout=10", "task.wrong_fraction=0.1",
    "sft.epochs=1", "sft.batch_size=20", "reward_model.epochs=0.2", "reward_model.batch_size=20",
    "rl.prompts_per_step=4", "rl.samples_per_prompt=2", "rl.updates.minibatches=2", "rl.save_every=1",
    "rl.evaluation.every=0", "engine.cpus_per_worker=0.2", "engine.kv_cache_mb=32",
    "roles.actor.cpus_per_worker=0.2", "roles.actor.optimizer.learning_rate=1e-2",
    "model.adapter={kind: lora, rank: 4}", "sft.adapter={kind: dora, rank: 2}",
    "placement.backbone=shared", "engine.receive=adapter",
]  # fmt: skip


@pytest.mark.e2e
@pytest.mark.slow
def test_four_roles_on_one_base_train_resume_and_export(tmp_path):
    folder = tmp_path / "run"
    for steps, more in ((2, []), (3, ["--resume"])):
        result = quartet("train", "quickstart", f"run_dir={folder}", f"rl.steps={steps}", *SMALL, *more)
        assert result.returncode == 0, result.stdout + result.stderr
    lines = metrics(folder)
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert max(line["rollout_logprob_diff_max"] for line in lines) < 1e-3  # the engine samples the actor
    assert max(line["probe_diff"] for line in lines) < 1e-3
    assert all("critic/loss" in line and "actor/loss" in line and "reward" in line for line in lines)
    base = AutoModelForCausalLM.from_pretrained(folder / "sft" / "model")
    whole_mb = 4 * sum(p.numel() for p in base.parameters()) / 2**20
    assert max(line["sync_mb"] for line in lines) < whole_mb / 2

    checkpoint = sorted((folder / "rl" / "checkpoints").iterdir())[-1]
    result = quartet("export", str(checkpoint / "actor" / "adapter"), "--to", str(tmp_path / "merged"))
    assert result.returncode == 0, result.stdout + result.stderr
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    exported = dict(AutoModelForCausalLM.from_pretrained(folder / "model").named_parameters())
    for name, tensor in merged.named_parameters():
        torch.testing.assert_close(tensor, exported[name], atol=1e-5, rtol=0)
    assert any(not torch.equal(p, exported[name]) for name, p in base.named_parameters())
    assert json.loads((folder / "stages.json").read_text())["rl"]["steps"] == 3
