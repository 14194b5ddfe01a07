"""One consistent checkpoint whatever happens: a kill or a full disk at every filesystem call, flipped bits,
cut files, and which checkpoints stay."""

import asyncio
import errno
import json
import os
import random
import shutil

import pytest

from orchestrator.checkpoint import MANIFEST, CheckpointError, Checkpoints, Retention, verify
from orchestrator.driver_state import DriverState
from orchestrator.durable import Disk, replace_durably
from orchestrator.shaping import RunningStats
from tests.fakes import FakeLearner

LAST_TWO = Retention(last=2)


def save(checkpoints, learners, step, score=None):
    state = DriverState(step=step, kl_coef=0.1 * step, rewards=RunningStats())
    learners = learners if isinstance(learners, dict) else {"actor": learners}
    return asyncio.run(checkpoints.save(state, learners, {"num_settled": step}, score=score))


def test_a_checkpoint_comes_back_with_its_step_and_ledger(tmp_path):
    checkpoints, learner = Checkpoints(tmp_path, keep=LAST_TWO), FakeLearner()
    for step in (1, 2, 3):
        learner.updates = 10 * step
        save(checkpoints, learner, step)
    found = checkpoints.latest()
    assert (found.manifest.step, found.manifest.ledger, found.damaged) == (3, {"num_settled": 3}, [])
    assert DriverState.restored(found.manifest.driver).kl_coef == 0.1 * 3  # to the last bit (BUGS E5)
    assert (found.folder / "actor" / "state").read_text() == "30"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000002", "step-00000003"]


def test_an_unfinished_checkpoint_is_not_seen_and_goes_with_the_next_save(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=LAST_TWO)
    save(checkpoints, FakeLearner(), 1)
    (tmp_path / "tmp-00000002" / "actor").mkdir(parents=True)
    assert checkpoints.latest().manifest.step == 1
    save(checkpoints, FakeLearner(), 3)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000001", "step-00000003"]


def test_a_manifest_names_every_file(tmp_path):
    folder = save(Checkpoints(tmp_path, keep=LAST_TWO), FakeLearner(), 5)
    assert list(json.loads((folder / MANIFEST).read_text())["files"]) == ["actor/state"]


# the end of the world


class Killed(BaseException):
    """No handler of the code under test may see it, as none sees SIGKILL."""


