"""Plain workers behind a real Ray are killed, stopped and stalled: how soon it is seen, and what follows."""

import asyncio
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import ray
import torch
from ray.exceptions import ObjectLostError
from ray.util.placement_group import placement_group

from actors.all_ranks import all_ranks
from actors.errors import RoleError, WorkerLost, broke_collective, remedy
from actors.group import LearnerGroup, WorkerGroup
from actors.object_store import ObjectStore
from actors.remote_engine import RemoteEngine
from actors.remote_worker import RemoteWorker, _kill, spawn
from actors.stall import StallClock
from actors.vital_signs import Pulse, VitalSigns, core_waits
from actors.ward import Ward
from orchestrator.config import Deadlines
from orchestrator.incidents import Incident, RestartsSpent
from orchestrator.placement import Seat
from orchestrator.work import WorkBook
from tests.slow_worker import Late, Parent, Ranked, Slow

pytestmark = pytest.mark.ray
DEADLINES = Deadlines(start_s=60, call_s=40, silence_s=2, stall_s=3)


class Group(WorkerGroup):
    replaceable = True

    async def wait(self, seconds: float) -> list[int]:
        return await asyncio.gather(*(self._ask(w, w.handle.wait, seconds) for w in self.workers))


class Trainers(LearnerGroup):
    """Rank 1 may stay away."""

    async def total(self, skips: bool) -> list[float]:
        return await all_ranks(w.call(w.handle.total, skips and k == 1) for k, w in enumerate(self.workers))


