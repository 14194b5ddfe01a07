"""`quartet submit --to ray` against a real Ray head with token authentication."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest

from tests.ray_head import ROOT, contents, environment, start_head, stop_head

pytestmark = [pytest.mark.slow, pytest.mark.ray]
SMALL = [
    "seed=3", "task.num_train=60", "task.num_heldout=10", "task.wrong_fraction=0.1", "sft=null",
    "reward_model=null", "roles.reward.function=exact_match", "model.path=task", "rl.prompts_per_step=4",
    "rl.samples_per_prompt=2", "rl.updates.minibatches=2", "rl.evaluation.every=0",
    "engine.cpus_per_worker=0.2", "engine.kv_cache_mb=32",
]  # fmt: skip
CANARIES = {"WANDB_API_KEY": "canary-wandb-51f0", "HF_TOKEN": "canary-hf-77ab"}


@pytest.fixture(scope="module")
def head(tmp_path_factory):
    temp = Path(tempfile.mkdtemp(prefix="qr", dir="/tmp"))
    head = start_head(tmp_path_factory.mktemp("head"), temp)
    yield head
    stop_head(head)
    shutil.rmtree(temp, ignore_errors=True)


def quartet(head, *arguments, **more):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "RAY_AUTH_TOKEN_PATH": str(head.token_file), **CANARIES}
    env |= more
    return subprocess.run(
        [sys.executable, "-m", "launch.cli", *arguments], capture_output=True, text=True, timeout=300, env=env
    )


def at(head):
    return ["--to", "ray", "--at", f"address={head.address}", "--at", f"python={sys.executable}"]


def test_a_run_trains_stops_with_a_checkpoint_and_resumes(head, tmp_path):
    keys = [f"{name}={tmp_path / name}" for name in CANARIES]
    for name, value in CANARIES.items():
        (tmp_path / name).write_text(value)
    secrets = ["--at", "secrets={" + ", ".join(pair.replace("=", ": ") for pair in keys) + "}"]
    # `long` never ends within the test; the second attempt is bounded by rl.steps.
    long = [
        "quickstart",
        "name=ppo-a",
        f"run_dir={tmp_path / 'run'}",
        "rl.steps=400",
        *SMALL,
        *at(head),
        *secrets,
    ]
    first = quartet(head, "submit", *long)
    assert first.returncode == 0, first.stdout + first.stderr
    again = quartet(head, "submit", *long)
    assert "already submitted" in again.stdout and again.returncode == 3, again.stdout + again.stderr

    metrics = tmp_path / "run" / "metrics.jsonl"
    for _ in range(180):
        if metrics.exists() and '"rl"' in metrics.read_text():
            break
        time.sleep(1)
    stopped = quartet(head, "stop", *long)
    assert "ppo-a-0  stopped" in stopped.stdout, stopped.stdout + stopped.stderr
    checkpoints = sorted((tmp_path / "run" / "rl" / "checkpoints").glob("step-*"))
    assert len(checkpoints) == 1, quartet(head, "logs", *long).stdout
    step = json.loads((checkpoints[0] / "manifest.json").read_text())["step"]

    bounded = [f"rl.steps={step + 1}" if item == "rl.steps=400" else item for item in long]
    resumed = quartet(head, "resume", *bounded, "--wait")
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert f"resumed from step {step}" in resumed.stdout
    for phase in ("head healthy", "nodes joined", "placement groups ready", "first step"):
        assert phase in resumed.stderr
    listed = quartet(head, "status", *long).stdout
    assert "ppo-a-0  stopped" in listed and "ppo-a-1  succeeded" in listed

    said = [text for r in (first, again, stopped, resumed) for text in (r.stdout, r.stderr)] + [listed]
    for process in psutil.Process(head.process.pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # it ended since it was listed
            said.append(" ".join(process.cmdline()))
    stored = contents(head.temp, tmp_path / "run")
    assert len(stored) > 20
    for canary in [*CANARIES.values(), head.token]:
        assert not any(canary in text for text in said)
        assert [str(file) for file, text in stored.items() if canary.encode() in text] == []


def test_a_failed_job_reports_the_exit_code_of_the_training_process(head, tmp_path):
    own = [field for field in SMALL if not field.startswith(("task.", "model"))]
    own += ["task=null", "model.path=/nowhere", "rl.prompts.path=/nowhere.jsonl"]
    arguments = ["quickstart", "name=bad", f"run_dir={tmp_path / 'run'}", *own]
    result = quartet(head, "submit", *arguments, *at(head), "--wait")
    assert result.returncode == 2, result.stdout + result.stderr
    assert "bad-0  failed  exit code 2" in result.stdout


@pytest.mark.parametrize(
    ("override", "extra", "message"),
    [
        ("seed=1", {"RAY_AUTH_TOKEN_PATH": "/dev/null"}, "refused the token (HTTP 401)"),
        ("seed=1", {"RAY_AUTH_TOKEN": "0" * 64}, "refused the token (HTTP 403)"),
        ("roles.actor.cpus_per_worker=64", {}, "actor asks for the most (64 CPU)"),
    ],
)
def test_what_the_cluster_would_refuse_is_named_before_a_job_exists(head, tmp_path, override, extra, message):
    arguments = ["quickstart", "name=refused", f"run_dir={tmp_path / 'run'}", override, *at(head)]
    result = quartet(head, "submit", *arguments, **extra)
    assert result.returncode == 2 and message in result.stderr, result.stdout + result.stderr
    assert quartet(head, "status", *arguments).returncode == 5


def test_an_address_where_nobody_listens_is_named(head, tmp_path):
    result = quartet(head, "submit", "quickstart", f"run_dir={tmp_path}", "--to", "ray",
                     "--at", "address=http://127.0.0.1:9")  # fmt: skip
    assert result.returncode == 2 and "address=http://127.0.0.1:9 cannot be reached" in result.stderr


@pytest.mark.parametrize("who", ["the process that starts them", "one worker of several"])
def test_waiting_for_nodes_ends_when_who_starts_them_has_ended(head, tmp_path, who):
    began = time.monotonic()
    seconds = "1" if who == "the process that starts them" else "600"
    with subprocess.Popen(["sleep", seconds]) as keeper:
        why = f"process {keeper.pid}, which starts them, has ended"
        if seconds == "600":
            (tmp_path / "worker-1.ended").write_text("7\n")
            why = "worker-1 has ended with code 7"
        done = subprocess.run(
            [sys.executable, "-m", "launch.submit.wait_for_nodes", head.gcs, "2", "300", str(tmp_path),
             str(keeper.pid)],
            env=environment(head.token_file.parent), capture_output=True, text=True, timeout=200, cwd=ROOT,
        )  # fmt: skip
        keeper.kill()
    assert done.returncode == 1, done.stderr
    assert f"1 of 2 nodes joined and {why}" in done.stderr
    assert time.monotonic() - began < 100
