"""`quartet submit --to slurm` on a real Slurm whose three nodes are namespaced hosts."""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests import slurm_cluster
from tests.hosts import Network
from tests.ray_head import ROOT
from tests.slurm_cluster import Slurm, until
from tests.test_ray_jobs import SMALL

pytestmark = pytest.mark.slow
ROLES = "node_roles=[actor+critic, engine, reward+reference]"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    if why := slurm_cluster.missing():
        pytest.skip(f"no real Slurm here: {why}")
    base = tmp_path_factory.mktemp("slurm")
    network = Network(base, 3)
    try:
        slurm = Slurm(base, network)
        try:
            slurm.wait_for_nodes()
            yield slurm
        finally:
            slurm.close()
    finally:
        network.close()


def quartet(cluster, *arguments):
    return subprocess.run(
        [sys.executable, "-m", "launch.cli", *arguments, "--to", "slurm", "--at", "cpus_per_node=2",
         "--at", "object_store_mb=80", "--at", "start_deadline_s=180", "--at", "stop_grace_s=60"],
        capture_output=True, text=True, timeout=400,
        env={**cluster.environment, "PYTHONPATH": str(ROOT), "WANDB_API_KEY": "canary-slurm-19"},
    )  # fmt: skip


def ray_processes(cluster):
    names = []
    for pid in [pid for host in cluster.network.names for pid in cluster.network.processes(host)]:
        with contextlib.suppress(psutil.NoSuchProcess):  # it ended since it was listed
            names.append(psutil.Process(pid).name())
    return [name for name in names if name not in ("slurmd", "slurmstepd")]


def steps(folder: Path) -> int:
    file = folder / "metrics.jsonl"
    return sum('"step_s"' in line for line in file.read_text().splitlines()) if file.exists() else 0


def submitted(folder, name, *more):
    return ["quickstart", f"name={name}", f"run_dir={folder / 'run'}", *SMALL, "rl.save_every=1", *more]


def test_ppo_over_three_hosts_loses_a_node_is_requeued_and_resumes(cluster, tmp_path):
    run = submitted(tmp_path, "ppo", "rl.steps=30")
    three = ["--at", "nodes=3", "--at", ROLES]
    first = quartet(cluster, "submit", *run, *three)
    assert first.returncode == 0, first.stdout + first.stderr
    folder = tmp_path / "run"
    log = tmp_path / ".quartet" / "ppo-0" / "log"
    until(lambda: steps(folder) >= 2 or "exit_code" in os.listdir(log.parent), 240)
    roster = json.loads((folder / "roster.json").read_text())
    a, b, c = cluster.network.names
    where = {line["role"]: line["node"] for line in roster if "child" not in line["role"]}
    assert where == {"driver": a, "actor": a, "critic": a, "engine": b, "reward": c, "reference": c}

    number = (log.parent / "job").read_text()
    lost = cluster.network.names[2]
    cluster.network.kill(lost)
    until(lambda: "Restarts=1" in cluster.run("scontrol", "show", "job", "-o", number), 120)
    done = steps(folder)
    cluster.start_node(lost)
    cluster.run("scontrol", "update", f"jobid={number}", "StartTime=now")
    until(lambda: "resumed from step" in log.read_text(), 240)
    until(lambda: steps(folder) > done, 120)

    stopped = quartet(cluster, "stop", *run, *three)
    assert "ppo-0  stopped  exit code 75" in stopped.stdout, stopped.stdout + stopped.stderr + log.read_text()
    until(lambda: ray_processes(cluster) == [], 30)
    said = [
        first.stdout,
        stopped.stdout,
        *(f.read_text(errors="replace") for f in log.parent.rglob("*") if f.is_file() and f.name != "token"),
    ]
    tokens = [f.read_text() for f in log.parent.rglob("token")]
    assert len(tokens) == 2 and not any(
        secret in text for text in said for secret in [*tokens, "canary-slurm-19"]
    )


def test_a_failing_job_has_the_exit_code_of_the_training_process(cluster, tmp_path):
    run = submitted(tmp_path, "bad", "task=null", "model.path=/nowhere", "rl.prompts.path=/nowhere.jsonl")
    run = [field for field in run if not field.startswith(("task.", "model.path=task"))]
    result = quartet(cluster, "submit", *run, "--wait")
    assert result.returncode == 2 and "bad-0  failed  exit code 2" in result.stdout, (
        result.stdout + result.stderr
    )
    assert "head healthy" in result.stderr or "allocated" in result.stderr


def engines(folder: Path) -> dict[int, str]:
    """Number -> node."""
    lines = json.loads((folder / "roster.json").read_text())
    return {line["rank"]: line["node"] for line in lines if line["role"] == "engine"}


def test_a_run_scales_within_its_allocation_and_when_cancelled_leaves_no_process(cluster, tmp_path):
    """Two engines of 0.9 CPUs fit the node that is for engines, three would fit what is free in all."""
    small = [f"roles.{role}.cpus_per_worker=0.25" for role in ("actor", "critic", "reward", "reference")]
    run = submitted(tmp_path, "gone", "rl.steps=4000", "engine.cpus_per_worker=0.9", *small)
    two = ["--at", "nodes=2", "--at", "node_roles=[actor+critic+reward+reference, engine]"]
    assert quartet(cluster, "submit", *run, *two).returncode == 0
    folder, log = tmp_path / "run", tmp_path / ".quartet" / "gone-0" / "log"
    until(lambda: steps(folder) >= 2 or "exit_code" in os.listdir(log.parent), 240)
    there = cluster.network.names[1]
    assert engines(folder) == {0: there}

    refused = quartet(cluster, "scale", *run, "engine=4", *two)
    assert refused.returncode == 2
    assert "engine=4 is more than the allocation of gone-0 can hold" in refused.stderr
    assert "wants 4.6 CPU; the cluster has 4" in refused.stderr
    asked = quartet(cluster, "scale", *run, "engine=3", *two)
    assert "gone-0 was asked for 3 engine(s)" in asked.stdout, asked.stdout + asked.stderr
    until(lambda: "WARNING: 2 engine(s) and not 3" in log.read_text(), 120)
    assert "finds no room in Slurm's allocation" in log.read_text()
    assert engines(folder) == {0: there, 1: there}
    assert quartet(cluster, "scale", *run, "engine=1", *two).returncode == 0
    until(lambda: "1 engine(s), as quartet scale asked" in log.read_text(), 60)
    assert engines(folder) == {0: there}

    cluster.run("scancel", (log.parent / "job").read_text())
    until(lambda: ray_processes(cluster) == [], 60)
    until(lambda: "gone-0  stopped" in quartet(cluster, "status", *run).stdout, 60)  # Slurm tidies up first
    assert "gone-0 is stopped; only a run at work" in quartet(cluster, "scale", *run, "engine=2", *two).stderr


@pytest.mark.parametrize(
    ("at", "said"),
    [("nodes=9", "nodes=9, but Slurm has 3"), ("gpus_per_node=4", "gpus_per_node=4, but a node has gpu:2")],
)
def test_more_than_the_cluster_has_is_refused_and_leaves_nothing(cluster, tmp_path, at, said):
    result = quartet(cluster, "submit", *submitted(tmp_path, "big"), "--at", at)
    assert result.returncode == 2 and said in result.stderr, result.stdout + result.stderr
    assert not (tmp_path / ".quartet").exists()
