"""What happens around the steps of the rl stage: saves, full disks, resumes, skipped batches."""

import asyncio
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest

from launch.graceful import StoppedAfterCheckpoint, StopRequest
from launch.rl_stage import MAX_FAILED_SAVES, Journal
from launch.tracking import Tracker
from orchestrator.checkpoint import CheckpointError
from orchestrator.ledger import Ledger
from orchestrator.loop import train
from orchestrator.numbers import NonFiniteError
from orchestrator.timeline import Timeline
from tests.fakes import FakeLearner, FakeReward, prompt
from tests.test_loop import PROBE, fake_roles, settings


class Notes(list):
    """A progress that remembers what it was told."""

    def note(self, text):
        self.append(text)

    def step(self, *_):
        pass


def journal_of(folder, rl, roles, *, stop=None, notes=None):
    folder.mkdir(exist_ok=True)
    session = SimpleNamespace(
        folder=SimpleNamespace(path=folder), progress=Notes() if notes is None else notes,
        tracker=Tracker(folder / "metrics.jsonl"),
        materials=SimpleNamespace(heldout_prompts=None, judge=None), cluster=Quiet(),
        stop=stop or StopRequest(),
    )  # fmt: skip
    return Journal(session, rl, roles, Ledger([prompt(row) for row in range(7)], seed=3), Timeline())


def go(folder, rl, roles, *, stop=None, notes=None):
    """One run of the stage over ``folder``, resumed where it was; answers its journal and its notes."""
    journal = journal_of(folder, rl, roles, stop=stop, notes=notes)

    async def run():
        start = await journal.restore()
        await train(rl, roles, journal.ledger, observer=journal, probe=PROBE, start=start, seed=0, pad_id=0)

    try:
        asyncio.run(asyncio.wait_for(run(), 30))
    finally:
        journal.session.tracker.close()
    return journal, journal.session.progress


class Quiet:
    """A cluster that is asked for nothing but figures of a trace, and has none."""

    def __getattr__(self, name):
        return Quiet()

    def __call__(self, *_, **__):
        return {}


def names(folder):
    return sorted(p.name for p in (folder / "rl" / "checkpoints").iterdir())


@pytest.mark.parametrize("background", [False, True])
def test_a_run_resumes_from_its_newest_checkpoint_and_keeps_what_it_was_told(tmp_path, background):
    rl = settings(steps=5, save_every=1, keep_every=2, best_metric="actor/loss",
                  checkpoints_in_background=background)  # fmt: skip
    go(tmp_path, rl, fake_roles())
    assert names(tmp_path) == ["step-00000002", "step-00000004", "step-00000005"]
    roles = fake_roles()
    journal, notes = go(tmp_path, rl.model_copy(update={"steps": 7}), roles)
    assert notes[0].startswith("resumed from step 5") and roles.actor.updates == 7 * 4
    assert names(tmp_path)[-1] == journal.newest.name == "step-00000007"
    trained = [json.loads(line) for line in (tmp_path / "rl" / "trained.jsonl").read_text().splitlines()]
    order = Ledger([prompt(row) for row in range(7)], seed=3).prompts()
    assert [line["step"] for line in trained] == [1, 2, 3, 4, 5, 6, 7]
    assert [uid for line in trained for uid in line["uids"]] == [next(order).uid for _ in range(7 * 4)]


def test_a_resumed_run_trains_the_prompts_it_would_have_trained(tmp_path):
    """BUGS E1: 3 steps, then 2 of a new process, are 5 steps; a step settles 4 of 7 prompts."""
    first, _ = go(tmp_path, settings(steps=3), fake_roles())
    rest, _ = go(tmp_path, settings(steps=5), fake_roles())
    order = Ledger([prompt(row) for row in range(7)], seed=3).prompts()
    uids = [s.uid for journal in (first, rest) for s in journal.ledger.history]
    assert uids == [next(order).uid for _ in range(5 * 4)]
    assert [s.step for s in rest.ledger.history] == [4] * 4 + [5] * 4


def test_a_damaged_checkpoint_is_passed_over_aloud_and_none_at_all_is_said_too(tmp_path):
    rl = settings(steps=3, save_every=1)
    go(tmp_path, rl, fake_roles())
    (tmp_path / "rl/checkpoints/step-00000003/actor/state").write_text("")
    roles = fake_roles()
    _, notes = go(tmp_path, rl, roles)
    assert "WARNING: passed over" in notes[0] and "step-00000003/actor/state differs" in notes[0]
    assert notes[1].startswith("resumed from step 2") and roles.actor.updates == 3 * 4
    for folder in (tmp_path / "rl/checkpoints").iterdir():
        (folder / "actor" / "state").write_text("?")
    with pytest.raises(CheckpointError, match="every checkpoint is damaged"):
        go(tmp_path, rl, fake_roles())
    for folder in (tmp_path / "rl/checkpoints").iterdir():
        folder.rename(tmp_path / folder.name)
    _, notes = go(tmp_path, rl, fake_roles())
    assert "WARNING" in notes[0] and "begins again at step 1" in notes[0]


