"""Machines that go, full stores, little shared memory, no network (FAULTS 12, 13, 29, 30): `make chaos`."""

import asyncio
import os
import time
from pathlib import Path

import pytest
import ray
import torch
from ray.cluster_utils import Cluster as Machines
from ray.util.placement_group import placement_group, placement_group_table

from actors.errors import RoleError
from actors.object_store import ObjectStore
from actors.ward import Ward
from launch.cluster import Cluster
from orchestrator.batch import Examples
from orchestrator.work import WorkBook
from tests.chaos.rig import rig
from tests.test_config import load
from tests.test_losses import Group, worker

ROOT = {"env_vars": {"PYTHONPATH": str(Path(__file__).parents[2])}}


async def test_a_worker_whose_machine_is_lost_goes_on_on_another(tmp_path: Path) -> None:
    incidents = []
    cluster = Machines(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    try:
        ray.init(address=cluster.address, log_to_driver=False, logging_level="error", runtime_env=ROOT)
        bundle = placement_group([{"CPU": 1}])
        assert bundle.wait(30)
        ward = Ward(tmp_path / "stacks", incidents.append, lambda lines: None, WorkBook())
        group = Group([worker(ward, bundle)], store=ObjectStore(), token_budget=1, restarts=3)
        await group.start(threads=1, seed=0, timeout_s=1)
        (where,) = placement_group_table(bundle)["bundles_to_node_id"].values()
        answer = asyncio.create_task(group.wait(2))
        await asyncio.sleep(0.5)
        cluster.remove_node(next(node for node in nodes if node.node_id == where), allow_graceful=False)
        assert (await asyncio.wait_for(answer, 120))[0] == group.workers[0].pid
        (there,) = placement_group_table(bundle)["bundles_to_node_id"].values()
        assert there != where
        assert {incident.kind for incident in incidents} == {"lost", "recovered"}
        await group.close()
    finally:
        ray.shutdown()
        cluster.shutdown()


def test_engines_that_are_lost_together_come_back_as_far_as_there_is_room(tmp_path: Path) -> None:
    """Two lose their machine; one of the size of one engine is left."""
    cluster = Machines(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        lost = cluster.add_node(num_cpus=2)
        ray.init(address=cluster.address, log_to_driver=False, logging_level="error")
        _, groups = Cluster(load("engine.replicas=2", f"run_dir={tmp_path}")).place(["engine"])
        cluster.add_node(num_cpus=1)
        cluster.remove_node(lost, allow_graceful=False)

        def states() -> list[str]:
            return sorted(placement_group_table(group)["state"] for group in groups)

        ends = time.monotonic() + 60
        while states() != ["CREATED", "RESCHEDULING"]:
            assert time.monotonic() < ends, states()
            time.sleep(0.2)
    finally:
        ray.shutdown()
        cluster.shutdown()


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small disk")
def test_a_batch_that_finds_no_room_is_named_with_its_size(tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    if os.system(f"mount -t tmpfs -o size=8m none {small}"):
        pytest.skip("mounts are not allowed here")
    try:
        ray.init(
            address="local", num_cpus=1, object_store_memory=80 * 2**20, include_dashboard=False,
            log_to_driver=False, logging_level="error", _plasma_directory="/dev/shm",
            object_spilling_directory=str(small),
            _system_config={"local_fs_capacity_threshold": 0.5},
        )  # fmt: skip
        tokens = torch.zeros(1000, 25_000, dtype=torch.int64)
        mask = torch.ones(1000, 25_000, dtype=torch.bool)
        records = Examples(tokens=tokens, attention_mask=mask, action_mask=mask)
        with pytest.raises(RoleError, match=r"a batch of 238 MB finds no room in Ray's object store"):
            ObjectStore().put(records)
    finally:
        ray.shutdown()
        os.system(f"umount {small}")


NO_NETWORK = (
    "env",
    "-u",
    "HF_HUB_OFFLINE",
    "unshare",
    "-n",
    "sh",
    "-c",
    'ip link set lo up && exec "$@"',
    "sh",
)


@pytest.mark.skipif(os.geteuid() != 0, reason="a network namespace needs root")
def test_a_run_on_local_files_needs_no_network(tmp_path: Path) -> None:
    """FAULTS 29."""
    with rig(tmp_path, "engine.replicas=1", "rl.steps=2") as run:
        run.within = NO_NETWORK
        run.finish()
        run.check()


LITTLE_SHM = ("unshare", "-m", "sh", "-c", 'mount -t tmpfs -o size=64m tmpfs /dev/shm && exec "$@"', "sh")


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small /dev/shm")
def test_a_run_on_a_machine_with_little_shared_memory_says_so_and_ends_as_it_should(tmp_path: Path) -> None:
    """FAULTS 30. Ray takes its disk instead."""
    with rig(tmp_path, "engine.replicas=1", "rl.steps=2") as run:
        run.within = LITTLE_SHM
        run.finish()
        run.check()
        assert "/dev/shm has only 67108864 bytes available" in run.log()
