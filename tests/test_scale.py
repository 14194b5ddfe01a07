"""Engines that join and leave a run at work: a fleet with fakes, and what the command refuses."""

import asyncio
import fcntl
import os
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from ray.util.placement_group import placement_group_table

from actors.elastic_fleet import ElasticFleet
from launch.cli import main
from launch.cluster import Cluster, PlacementError
from launch.scale import BY_COMMAND, Wish, ask, asked, forget_older
from orchestrator.config import Run
from orchestrator.configfile import write_run
from tests.test_config import load
from tests.test_fleet import SAMPLING, FakeEngine, FakePolicy, prompt, sync


def fleet_of(engines: list[FakeEngine]) -> ElasticFleet:
    return ElasticFleet(engines, run_seed=3, workers=2, restarts=3)


async def test_an_engine_that_joins_has_the_weights_of_the_others_before_it_is_asked() -> None:
    first, second = FakeEngine(open=True), FakeEngine(open=True)
    policy = FakePolicy([first, second])
    fleet = fleet_of([first])
    await sync(fleet, policy, 1)
    second.serves = False  # with the weights of the model folder
    await fleet.join(second, 3)
    assert (fleet.size, second.version, policy.sent) == (2, 1, [1, 1])
    rollouts = await asyncio.gather(*(fleet.generate(prompt(row), 1, SAMPLING) for row in range(2)))
    assert [sample.versions[-1] for group in rollouts for sample in group] == [1, 1]
    assert (len(first.asked), len(second.asked)) == (1, 1)
    assert len(await sync(fleet, policy, 2)) == 4  # both have two workers
    assert policy.widths == [2, 2, 4]  # one engine, the one that joined, both


async def test_an_engine_that_joins_before_the_first_sync_serves_at_once() -> None:
    first, second = FakeEngine(open=True), FakeEngine(open=True)
    fleet = fleet_of([first])
    await fleet.join(second, 3)
    await asyncio.gather(*(fleet.generate(prompt(row), 1, SAMPLING) for row in range(2)))
    assert (len(first.asked), len(second.asked)) == (1, 1)


async def test_an_engine_that_leaves_answers_what_it_was_asked_and_gets_nothing_more() -> None:
    first, second = FakeEngine(open=True), FakeEngine()
    fleet = fleet_of([first, second])
    second_asked = [asyncio.create_task(fleet.generate(prompt(row), 1, SAMPLING)) for row in range(2)]
    await asyncio.sleep(0.01)
    leaving = asyncio.create_task(fleet.leave())
    await asyncio.sleep(0.01)
    await asyncio.gather(*(fleet.generate(prompt(row), 1, SAMPLING) for row in range(2, 6)))
    assert (fleet.size, len(second.asked), second.closed, leaving.done()) == (1, 1, False, False)
    second.gate.set()
    groups = await asyncio.gather(*second_asked)
    assert await leaving is second
    assert second.closed and [group[0].prompt.uid for group in groups] == ["0/0", "0/1"]
    policy = FakePolicy([first])
    assert len(await sync(fleet, policy, 1)) == 2


async def test_an_engine_that_is_lost_while_it_leaves_has_its_samples_drawn_by_another() -> None:
    first, second = FakeEngine(open=True), FakeEngine()
    fleet = fleet_of([first, second])
    asked = [asyncio.create_task(fleet.generate(prompt(row), 1, SAMPLING)) for row in range(2)]
    await asyncio.sleep(0.01)
    leaving = asyncio.create_task(fleet.leave())
    await asyncio.sleep(0.01)
    second.kill()
    groups = await asyncio.gather(*asked)
    assert await leaving is second
    assert [group[0].prompt.uid for group in groups] == ["0/0", "0/1"]
    assert (second.lives, [uid for uid, *_ in first.asked]) == (1, ["0/0", "0/1"])


async def test_an_engine_that_leaves_answers_the_probe_first() -> None:
    first, second = FakeEngine(open=True), FakeEngine(open=True)
    second.scores.clear()
    fleet = fleet_of([first, second])
    probe = asyncio.create_task(fleet.logprobs([1, 2]))
    await asyncio.sleep(0.01)
    leaving = asyncio.create_task(fleet.leave())
    await asyncio.sleep(0.01)
    assert (second.closed, leaving.done()) == (False, False)
    second.scores.set()
    assert await probe == [[0.0], [0.0]]
    assert await leaving is second and second.closed


async def test_an_engine_that_dies_while_it_is_closed_has_left() -> None:
    first, second = FakeEngine(open=True), FakeEngine(open=True)
    fleet = fleet_of([first, second])
    second.kill()
    assert await fleet.leave() is second
    assert (fleet.size, second.lives) == (1, 1)
    await fleet.generate(prompt(0), 1, SAMPLING)
    assert len(first.asked) == 1


async def test_an_engine_leaves_between_two_syncs_not_inside_one() -> None:
    engines = [FakeEngine(open=True), FakeEngine(open=True)]
    fleet, policy = fleet_of(engines), FakePolicy(engines)
    syncing = asyncio.create_task(sync(fleet, policy, 1))
    await asyncio.sleep(0.005)
    leaving = asyncio.create_task(fleet.leave())
    await asyncio.gather(syncing, leaving)
    assert [engine.version for engine in engines] == [1, 1]
    assert (await sync(fleet, policy, 2), policy.widths) == (["rank 1", "rank 2"], [4, 2])


