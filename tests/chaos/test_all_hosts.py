"""A run over three hosts goes on when one loses power, and takes it back; nobody submits the run again."""

import subprocess
import sys
from pathlib import Path

import pytest

from launch.graceful import CHECKPOINTED
from tests import hosts
from tests.chaos.rig import ROOT, Rig

pytestmark = [pytest.mark.slow, pytest.mark.e2e]
PORT = 6379
FIELDS = (
    "roles.actor.cpus_per_worker=1", "roles.reward.cpus_per_worker=0.4", "engine.replicas=2",
    "engine.cpus_per_worker=0.6", "rl.steps=9000", "rl.staleness=1", "rl.save_every=0", "rl.samples_every=0",
    "deadlines.stall_s=60", "deadlines.silence_s=20",
)  # fmt: skip
# A lost host is seen after 3 s instead of 15.
QUICK = {"initial_delay_ms": 1000, "period_ms": 500, "timeout_ms": 1000, "failure_threshold": 3}


class Hosts(Rig):
    """A Ray node of one CPU on each host; the driver and the actor live on the first."""

    def __init__(self, folder: Path, network: hosts.Network) -> None:
        super().__init__(folder, *FIELDS)
        self.network = network

    def command(self, name: str, *words: str) -> subprocess.Popen:
        environment = {
            "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "RAY_AUTH_MODE": "disabled",
            "RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0",
            "RAY_ADDRESS": f"{self.network.addresses[0]}:{PORT}",
            **{f"RAY_health_check_{field}": str(value) for field, value in QUICK.items()},
        }  # fmt: skip
        settings = [f"{field}={value}" for field, value in environment.items()]
        return self.network.start(name, "env", *settings, *words, log=self.folder / "log")

    def boot(self, name: str) -> None:
        """Its Ray node starts."""
        address, head = self.network.addresses[self.network.names.index(name)], self.network.addresses[0]
        first = address == head
        where = ["--head", f"--port={PORT}"] if first else [f"--address={head}:{PORT}"]
        ray = str(Path(sys.executable).parent / "ray")
        self.command(
            name, ray, "start", "--block", *where, f"--node-ip-address={address}", "--num-cpus=1",
            "--object-store-memory=80000000", f"--labels=quartet.role.actor={str(first).lower()}",
            *(["--include-dashboard=false"] if first else []),
        )  # fmt: skip

    def start(self, *options: str) -> None:
        command = [sys.executable, "-m", "launch.cli", "train", str(self.folder / "run.yaml")]
        self.process = self.command(self.network.names[0], *command, *self.overrides, *options)

    def where(self) -> dict[tuple[str, int], tuple[str, int]]:
        """(role, rank) -> (host, which process of it)."""
        return {
            (line["role"], line["rank"]): (line["node"], line["incarnation"])
            for line in self.roster() if "child" not in line["role"]
        }  # fmt: skip


@pytest.fixture
def run(tmp_path: Path):
    if why := hosts.missing():
        pytest.skip(why)
    (tmp_path / "hosts").mkdir()
    network = hosts.Network(tmp_path / "hosts", 3)
    try:
        made = Hosts(tmp_path / "rig", network)
        for name in network.names:
            made.boot(name)
        yield made
    finally:
        network.close()


def test_a_host_with_an_engine_and_the_reward_dies_and_the_run_goes_on(run: Hosts) -> None:
    first, *others = run.network.names
    run.start()
    run.until_step(2)
    before = run.where()
    assert before["driver", 0][0] == before["actor", 0][0] == first
    assert {before["engine", rank][0] for rank in (0, 1)} == set(others)
    lost = before["reward", 0][0]
    (left,) = set(others) - {lost}
    gone, stays = (rank for host in (lost, left) for rank in (0, 1) if before["engine", rank][0] == host)

    run.network.kill(lost)
    # The other host has room for the reward, and none for another engine: one draws all the samples.
    run.until(lambda: run.where()["reward", 0][0] == left)
    done = len(run.steps())
    run.until_step(done + 4)
    after = run.where()
    assert after["engine", gone] == before["engine", gone]  # still waits for room
    same = [("driver", 0), ("actor", 0), ("engine", stays)]
    assert [after[who] for who in same] == [before[who] for who in same]

    run.boot(lost)
    run.until(lambda: f"engine {gone}" in {line["who"] for line in run.incidents("recovered")})
    assert run.where()["engine", gone][0] == lost
    run.until_step(len(run.steps()) + 2)
    run.process.terminate()
    assert run.wait() == CHECKPOINTED, run.log()
    run.check_ledger()
    assert {line["who"] for line in run.incidents("lost")} == {f"engine {gone}", "reward rank 0"}
    assert run.incidents("rolled back") == run.incidents("given up") == []
    drawn_again = sum(line["count"] for line in run.incidents("replanned"))
    assert drawn_again % 2 == 0  # whole groups of two samples
