"""Random secrets in the environment and in files, then everything searched for them that a submission
renders, sends, writes or says."""

import json
import os
import secrets
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from launch.submit import verbs, working_dir
from launch.submit.job import Job
from tests.test_submit import a_run

SECRETS = ("WANDB_API_KEY", "HF_TOKEN", "QUARTET_REWARD_TOKEN", "RAY_AUTH_TOKEN")


@pytest.fixture
def canaries(tmp_path, monkeypatch):
    """``values`` of the secrets, and the ``setting`` of a target that names their files."""
    values = {name: secrets.token_hex(16) for name in SECRETS}
    (tmp_path / "keys").mkdir()
    for name, value in values.items():
        monkeypatch.setenv(name, value)
        (tmp_path / "keys" / name).write_text(value)
    files = {name: str(tmp_path / "keys" / name) for name in values}
    return SimpleNamespace(values=list(values.values()), setting=f"secrets={json.dumps(files)}")


def folder_text(folder: Path) -> str:
    return "\n".join(f.read_bytes().decode(errors="replace") for f in folder.rglob("*") if f.is_file())


def submit_local(target, job, tmp_path, monkeypatch):
    """The job fails, for the run has no data; its log is searched too."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    target.submit(job)
    while not target.reports(job.run)[0].state.is_over:
        time.sleep(0.2)
    said = "".join(target.logs(job.run, job.id, follow=False)) + str(target.reports(job.run))
    assert "quartet: error" in said
    return said + folder_text(tmp_path / ".quartet")


def submit_ray(target, job, tmp_path, monkeypatch):
    """What would be sent to the Jobs API: the request and the files. With a real head: test_ray_jobs.py."""
    (tmp_path / "sent").mkdir()
    working_dir.stage(job, [], tmp_path / "sent")
    return json.dumps(target._request(job)) + folder_text(tmp_path / "sent")


def submit_slurm(target, job, tmp_path, monkeypatch):
    """To an sbatch that writes down what it is told."""
    (tmp_path / "bin").mkdir()
    sbatch = tmp_path / "bin" / "sbatch"
    sbatch.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/told\ncat "$3" >> {tmp_path}/told\necho 7\n')
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", f"{sbatch.parent}:{os.environ['PATH']}")
    target.submit(job)
    assert "--export=NIL" in (tmp_path / "told").read_text()
    return (tmp_path / "told").read_text() + folder_text(tmp_path / ".quartet")


@pytest.mark.parametrize(
    ("name", "submit"),
    [("local", submit_local), ("ray", submit_ray), ("slurm", submit_slurm), ("kuberay", None)],
)
def test_nothing_that_is_rendered_sent_written_or_said_holds_a_secret(
    name, submit, canaries, tmp_path, monkeypatch
):
    """kuberay's objects are searched in test_kuberay_verbs.py where they arrive."""
    target, job = verbs.find_target(name, [canaries.setting]), Job(run=a_run(tmp_path))
    said = [target.render(job), *target.lint(job)]
    said += [submit(target, job, tmp_path, monkeypatch)] if submit else []
    assert f"WANDB_API_KEY={tmp_path}/keys/WANDB_API_KEY" in said[0]  # its name, and where its value is
    assert not any(value in text for value in canaries.values for text in said)
