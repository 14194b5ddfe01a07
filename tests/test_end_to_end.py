"""The command as a user types it: real Ray, DeepSpeed and vLLM on two engines, a resume, and bad input."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from orchestrator.ledger import Ledger
from tests.fakes import prompt
from tests.models import tiny_model

ROOT = Path(__file__).parent.parent
QUARTET = str(Path(sys.executable).parent / "quartet")
OFFLINE = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
NUM_PROMPTS, PER_STEP = 60, 4
SMALL = [
    "seed=3", f"task.num_train={NUM_PROMPTS}", "task.num_heldout=10", "task.wrong_fraction=0.1",
    "sft.epochs=1", "sft.batch_size=20", "reward_model.epochs=0.2", "reward_model.batch_size=20",
    f"rl.prompts_per_step={PER_STEP}", "rl.samples_per_prompt=2", "rl.updates.minibatches=2",
    "rl.save_every=1", "rl.evaluation.every=0", "engine.replicas=2", "engine.cpus_per_worker=0.2",
    "engine.kv_cache_mb=32", "roles.actor.workers=2", "roles.actor.cpus_per_worker=0.2",
    "roles.actor.optimizer.zero_stage=3", "roles.critic.cpus_per_worker=0.2",
    "placement.share=[[reward,reference]]",
]  # fmt: skip


def quartet(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([QUARTET, *arguments], capture_output=True, text=True, timeout=400, env=OFFLINE)


def metrics(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["stage"] == "rl" and "step_s" in line]


def trained(folder: Path) -> int:
    checkpoint = sorted((folder / "rl" / "checkpoints").iterdir())[-1]
    return json.loads((checkpoint / "manifest.json").read_text())["ledger"]["num_settled"]


def engine_processes() -> set[int]:
    return {p.pid for p in psutil.process_iter(["name"]) if "EngineCore" in (p.info["name"] or "")}


@pytest.mark.e2e
@pytest.mark.slow
def test_the_pipeline_trains_on_two_engines_and_a_resume_goes_on_where_it_ended(tmp_path):
    folder, before = tmp_path / "run", engine_processes()
    result = quartet("train", "quickstart", f"run_dir={folder}", "rl.steps=2", *SMALL)
    assert result.returncode == 0, result.stdout + result.stderr

    assert [line["step"] for line in metrics(folder)] == [1, 2]
    assert max(line["rollout_logprob_diff_max"] for line in metrics(folder)) < 1e-3
    assert max(line["probe_diff"] for line in metrics(folder)) < 1e-3
    roster = json.loads((folder / "roster.json").read_text())
    assert [line["role"] for line in roster] == ["driver"]  # the workers have ended
    assert engine_processes() == before
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    tokens = AutoTokenizer.from_pretrained(folder / "model")("437+8=", return_tensors="pt")
    assert model.generate(**tokens, max_new_tokens=2).shape[1] > tokens.input_ids.shape[1]

    result = quartet("train", "quickstart", f"run_dir={folder}", "rl.steps=3", *SMALL, "--resume")
    assert result.returncode == 0, result.stdout + result.stderr
    assert [line["step"] for line in metrics(folder)] == [1, 2, 3]
    assert trained(folder) == 3 * PER_STEP
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    order = Ledger([prompt(row) for row in range(NUM_PROMPTS)], seed=3).prompts()
    expected = [next(order).uid for _ in range(PER_STEP)]
    assert [s["uid"].rsplit("/", 1)[0] for s in samples if s["step"] == 1][::2] == expected


@pytest.mark.e2e
@pytest.mark.slow
def test_filter_greedy_baseline_several_rewards_muon_and_average_work_together_and_resume(tmp_path):
    folder = tmp_path / "run"
    options = [
        "train", "quickstart", "remax", f"run_dir={folder}", *SMALL,
        "sft=null", "model.path=task", "reward_model=null", "roles.actor.workers=1",
        "roles.reward.functions={exact_match: {}, length: {function: 'tests.fakes:length', weight: -0.5}}",
        "placement.share=[[engine,actor,reference]]", "placement.take_turns=true",
        "rl.filter={max_draws: 2}", "rl.shaping={overlong_buffer: 2}",
        "rl.ema_decay=0.5",
        "roles.actor.optimizer={name: muon, learning_rate: 1.0e-4}",
    ]  # fmt: skip
    assert quartet(*options, "rl.steps=1").returncode == 0
    result = quartet(*options, "rl.steps=2", "--resume")
    assert result.returncode == 0, result.stdout + result.stderr
    lines = metrics(folder)
    assert [line["step"] for line in lines] == [1, 2]
    for line in lines:
        exact, length = line["reward/exact_match"], line["reward/length"]
        assert line["reward"] == pytest.approx(exact - 0.5 * length)
        replaced = line["groups_dropped"] - line["groups_not_replaced"]
        assert line["groups_drawn"] - PER_STEP == replaced <= PER_STEP
    assert trained(folder) == sum(line["groups_drawn"] for line in lines)
    mean, last = (
        dict(AutoModelForCausalLM.from_pretrained(folder / name).named_parameters())
        for name in ("model_ema", "model")
    )
    assert any(not mean[name].equal(last[name]) for name in last) and mean.keys() == last.keys()


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    """A run that would start: a model, its tokenizer and one prompt."""
    folder = tmp_path_factory.mktemp("good")
    tiny_model(folder / "model", tied=False)
    (folder / "p.jsonl").write_text(json.dumps({"prompt": "ab"}) + "\n")
    (folder / "empty.jsonl").write_text("")
    (folder / "long.jsonl").write_text(
        json.dumps({"prompt": "ab"}) + "\n" + json.dumps({"prompt": "a" * 200})
    )
    (folder / "run.yaml").write_text(
        f"run_dir: {folder / 'run'}\nmodel: {{path: {folder / 'model'}, max_length: 64}}\n"
        "roles: {reward: {function: exact_match}}\n"
        f"rl: {{prompts: {{path: {folder / 'p.jsonl'}}}, sampling: {{max_new_tokens: 8}},\n"
        "     algorithm: {name: ppo}}\n"
    )
    return folder


REFUSED = {
    "rl.prompts.path=nowhere.jsonl": r"rl\.prompts\.path='nowhere\.jsonl'",
    "rl.prompts.path=GOOD/empty.jsonl": r"rl\.prompts\.path=.*empty",
    "rl.prompts.path=GOOD/long.jsonl": r"row 1.*200",
    "rl.prompts.prompt_key=promt": r"rl\.prompts\.prompt_key.*prompt",
    "model.path=nowhere": r"model\.path='nowhere' has no tokenizer that loads",
    "model.max_length=100000": r"model\.max_length=100000 is more than the \d+ positions",
    "rl.algorithm.name=ppa": "unknown algorithm 'ppa', did you mean 'ppo'",
    "rl.prompt_per_step=4": r"unknown field rl\.prompt_per_step, did you mean 'prompts_per_step'",
    "rl.updates.minibatches=7": r"rl\.updates\.minibatches=7 does not divide .* pick a divisor of 128",
    "roles.reward.function=nothing": "unknown reward 'nothing'",
}


@pytest.fixture(scope="module")
def refusals(good) -> dict[str, list]:
    """override -> exit status and stderr of `quartet train`, and what it left beside the run directory; all
    in one process, for the imports take 8 s."""
    script = """if True:
        import contextlib, io, json, os, sys
        from launch.cli import main

        folder, *overrides = sys.argv[1:]
        before = {*os.listdir(folder), "run"}

        def refusal(override):
            said = io.StringIO()
            with contextlib.redirect_stderr(said):
                status = main(["train", f"{folder}/run.yaml", override])
            return status, said.getvalue(), sorted({*os.listdir(folder)} - before)

        print(json.dumps([refusal(override) for override in overrides]))
    """
    overrides = [key.replace("GOOD", str(good)) for key in REFUSED]
    done = subprocess.run(
        [sys.executable, "-c", script, str(good), *overrides],
        capture_output=True, text=True, timeout=200, env=OFFLINE,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return dict(zip(REFUSED, json.loads(done.stdout.splitlines()[-1]), strict=True))


@pytest.mark.parametrize(("override", "message"), REFUSED.items())
def test_bad_input_is_named_with_status_2_and_nothing_is_written_outside_the_run_directory(
    refusals, override, message
):
    status, said, left = refusals[override]
    assert (status, left) == (2, [])
    assert said.startswith("quartet: error:") and "Traceback" not in said
    assert re.search(message, said, re.DOTALL), said


def test_a_refusal_is_the_exit_status_of_the_command(good):
    before = set(good.iterdir())
    result = quartet("train", str(good / "run.yaml"), "roles.reward.function=nothing")
    assert result.returncode == 2, result.stdout + result.stderr
    assert result.stderr.startswith("quartet: error:") and "Traceback" not in result.stderr
    assert set(good.iterdir()) - before <= {good / "run"}