@pytest.fixture(scope="module", autouse=True)
def cluster():
    root = {"env_vars": {"PYTHONPATH": str(Path(__file__).parents[1])}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")  # read when ray is imported, which another test has done
        ray.init(
            address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error",
            runtime_env=root,
        )  # fmt: skip
        yield
        ray.shutdown()


@pytest.fixture(scope="module")
def bundle(cluster):
    group = placement_group([{"CPU": 1}])
    assert group.wait(30)
    return group


@pytest.fixture
def incidents() -> list[Incident]:
    return []


@pytest.fixture
def ward(tmp_path: Path, incidents: list[Incident]) -> Ward:
    return Ward(tmp_path / "stacks", incidents.append, lambda lines: None, WorkBook())


def worker(ward: Ward, bundle, who: str = "slow rank 0", cls: type = Slow) -> RemoteWorker:
    seat = Seat(group=0, bundle=0, resources={"CPU": 0.25})
    return spawn(cls, who=who, seat=seat, group=bundle, env={}, deadlines=DEADLINES, ward=ward)


async def group_of(ward: Ward, bundle, *, size: int = 1, restarts: int = 1) -> Group:
    workers = [worker(ward, bundle, f"slow rank {k}") for k in range(size)]
    group = Group(workers, store=ObjectStore(), token_budget=1, restarts=restarts)
    await group.start(threads=1, seed=0, timeout_s=1)
    return group


async def test_a_killed_worker_is_seen_at_once_and_its_successor_is_asked_again(
    ward, bundle, incidents
) -> None:
    group = await group_of(ward, bundle)
    pid = group.workers[0].pid
    answer = asyncio.create_task(group.wait(1))
    await asyncio.sleep(0.3)
    os.kill(pid, signal.SIGKILL)
    killed = time.monotonic()
    while not incidents:
        await asyncio.sleep(0.01)
    assert time.monotonic() - killed < 1
    assert (await answer)[0] != pid
    assert [incident.kind for incident in incidents] == ["lost", "recovered"]
    assert f"pid {pid}" not in incidents[0].who and incidents[0].pid == pid
    os.kill(group.workers[0].pid, signal.SIGKILL)
    with pytest.raises(RestartsSpent, match="slow rank 0 has no restarts left"):
        await group.wait(1)
    await group.close()


async def test_a_stopped_worker_is_found_by_its_silence_killed_by_pid_and_named(
    ward, bundle, incidents, tmp_path
) -> None:
    group = await group_of(ward, bundle, size=2)
    slow = group.workers[0]
    pid, name = slow.pid, slow.name
    answer = asyncio.create_task(slow.call(slow.handle.spin, 20))
    await asyncio.sleep(0.5)
    os.kill(pid, signal.SIGSTOP)
    stopped = time.monotonic()
    with pytest.raises(WorkerLost) as lost:
        await answer
    assert time.monotonic() - stopped < 2 * DEADLINES.silence_s + 3
    assert name in str(lost.value) and "in spin" in str(lost.value)
    with pytest.raises(psutil.NoSuchProcess):
        for _ in range(100):
            psutil.Process(pid)
            await asyncio.sleep(0.05)
    (stacks,) = (tmp_path / "stacks").iterdir()
    assert "slow rank 1" in stacks.read_text() and "no stacks" in stacks.read_text()
    await group.close()


async def test_work_is_no_stall_and_waiting_for_ever_is_one(ward, bundle) -> None:
    group = await group_of(ward, bundle)
    slow = group.workers[0]
    assert await slow.call(slow.handle.spin, DEADLINES.stall_s + 2) == slow.pid
    with pytest.raises(WorkerLost, match=r"made no progress for 3 s; it was in wait .* stacks in"):
        await slow.call(slow.handle.wait, 30)
    await group.close()


async def test_work_in_python_with_many_threads_lets_the_pulse_through(ward, bundle, incidents) -> None:
    """Each of the pulse's reads has to win the interpreter from the work; there is one for every thread."""
    group = await group_of(ward, bundle)
    slow = group.workers[0]
    await slow.call(slow.handle.crowd, 300)
    assert await slow.call(slow.handle.spin, 3 * DEADLINES.silence_s) == slow.pid
    assert incidents == []
    await group.close()


async def test_a_late_pulse_is_a_sign_of_life(ward, bundle, incidents) -> None:
    slow = worker(ward, bundle, cls=Late)
    slow.attend([await slow.call(slow.handle.describe)], ready=True)
    assert await slow.call(slow.handle.spin, 3 * DEADLINES.silence_s) == slow.pid
    assert incidents == []
    slow.dismiss()


async def test_a_call_past_its_deadline_ends_the_worker(ward, bundle) -> None:
    group = await group_of(ward, bundle)
    slow = group.workers[0]
    with pytest.raises(WorkerLost, match="did not answer spin within 1 s"):
        await slow.call(slow.handle.spin, 20, deadline_s=1)
    with pytest.raises(WorkerLost, match="did not answer spin"):  # it stays lost
        await slow.call(slow.handle.wait, 0)
    slow.revive()
    assert await slow.call(slow.handle.wait, 0) > 0
    await group.close()


async def test_a_worker_for_which_no_host_has_room_says_so_at_its_deadline(ward, bundle) -> None:
    full = [worker(ward, bundle, f"slow rank {k}") for k in range(5)]  # of a quarter of a CPU each
    for slow in full[:4]:
        await slow.call(slow.handle.wait, 0)
    with pytest.raises(WorkerLost, match="slow rank 4 did not answer describe within 1 s; it never began"):
        await full[4].call(full[4].handle.describe, deadline_s=1)
    for slow in full:
        slow.end()


async def test_late_answers_of_a_process_that_was_given_up_are_dropped_and_counted(
    ward, bundle, incidents
) -> None:
    group = await group_of(ward, bundle)
    slow = group.workers[0]
    answer = asyncio.create_task(slow.call(slow.handle.wait, 1))
    await asyncio.sleep(0.3)
    slow.lose("was thought to be dead")
    with pytest.raises(WorkerLost, match="thought to be dead"):
        await answer
    await asyncio.sleep(1.2)
    assert [incident.kind for incident in incidents] == ["lost", "late answer"]
    await group.close()


async def test_a_worker_that_says_a_part_of_it_is_gone_is_lost(ward, bundle) -> None:
    group = await group_of(ward, bundle)
    slow = group.workers[0]
    with pytest.raises(WorkerLost, match="a child is gone"):
        await slow.call(slow.handle.half_dead)
    assert slow.lost
    await group.close()


@pytest.mark.slow
@pytest.mark.parametrize("how", ["killed", "skips a collective"])
async def test_a_broken_collective_names_its_rank_and_the_group_is_built_anew(
    ward, bundle, tmp_path, how
) -> None:
    """FAULTS 3, 27."""
    workers = [worker(ward, bundle, f"slow rank {k}", Ranked) for k in range(2)]
    group = Trainers(workers, store=ObjectStore(), token_budget=1, restarts=1)
    await group.start(threads=1, seed=0, timeout_s=2)
    assert await group.total(skips=False) == [2.0, 2.0]
    answer = asyncio.create_task(group.total(skips=how != "killed"))
    if how == "killed":
        os.kill(workers[1].pid, signal.SIGKILL)
    named = "slow rank 1 .*died" if how == "killed" else "slow rank [01] .*(Timed out|made no progress)"
    with pytest.raises(WorkerLost, match=named):
        await answer
    assert group.lost
    if how != "killed":
        (stacks, *_) = sorted((tmp_path / "stacks").iterdir())
        assert "slow rank 1" in stacks.read_text() and "in total" in stacks.read_text()
    await group.rebuild()
    assert await group.total(skips=False) == [2.0, 2.0]
    await group.close()


async def test_children_that_end_while_an_engine_is_closed_are_no_loss(ward, bundle, incidents) -> None:
    engine = RemoteEngine(worker(ward, bundle, "engine 0", Parent))
    await engine.start()
    await engine.close()
    assert incidents == []


async def test_an_answer_that_is_lost_with_its_host_is_the_loss_of_the_worker(ward, bundle) -> None:
    slow = worker(ward, bundle)
    answer = asyncio.get_running_loop().create_future()
    answer.set_exception(ObjectLostError("ab" * 14, None, ""))
    with pytest.raises(WorkerLost, match="slow rank 0 died in generate: Failed to retrieve object abab"):
        slow._outcome(answer, "generate", slow._loss())
    assert slow.lost
    slow.end()


def test_pids_of_another_host_are_left_alone() -> None:
    with subprocess.Popen(["sleep", "60"]) as sleeper:
        _kill("another-host", [sleeper.pid])
        time.sleep(0.1)
        assert sleeper.poll() is None
        _kill(socket.gethostname(), [sleeper.pid])
        assert sleeper.wait(5) == -signal.SIGKILL


async def test_a_port_that_somebody_has_taken_ends_the_start_with_the_rank_and_the_cause(
    ward, bundle
) -> None:
    """FAULTS 30."""
    workers = [worker(ward, bundle, f"slow rank {k}", Ranked) for k in range(2)]
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        here = taken.getsockname()
        first = workers[0]
        with pytest.raises(RoleError, match=r"slow rank 0 failed in setup: .*address already in use"):
            await first.call(first.handle.setup, 0, 2, *here, 1, 0, 1.0)
    for one in workers:
        one.dismiss()


async def test_a_loss_after_the_kernel_took_memory_says_so_once(
    ward, bundle, incidents, tmp_path, monkeypatch
) -> None:
    """FAULTS 30."""
    counters = tmp_path / "vmstat"
    counters.write_text("nr_free_pages 9\noom_kill 3\n")
    monkeypatch.setattr("actors.ward.KERNEL_COUNTERS", counters)
    ward._oom_kills = 2
    assert "OOM killer ended 1 processes" in ward.memory_hint() and ward.memory_hint() == ""
    counters.write_text("oom_kill 5\n")
    assert worker(ward, bundle).lose("died") == "slow rank 0 died" + (
        "; the kernel's OOM killer ended 2 processes of this machine since the last loss: lower "
        "micro_batch_tokens or kv_cache_mb, or take more memory"
    )
    assert incidents[0].detail.startswith("died; the kernel's OOM killer")


async def test_a_worker_that_gets_no_more_memory_names_what_to_lower_and_lives(ward, bundle) -> None:
    """FAULTS 30."""
    group = await group_of(ward, bundle)
    slow = group.workers[0]
    limit = psutil.Process(slow.pid).memory_info().vms + 2**28
    resource.prlimit(slow.pid, resource.RLIMIT_AS, (limit, limit))
    named = r"slow rank 0 \(pid \d+ on .*\) failed in eat: MemoryError\(\); lower micro_batch_tokens or kv_"
    with pytest.raises(RoleError, match=named) as error:
        await slow.call(slow.handle.eat, 2**30)
    assert not isinstance(error.value, WorkerLost)
    assert await slow.call(slow.handle.wait, 0) == slow.pid
    await group.close()


def test_what_torch_says_when_there_is_no_memory_has_a_remedy_and_other_errors_have_none() -> None:
    with pytest.raises(RuntimeError) as error:
        torch.empty(2**55, dtype=torch.uint8)
    assert remedy(error.value).startswith("; lower micro_batch_tokens")
    assert remedy(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")) != ""
    assert remedy(RuntimeError("shape mismatch")) == remedy(None) == ""


def test_a_pulse_counts_work_and_stacks_name_the_function() -> None:
    signs = VitalSigns()
    before = signs.pulse()
    assert isinstance(before, Pulse) and before.stopped == ()
    sum(range(3_000_000))
    assert signs.pulse().progress > before.progress
    assert "test_a_pulse_counts_work" in signs.stacks()


def test_a_thread_that_gets_no_core_has_waited_for_one() -> None:
    """Two processes want the same core all the time: each waits half of it."""
    code = "import os; os.sched_setaffinity(0, {0})\nwhile True: pass"
    spinners = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(2)]
    try:
        while min(psutil.Process(one.pid).cpu_times().user for one in spinners) < 0.3:
            time.sleep(0.02)
        assert max(core_waits(one.pid)[one.pid] for one in spinners) > 0.1
        assert threading.get_native_id() in core_waits(os.getpid()) and core_waits(2**30) == {}
    finally:
        for one in spinners:
            one.kill()


def test_only_who_could_work_and_does_not_stands_still() -> None:
    now = 100.0
    stall = StallClock(10.0, clock=lambda: now)

    def after(seconds: float, busy: bool = True, **pulse) -> float:
        nonlocal now
        now += seconds
        return stall.stalled_s(Pulse(**pulse), busy=busy)

    assert after(5, progress=3.0) == 0  # it worked
    assert after(5, progress=3.0) == 5
    assert after(5, progress=3.1) == 10  # 0.1 s in 10: that is waiting
    assert after(5, progress=3.5) == 0  # more than 0.02 x 15 + 0.1
    assert after(5, progress=3.5, busy=False) == 0
    assert after(5, progress=3.5, held=True) == 0
    assert after(8, progress=3.5, waited={1: 7.0, 2: 3.0}) == 1  # a thread of it had no core for 7 of 8 s
    assert after(8, progress=3.5, waited={1: 7.0, 2: 9.0}) == 7  # another one for 9 of 16 s
    assert after(30, progress=3.5, waited={1: 7.0, 2: 9.0}) == 0  # for 30 s nobody looked
    assert after(9, progress=3.5, waited={1: 7.5, 2: 9.0}) == 8.5  # what it waited before is over
    assert after(1, progress=3.5, waited={2: 9.0}) == 10  # the thread that waited has ended
    assert after(9, progress=1.0) == 0  # it has loaded: only those are counted that work now
    assert after(9, progress=1.5) == 0


@pytest.mark.parametrize(
    ("cause", "verb", "broke"),
    [
        (
            RuntimeError("[/third_party/gloo/gloo/pair.cc:537] Read error"),
            "score",
            True,
        ),
        (
            RuntimeError("[/gloo/unbound_buffer.cc:78] Timed out waiting"),
            "update_rows",
            True,
        ),
        (RuntimeError("Application timeout caused pair closure"), "save", True),
        (
            RuntimeError("[/gloo/pair.cc] Connection closed by peer"),
            "send_weights",
            False,
        ),  # an engine's death
        (RuntimeError("shape mismatch"), "update_rows", False),
        (ValueError("/gloo/"), "update_rows", False),
        (None, "update_rows", False),
    ],
)
def test_which_errors_say_that_the_ranks_are_apart(cause, verb, broke) -> None:
    assert broke_collective(cause, verb) is broke
