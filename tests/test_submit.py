"""Submission: ids, states, the start-up timeline, the working directory, and the local target with real
processes."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch.submit import startup, verbs, working_dir
from launch.submit.job import Job, Report, State, attempts, entrypoint
from launch.submit.targets import local
from orchestrator.config import Run
from tests.ray_head import ROOT

CANARY = "canary-5f1d2c"


def a_run(folder, **fields):
    tree = {
        "name": "ppo",
        "run_dir": folder / "run",
        "model": {"path": "m"},
        "sft": {"data": {"path": "x.jsonl"}},
    }
    return Run(**(tree | fields))


def test_an_attempt_is_named_after_its_run_and_no_other():
    reports = [Report(id=i, state=State.FAILED) for i in ("a-10", "a-2", "a-1-0", "ab-3", "a-x")]
    assert [r.id for r in attempts(reports, "a")] == ["a-2", "a-10"]


@pytest.mark.parametrize(
    ("state", "exit_code", "status"),
    [
        ("succeeded", 0, 0),
        ("failed", 2, 2),
        ("failed", None, 1),
        ("running", None, 3),
        ("stopped", None, 4),
        ("stopped", 75, 75),
    ],
)
def test_the_exit_status_says_what_became_of_the_job(state, exit_code, status):
    assert Report(id="a-0", state=State(state), exit_code=exit_code).status == status


def test_secrets_are_files_on_the_command_line():
    argv = entrypoint("run.yaml", resume=True, secrets={"HF_TOKEN": "/keys/hf"})
    assert argv[1:] == ["-m", "launch.submit.enter", "run.yaml", "--resume", "--secret", "HF_TOKEN=/keys/hf"]


def test_the_timeline_names_each_phase_once_and_the_one_that_is_late():
    start = startup.Startup(deadline_s=60, now=0)
    assert start.late(now=59) is None
    assert "not allocated" in start.late(now=61)
    log = "[start] head healthy\n[start] nodes joined: 3 (10.0.0.1, 10.0.0.2, 10.0.0.3)\n"
    assert start.feed(log, now=40) == [
        "+  40.0 s  head healthy",
        "+  40.0 s  nodes joined: 3 (10.0.0.1, 10.0.0.2, 10.0.0.3)",
    ]
    assert start.feed(log, now=50) == []
    assert start.late(now=99) is None and "not placement groups ready" in start.late(now=101)
    start.feed(log + "sft step 1/40  loss 0.8\n", now=120)
    assert start.late(now=10_000) is None


@pytest.mark.parametrize("target", ["local", "ray", "kuberay", "slurm"])
def test_rendering_is_deterministic_and_holds_no_secret(target, tmp_path, monkeypatch):
    for name in ("WANDB_API_KEY", "HF_TOKEN", "RAY_AUTH_TOKEN", "QUARTET_REWARD_TOKEN"):
        monkeypatch.setenv(name, CANARY)
    (tmp_path / "wandb").write_text(CANARY)
    job = Job(run=a_run(tmp_path))
    texts = {
        verbs.find_target(target, [f"secrets={{WANDB_API_KEY: {tmp_path / 'wandb'}}}"]).render(job)
        for _ in range(2)
    }
    assert len(texts) == 1 and CANARY not in texts.pop()


@pytest.mark.parametrize(
    ("to", "at", "said"),
    [
        ("kubray", [], "did you mean 'kuberay'"),
        ("ray", ["adress=x"], "adress: Extra inputs are not permitted; known: stop_grace_s"),
        ("nowhere.yaml", [], "nowhere.yaml"),
    ],
)
def test_a_wrong_target_is_named(to, at, said):
    with pytest.raises(ValueError, match=said):
        verbs.find_target(to, at)


def test_a_working_directory_above_the_limit_or_with_a_key_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    with open(tmp_path / "data" / "big.bin", "wb") as big:
        big.truncate(101 * 2**20)
    (tmp_path / "data" / ".env").write_text("WANDB_API_KEY=x")
    said = working_dir.complaints(["data", "absent"])
    assert [line.split(";")[0] for line in said] == [
        "files: data/.env looks like a secret",
        "files: absent does not exist",
        "files: 101 MiB is above Ray's upload limit of 100 MiB",
    ]


def test_a_failing_job_on_this_machine_leaves_its_exit_code_and_its_log(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    run, target = a_run(tmp_path), local.Target(local.CONFIG())
    target.submit(Job(run=run))
    for _ in range(900):
        if target.reports(run)[0].state.is_over:
            break
        time.sleep(0.2)
    assert target.reports(run) == [Report(id="ppo-0", state=State.FAILED, exit_code=2)]
    assert "quartet: error" in "".join(target.logs(run, "ppo-0", follow=False))


def test_a_job_whose_machine_died_is_failed_and_not_running(tmp_path):
    folder = tmp_path / "ppo-0"
    folder.mkdir()
    (folder / "lock").touch()
    assert local.report(folder).state is State.FAILED
    assert "resume" in local.report(folder).message


@pytest.mark.parametrize(("trap", "state"), [("exit 75", State.STOPPED), ("exit 3", State.FAILED)])
def test_the_supervisor_passes_sigterm_on_and_keeps_the_exit_code(tmp_path, trap, state):
    folder = tmp_path / "ppo-0"
    folder.mkdir()
    script = f"trap '{trap}' TERM; echo up; while :; do sleep 0.1; done"
    process = subprocess.Popen(
        [sys.executable, "-m", "launch.submit.supervise", str(folder), "--", "bash", "-c", script],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    log = folder / "log"
    while not (log.exists() and "up" in log.read_text()):
        time.sleep(0.05)
    assert local.report(folder).state is State.RUNNING
    process.terminate()
    process.wait(20)
    assert local.report(folder).state is state


def test_a_submission_that_fails_leaves_nothing_behind(tmp_path, monkeypatch):
    run = a_run(tmp_path)
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(FileNotFoundError):
        local.Target(local.CONFIG()).submit(Job(run=run))
    assert not list(Path(tmp_path / ".quartet").iterdir())