class Slow(FakeLearner):
    """Writes in the background, and is lost before it has; ``rebuilt`` knows nothing of it."""

    rebuilt = False

    async def save(self, folder, background=False):
        folder.mkdir(parents=True)
        (folder / "half").write_text("")

    async def saved(self, wait=False):
        return self.rebuilt


async def test_a_save_that_was_under_way_when_a_trainer_was_lost_is_void(tmp_path):
    rl = settings(steps=9, save_every=1, checkpoints_in_background=True)
    roles = fake_roles(actor=Slow())
    journal = journal_of(tmp_path, rl, roles)
    state = await journal.restore()
    journal.state = state = replace(state, step=1)
    await journal._save(state, {}, final=False)
    roles.actor.rebuilt = True
    assert (await journal.restore()).step == 0  # not from half a checkpoint
    await journal.save_now()  # nothing was trained since: nothing to save
    assert await journal.checkpoints.finish() is None and journal.newest is None


async def test_the_last_checkpoint_is_of_the_last_step_and_is_written_once(tmp_path):
    journal = journal_of(tmp_path, settings(steps=9), fake_roles())
    journal.state = replace(await journal.restore(), step=4)
    await journal.save_now()
    await journal.save_now()
    assert names(tmp_path) == ["step-00000004"] and journal.newest.name == "step-00000004"


class FullDisk(FakeLearner):
    """Has no room for the saves number ``first`` to ``last``."""

    def __init__(self, first, last):
        super().__init__()
        self.saves, self.first, self.last = 0, first, last

    async def save(self, folder, background=False):
        self.saves += 1
        if self.first <= self.saves <= self.last:
            raise OSError(28, "No space left on device")
        await super().save(folder, background)


def test_a_full_disk_costs_no_step_and_no_older_checkpoint(tmp_path):
    """FAULTS 16."""
    roles = fake_roles(actor=FullDisk(2, 3))
    _, notes = go(tmp_path, settings(steps=4, save_every=1), roles)
    assert roles.actor.updates == 4 * 4
    warnings = [note for note in notes if "No space left on device" in note]
    assert len(warnings) == 2 and all("last good one is" in note for note in warnings)
    assert names(tmp_path) == ["step-00000001", "step-00000004"]


def test_a_disk_that_stays_full_ends_the_run_with_its_last_good_checkpoint(tmp_path):
    roles = fake_roles(actor=FullDisk(2, 99))
    with pytest.raises(RuntimeError, match=r"no checkpoint after step 4: .*step-00000001; make room"):
        go(tmp_path, settings(steps=9, save_every=1), roles)
    assert MAX_FAILED_SAVES == 3 and "step-00000001" in names(tmp_path)


@pytest.mark.parametrize("background", [False, True])
def test_a_stop_writes_a_whole_checkpoint_first(tmp_path, background):
    stop = StopRequest()
    stop.ask()
    rl = settings(steps=5, checkpoints_in_background=background)
    with pytest.raises(StoppedAfterCheckpoint, match=r"stopped after step 1: .*step-00000001"):
        go(tmp_path, rl, fake_roles(), stop=stop)
    assert names(tmp_path) == ["step-00000001"]


class Sick(FakeReward):
    """NaN for every sample of a prompt in ``rows``."""

    rows = range(7)

    async def score(self, rollouts):
        scored = await super().score(rollouts)
        return [replace(s, reward=float("nan")) if s.rollout.prompt.row in self.rows else s for s in scored]


def test_skipped_batches_are_dumped_and_too_many_end_the_run_at_its_last_good_checkpoint(tmp_path):
    """FAULTS 20."""
    roles, notes = fake_roles(reward=Sick()), Notes()
    with pytest.raises(NonFiniteError, match=r"step 4 is the 4\. in a row .*last good checkpoint is"):
        go(tmp_path, settings(steps=9, save_every=1), roles, notes=notes)
    assert roles.actor.updates == 0 and names(tmp_path) == ["step-00000002", "step-00000003"]
    dumped = sorted((tmp_path / "rl" / "non_finite").iterdir())
    assert [p.name for p in dumped] == [f"step-0000000{step}" for step in (1, 2, 3, 4)]
    assert json.loads((dumped[0] / "why.json").read_text())["metrics"]["non_finite/rewards"] == "8.0"
    assert sum("were skipped" in note or "was skipped" in note for note in notes) == 4


def test_a_best_metric_that_no_step_has_is_refused_at_the_first(tmp_path):
    with pytest.raises(ValueError, match=r"rl\.best_metric='rewrad' is no metric of a step; .*'reward'"):
        go(tmp_path, settings(steps=3, best_metric="rewrad"), fake_roles())