class Dying(Disk):
    """Ends the world at call number ``at``; bytes that were not synced by then are lost.

    Learners write through ``write`` too. A write that fails leaves half its bytes. ``full``: instead, that
    call and all later writes find a full disk.
    """

    def __init__(self, at=10**9, *, full=False):
        self.calls, self.at, self.full, self.unsynced = 0, at, full, set()

    def count(self):
        self.calls += 1
        if self.full and self.calls >= self.at:
            raise OSError(errno.ENOSPC, "No space left on device")
        if self.calls == self.at:
            raise Killed

    def make_folder(self, path):
        self.count()
        super().make_folder(path)

    def write(self, path, data):
        self.unsynced.add(path)
        try:
            self.count()
        except BaseException:
            super().write(path, data[: len(data) // 2])
            raise
        super().write(path, data)

    def sync(self, path):
        self.count()
        super().sync(path)
        self.unsynced.discard(path)

    def rename(self, source, target):
        self.count()
        super().rename(source, target)
        self.unsynced = {target / p.relative_to(source) if source in p.parents else p for p in self.unsynced}

    def remove(self, path):
        if not self.full:  # a full disk still deletes
            self.count()
        super().remove(path)

    def lose_power(self):
        for path in self.unsynced:
            if path.exists():
                path.write_bytes(b"")


class Writer(FakeLearner):
    """Saves two files whose content is its number of updates."""

    def __init__(self, disk):
        super().__init__()
        self.disk = disk

    async def save(self, folder, background=False):
        self.disk.make_folder(folder)
        for name in ("weights", "moments"):
            self.disk.write(folder / name, f"{name} after {self.updates}".encode() * 50)


def three_saves(folder, disk, *, keep, background=False):
    """Steps 1, 2 and 3 of an actor and a critic; answers the steps whose save returned or settled."""
    learners = {"actor": Writer(disk), "critic": Writer(disk)}
    checkpoints, done = Checkpoints(folder, keep=keep, disk=disk, background=background), []

    async def run():
        for step in (1, 2, 3):
            for learner in learners.values():
                learner.updates = step
            state = DriverState(step=step, kl_coef=0.0, rewards=RunningStats())
            await checkpoints.save(state, learners, {"num_settled": step})
            await checkpoints.settle()
            done.append(step)

    return run, done


def one_consistent_set(folder, done):
    """All files of the set that loads are of its step, and no step that was reported is lost."""
    found = Checkpoints(folder, keep=LAST_TWO).latest()
    assert found is not None or not done
    if found is None:
        return 0
    step = found.manifest.step
    assert found.damaged == [] and step >= (done or [0])[-1]
    files = sorted(str(p.relative_to(found.folder)) for p in found.folder.rglob("*") if p.is_file())
    assert files == ["actor/moments", "actor/weights", "critic/moments", "critic/weights", MANIFEST]
    for name in files[:4]:
        assert (found.folder / name).read_text() == f"{name.split('/')[1]} after {step}" * 50
    return step


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("keep", [1, 2])
@pytest.mark.parametrize("full", [False, True])
def test_a_kill_or_a_full_disk_at_any_call_leaves_one_consistent_set(tmp_path, full, keep, background):
    """FAULTS 16, 17; BUGS E6."""
    whole, kept = Dying(full=full), Retention(last=keep)
    run, done = three_saves(tmp_path / "whole", whole, keep=kept, background=background)
    (tmp_path / "whole").mkdir()
    asyncio.run(run())
    assert done == [1, 2, 3] and one_consistent_set(tmp_path / "whole", done) == 3
    loaded = set()
    for at in range(1, whole.calls + 1):
        folder, disk = tmp_path / f"at-{at}", Dying(at, full=full)
        folder.mkdir()
        run, done = three_saves(folder, disk, keep=kept, background=background)
        with pytest.raises(OSError if full else Killed):
            asyncio.run(run())
        if not full:
            disk.lose_power()
        loaded.add(one_consistent_set(folder, done))
        save(Checkpoints(folder, keep=kept), FakeLearner(), 4)  # and the run goes on from there
        assert Checkpoints(folder, keep=kept).latest().manifest.step == 4
        assert not list(folder.glob("tmp-*")) and len(list(folder.iterdir())) <= keep
    assert loaded == {0, 1, 2, 3} if not full else {0, 1, 2} <= loaded
    assert whole.calls > 50


def test_the_old_checkpoint_stays_until_the_new_one_is_on_disk(tmp_path):
    class Watching(Disk):
        def rename(self, source, target):
            names = sorted(p.name for p in tmp_path.iterdir())
            seen.append((source.name, names))
            super().rename(source, target)

    seen = []
    checkpoints = Checkpoints(tmp_path, keep=Retention(last=1), disk=Watching())
    for step in (1, 2):
        save(checkpoints, FakeLearner(), step)
    assert seen[1:] == [
        ("tmp-00000002", ["step-00000001", "tmp-00000002"]),
        ("step-00000001", ["step-00000001", "step-00000002"]),
    ]


def test_a_checkpoint_is_synced_before_and_after_it_has_its_name(tmp_path):
    """BUGS E6: first every byte, then the name, then the folder that holds the name; only then is one
    deleted."""

    class Watching(Disk):
        def sync(self, path):
            super().sync(path)
            seen.append(("sync", str(path.relative_to(tmp_path))))

        def rename(self, source, target):
            super().rename(source, target)
            seen.append(("rename", source.name))

    seen = []
    checkpoints = Checkpoints(tmp_path, keep=Retention(last=1), disk=Watching())
    save(checkpoints, FakeLearner(), 1)
    seen.clear()
    save(checkpoints, FakeLearner(), 2)
    named = seen.index(("rename", "tmp-00000002"))
    draft = ["tmp-00000002", *(f"tmp-00000002/{name}" for name in ("actor", "actor/state", MANIFEST))]
    assert sorted(seen[:named]) == sorted(("sync", name) for name in draft)
    assert seen[named + 1 :] == [("sync", "."), ("rename", "step-00000001")]


def test_a_sync_reaches_the_operating_system(tmp_path, monkeypatch):
    synced, fsync = [], os.fsync

    def watched(descriptor):
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", watched)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "file").write_text("x")
    Disk().sync_tree(tmp_path)
    assert synced == [str(tmp_path / "a" / "file"), str(tmp_path / "a"), str(tmp_path)]


def test_a_replaced_file_is_the_old_one_or_the_new_one(tmp_path):
    """A second name of the old file still has the old text: nothing was written over it."""
    file = tmp_path / "file"
    file.write_text("old")
    os.link(file, tmp_path / "second")
    replace_durably(file, "new")
    assert (file.read_text(), (tmp_path / "second").read_text()) == ("new", "old")
    assert len(list(tmp_path.iterdir())) == 2


# damage


def damaged_run(folder):
    """Two good checkpoints with files of some size."""
    disk = Disk()
    for step in (1, 2):
        learners = {"actor": Writer(disk), "critic": Writer(disk)}
        for learner in learners.values():
            learner.updates = step
        save(Checkpoints(folder, keep=LAST_TWO), learners, step)
    return sorted(p for p in (folder / "step-00000002").rglob("*") if p.is_file())


def previous_is_used(folder):
    found = Checkpoints(folder, keep=LAST_TWO).latest()
    assert found.manifest.step == 1 and len(found.damaged) == 1 and "step-00000002" in found.damaged[0]


def test_every_flipped_bit_is_found_and_the_previous_step_used(tmp_path):
    """FAULTS 18: 200 of 200."""
    files, rng = damaged_run(tmp_path), random.Random(0)
    for number in range(200):
        path = files[number % len(files)]
        good = path.read_bytes()
        bad = bytearray(good)
        bad[rng.randrange(len(bad))] ^= 1 << rng.randrange(8)
        path.write_bytes(bad)
        previous_is_used(tmp_path)
        path.write_bytes(good)
    assert Checkpoints(tmp_path, keep=LAST_TWO).latest().manifest.step == 2


def test_every_truncation_is_found_and_the_previous_step_used(tmp_path):
    """20 of 20: weights and manifest cut at every tenth, zero length included."""
    files = damaged_run(tmp_path)
    cuts = 0
    for path in (files[0], files[-1]):
        good = path.read_bytes()
        for tenth in range(10):
            path.write_bytes(good[: len(good) * tenth // 10])
            previous_is_used(tmp_path)
            cuts += 1
        path.write_bytes(good)
    assert cuts == 20


@pytest.mark.parametrize("name", ["actor/weights", MANIFEST])
def test_a_missing_file_is_found(tmp_path, name):
    damaged_run(tmp_path)
    (tmp_path / "step-00000002" / name).unlink()
    previous_is_used(tmp_path)


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_over(tmp_path):
    damaged_run(tmp_path)
    for step in (1, 2):
        (tmp_path / f"step-0000000{step}" / "actor" / "moments").write_text("")
    with pytest.raises(CheckpointError, match=r"every checkpoint is damaged(.|\n)*--fresh"):
        Checkpoints(tmp_path, keep=LAST_TWO).latest()
    assert Checkpoints(tmp_path / "empty", keep=LAST_TWO).latest() is None


def test_a_step_that_was_damaged_can_be_saved_again_and_costs_no_good_one(tmp_path):
    damaged_run(tmp_path)
    (tmp_path / "step-00000002" / "actor" / "weights").write_text("")
    checkpoints = Checkpoints(tmp_path, keep=LAST_TWO)
    assert checkpoints.latest().manifest.step == 1
    folder = save(checkpoints, FakeLearner(), 2)
    assert verify(folder).step == 2
    assert Checkpoints(tmp_path, keep=LAST_TWO).latest().folder == folder
    assert (tmp_path / "step-00000001").exists()


# which stay


def steps_left(folder, keep, scores):
    for step, score in enumerate(scores, start=1):
        save(Checkpoints(folder, keep=keep), FakeLearner(), step, score)
    return sorted(int(p.name.removeprefix("step-")) for p in folder.iterdir())


def test_last_every_and_best_stay(tmp_path):
    scores = [0.1, 0.9, 0.5, 0.9, 0.2, None, 0.3, 0.1]
    assert steps_left(tmp_path / "last", Retention(last=2), scores) == [7, 8]
    assert steps_left(tmp_path / "every", Retention(last=1, every=3), scores) == [3, 6, 8]
    assert steps_left(tmp_path / "best", Retention(last=1, best=True), scores) == [4, 8]
    assert steps_left(tmp_path / "none", Retention(last=1, best=True), [None] * 3) == [3]


# in the background


class Slow(FakeLearner):
    """Copies at once, writes when ``gate`` is open."""

    def __init__(self):
        super().__init__()
        self.gate, self.error = asyncio.Event(), None

    async def save(self, folder, background=False):
        copy = str(self.updates)
        if not background:
            self.gate.set()

        async def write():
            await self.gate.wait()
            if self.error:
                raise self.error
            folder.mkdir()
            (folder / "state").write_text(copy)

        self.writing = asyncio.create_task(write())

    async def saved(self, wait=False):
        if wait or self.writing.done():
            await self.writing
        return self.writing.done()


async def test_a_save_in_the_background_waits_for_no_writing_and_holds_the_state_of_its_step(tmp_path):
    learner = Slow()
    learner.updates = 7
    checkpoints = Checkpoints(tmp_path, keep=LAST_TWO, background=True)
    state = DriverState(step=1, kl_coef=0.0, rewards=RunningStats())
    assert await checkpoints.save(state, {"actor": learner}, {}) is None
    learner.updates = 8  # the next step
    assert await checkpoints.settle() is None and checkpoints.latest() is None
    learner.gate.set()
    await asyncio.sleep(0)
    await learner.writing
    folder = await checkpoints.settle()
    assert (verify(folder).step, (folder / "actor" / "state").read_text()) == (1, "7")
    assert await checkpoints.finish() is None


async def test_a_full_disk_in_the_background_is_heard_of_and_harms_no_older_checkpoint(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=Retention(last=1), background=True)
    for step in (1, 2):
        learner = Slow()
        learner.gate.set()
        learner.error = OSError(errno.ENOSPC, "full") if step == 2 else None
        state = DriverState(step=step, kl_coef=0.0, rewards=RunningStats())
        await checkpoints.save(state, {"actor": learner}, {})
        if step == 1:
            await checkpoints.finish()
    with pytest.raises(OSError, match="full"):
        await checkpoints.finish()
    assert checkpoints.latest().manifest.step == 1
    shutil.rmtree(tmp_path / "tmp-00000002")