async def test_who_asks_while_the_other_engine_is_replaced_waits_for_it() -> None:
    first, second = FakeEngine(), FakeEngine(open=True)
    fleet = fleet_of([first, second])
    asked = asyncio.create_task(fleet.generate(prompt(0), 1, SAMPLING))
    await asyncio.sleep(0.01)
    first.kill()  # its successor is on its way when the next line asks
    await asyncio.sleep(0)
    leaving = asyncio.create_task(fleet.leave())
    first.gate.set()
    await asked
    assert await leaving is second
    assert (first.lives, fleet.size) == (2, 1)


async def test_the_last_engine_stays() -> None:
    fleet = fleet_of([FakeEngine(open=True)])
    with pytest.raises(ValueError, match="the last one cannot leave"):
        await fleet.leave()


@pytest.mark.ray
async def test_devices_that_are_not_granted_leave_no_request_behind(tmp_path) -> None:
    """In a Ray of our own, though somebody has left word of another one on this machine."""
    wanted = os.cpu_count() + 1
    fields = (f"run_dir={tmp_path}", f"engine.cpus_per_worker={wanted}", "placement.timeout_s=1")
    with TemporaryDirectory(prefix="q") as short, pytest.MonkeyPatch.context() as patch:  # paths of sockets
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("RAY_TMPDIR", short)
        patch.delenv("RAY_ADDRESS", raising=False)
        (Path(short) / "ray").mkdir()
        (Path(short) / "ray" / "ray_current_cluster").write_text("127.0.0.1:1")
        with Cluster(load(*fields)) as cluster:
            with pytest.raises(PlacementError, match=f"wants {wanted} CPU; the cluster has {wanted - 1}"):
                await cluster.one_more_engine()
            asked = asyncio.create_task(cluster.one_more_engine())
            await asyncio.sleep(0.5)
            asked.cancel()  # the run is over
            with pytest.raises(asyncio.CancelledError):
                await asked
            states = [group["state"] for group in placement_group_table().values()]
            assert states == ["REMOVED", "REMOVED"]


def run_in(folder, **fields) -> Run:
    roles = {"reward": {"function": "exact_match"}}
    tree = {"model": {"path": "m"}, "run_dir": str(folder), "rl": {}, "roles": roles, **fields}
    write_run(Run(**tree), folder / "config.yaml")
    return Run(**tree)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("engine=0", "'0' is no number of engines; give 1 or more"),
        ("engine=-1", "'-1' is no number of engines"),
        ("engine=two", "'two' is no number of engines"),
        ("actor=2", "quartet train ... roles.actor.workers=2 --resume"),
        ("judge=2", "unknown role 'judge'"),
    ],
)
def test_numbers_and_roles_that_cannot_be_are_refused(tmp_path, capsys, change, says):
    run = run_in(tmp_path)
    assert main(["scale", str(tmp_path), change]) == 2
    assert says in capsys.readouterr().err
    assert asked(run, tmp_path) is None


def test_a_run_that_is_not_at_work_or_shares_its_devices_is_refused(tmp_path, capsys):
    assert main(["scale", str(tmp_path), "engine=2"]) == 2
    assert "is no run_dir of a run" in capsys.readouterr().err
    run_in(tmp_path)
    assert main(["scale", str(tmp_path), "engine=2"]) == 2
    assert "no run is at work" in capsys.readouterr().err
    run_in(tmp_path, placement={"share": [["actor", "engine"]]})
    assert main(["scale", str(tmp_path), "engine=2"]) == 2
    assert "live on the devices of actor" in capsys.readouterr().err


def test_the_number_is_where_the_run_at_work_looks_for_it(tmp_path, capsys):
    run = run_in(tmp_path, engine={"autoscale": {"max": 3}})
    lock = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    try:
        assert main(["scale", str(tmp_path), "engine=3"]) == 0
        assert main(["scale", str(tmp_path), "engine=4"]) == 2
    finally:
        os.close(lock)
    assert "engine=4: the run moves the number itself, between engine.autoscale.min=1 and max=3" in (
        capsys.readouterr().err
    )
    assert asked(run, tmp_path) == Wish(engines=3, by=BY_COMMAND)


def test_a_resume_keeps_the_number_unless_it_brings_another(tmp_path):
    started = run_in(tmp_path, engine={"replicas": 2})
    ask(started, tmp_path, Wish(engines=4, by=BY_COMMAND))
    forget_older(started, tmp_path)
    assert asked(started, tmp_path) == Wish(engines=4, by=BY_COMMAND)
    resumed = run_in(tmp_path, engine={"replicas": 3})
    assert asked(resumed, tmp_path) is None
    forget_older(resumed, tmp_path)
    assert asked(started, tmp_path) is None  # what was asked before does not come back with the old number


def test_a_resume_with_other_bounds_keeps_what_they_allow_of_the_number(tmp_path):
    started = run_in(tmp_path, engine={"replicas": 2, "autoscale": {"max": 8}})
    ask(started, tmp_path, Wish(engines=6, by=BY_COMMAND))
    resumed = run_in(tmp_path, engine={"replicas": 2, "autoscale": {"max": 4}})
    assert asked(resumed, tmp_path) == Wish(engines=4, by=BY_COMMAND)
