"""The supervised stages: start the workers, fit, measure on held-out rows, export, end the workers."""

import shutil
import time
from collections.abc import Callable, Sequence

import torch

from actors.group import LearnerGroup, RewardLearnerGroup
from launch.build import Crew
from launch.dump import dump
from launch.graceful import StoppedAfterCheckpoint
from launch.prepare import StageRows
from launch.run_folder import StageResult
from launch.session import Session
from orchestrator import metrics as names
from orchestrator.batch import Examples
from orchestrator.checkpoint import Checkpoints, Retention
from orchestrator.collate import collate_examples
from orchestrator.config import Adapter, Model, Preference
from orchestrator.driver_state import DriverState
from orchestrator.examples import Unit
from orchestrator.heldout import PREFIX, Heldout, measure
from orchestrator.metrics import throughput
from orchestrator.numbers import Patience, was_skipped
from orchestrator.objectives import sft
from orchestrator.objectives._base import Objective
from orchestrator.roles import Metrics
from orchestrator.shaping import RunningStats
from orchestrator.supervised import (
    SCORED_AT_ONCE,
    KnownReference,
    LiveReference,
    ReferenceScores,
    fit,
    num_steps,
)

LEARNER = "learner"  # its folder in a checkpoint


async def run_sft(session: Session, base: str) -> StageResult:
    """Fine-tunes the base model on the actor's workers."""
    stage, rows = session.run.sft, session.materials.sft
    assert stage is not None and rows is not None
    steps, objective = num_steps(len(rows.train), stage.batch_size, stage.epochs), sft.CONFIG()
    session.progress.header(f"sft: {len(rows.train)} rows, {steps} steps")
    crew = Crew(session.run, session.cluster, ["actor"])
    try:
        learner = await crew.policy(
            _trained(session, base, stage.adapter), stage.optimizer, steps=steps, objective=objective
        )
        figures = await _fit(
            session, learner, rows, objective, batch_size=stage.batch_size, steps=steps, packed=stage.packing
        )
        return {"model": await _export(session, learner, "sft"), **figures}
    finally:
        await crew.close()


async def run_reward_model(session: Session, base: str) -> StageResult:
    """Trains the reward model on the reward role's workers and measures it on held-out rows."""
    stage, rows = session.run.reward_model, session.materials.reward_model
    assert stage is not None and rows is not None
    steps, objective = num_steps(len(rows.train), stage.batch_size, stage.epochs), stage.objective
    session.progress.header(f"reward_model: {objective.name}, {len(rows.train)} rows, {steps} steps")
    crew = Crew(session.run, session.cluster, ["reward"])
    try:
        learner = await crew.reward_learner(
            _trained(session, base, stage.adapter), stage.optimizer, steps=steps, loss=objective.loss
        )
        figures = await _fit(session, learner, rows, objective, batch_size=stage.batch_size, steps=steps)
        await _keep_statistics(learner, rows.heldout or rows.train, session.materials.pad_id)
        return {"model": await _export(session, learner, "reward_model"), **figures}
    finally:
        await crew.close()


async def run_preference(session: Session, base: str) -> StageResult:
    """Preference learning on the actor's workers, beside a reference where the objective reads one."""
    stage, rows = session.run.preference, session.materials.preference
    assert stage is not None and rows is not None
    steps, objective = num_steps(len(rows.train), stage.batch_size, stage.epochs), stage.objective
    session.progress.header(f"preference: {objective.name}, {len(rows.train)} rows, {steps} steps")
    live = objective.needs_reference and not stage.precompute_reference
    known = await _precomputed(session, base, stage, rows)
    crew = Crew(session.run, session.cluster, ["actor", "reference"] if live else ["actor"])
    try:
        model = _model(session, base)
        trained = _trained(session, base, stage.adapter)
        learner = await crew.policy(trained, stage.optimizer, steps=steps, objective=objective)
        train, heldout = known
        if live:
            train = heldout = LiveReference(await crew.reference(model))
        figures = await _fit(
            session, learner, rows, objective, batch_size=stage.batch_size, steps=steps, reference=train,
            heldout=heldout,
        )  # fmt: skip
        return {"model": await _export(session, learner, "preference"), **figures}
    finally:
        await crew.close()


async def _precomputed(
    session: Session, base: str, stage: Preference, rows: StageRows
) -> tuple[ReferenceScores | None, ReferenceScores | None]:
    """What the reference says of training and held-out rows; its workers end before training starts."""
    if not (stage.objective.needs_reference and stage.precompute_reference):
        return None, None
    crew, pad_id = Crew(session.run, session.cluster, ["reference"]), session.materials.pad_id
    try:
        scorer = await crew.reference(_model(session, base))
        return (
            await KnownReference.ask(scorer, rows.train, pad_id=pad_id),
            await KnownReference.ask(scorer, rows.heldout, pad_id=pad_id),
        )
    finally:
        await crew.close()


async def _fit(  # noqa: PLR0913 - a stage, by name
    session: Session,
    learner: LearnerGroup,
    rows: StageRows,
    objective: Objective,
    *,
    batch_size: int,
    steps: int,
    packed: bool = False,
    reference: ReferenceScores | None = None,
    heldout: ReferenceScores | None = None,
) -> dict[str, float]:
    """The held-out figures after the last step; those before the first are logged. ``reference``,
    ``heldout``: what the reference says of training and of held-out rows."""
    journal = Journal(session, objective.stage, learner, steps=steps)

    async def measured(step: int, before: Heldout | None) -> Heldout | None:
        if not rows.heldout:
            return None
        pad_id = session.materials.pad_id
        found = await measure(
            learner, rows.heldout, objective, pad_id=pad_id, packed=packed, reference=heldout
        )
        _tell(session, objective.stage, step, found, before)
        return found

    start = await journal.restore()
    before = await measured(0, None) if start == 0 else None
    await fit(
        learner, rows.train, objective=objective, reference=reference, packed=packed, batch_size=batch_size,
        steps=steps, seed=session.run.seed, pad_id=session.materials.pad_id,
        log=_logger(session, objective.stage, steps), start=start, stepped=journal.stepped,
    )  # fmt: skip
    after = await measured(steps, before)
    return {} if after is None else after.figures_since(before)


class Journal:
    """The checkpoint of a supervised stage: written when the run is told to stop, gone with the stage."""

    def __init__(self, session: Session, stage: str, learner: LearnerGroup, *, steps: int) -> None:
        self.session, self.learner, self.steps = session, learner, steps
        self.checkpoints = Checkpoints(session.folder.path / stage / "checkpoints", keep=Retention(last=1))

    async def restore(self) -> int:
        """Steps that are done: 0 on a fresh stage."""
        found = self.checkpoints.latest()
        if found is None:
            return 0
        folder, manifest = found.folder, found.manifest
        await self.learner.load(folder / LEARNER)
        self.session.progress.note(f"resumed from step {manifest.step}: {folder}")
        return manifest.step

    async def stepped(self, step: int) -> None:
        """Raises StoppedAfterCheckpoint after the step in which SIGTERM came, unless it is the last."""
        if not self.session.stop.asked or step == self.steps:
            return
        state = DriverState(step=step, kl_coef=0.0, rewards=RunningStats())
        folder = await self.checkpoints.save(state, {LEARNER: self.learner}, {})
        raise StoppedAfterCheckpoint(f"stopped after step {step}: {folder}; --resume goes on")


def _tell(session: Session, stage: str, step: int, found: Heldout, before: Heldout | None) -> None:
    figures = found.figures_since(before)
    shown = "  ".join(f"{name.removeprefix(PREFIX)} {figure:.3f}" for name, figure in figures.items())
    when = "before" if step == 0 else "after"
    session.progress.note(f"{stage} {when}, {len(found.losses)} held-out rows: {shown}")
    session.tracker.log(stage, step, figures)


async def _keep_statistics(learner: RewardLearnerGroup, units: Sequence[Unit], pad_id: int) -> None:
    """Mean and standard deviation of the scores of rows that were not trained on, where there are some."""
    scores = torch.cat(
        [
            await learner.score(collate_examples(units[start : start + SCORED_AT_ONCE], pad_id=pad_id))
            for start in range(0, len(units), SCORED_AT_ONCE)
        ]
    ).double()
    await learner.keep_statistics(float(scores.mean()), float(scores.std(correction=0)))


async def _export(session: Session, learner: LearnerGroup, stage: str) -> str:
    folder = session.folder.path / stage / "model"
    await learner.export(folder)
    shutil.rmtree(folder.parent / "checkpoints", ignore_errors=True)
    return str(folder)


def _trained(session: Session, path: str, adapter: Adapter | None) -> Model:
    """What the stage trains, with the adapter it asks for."""
    return session.run.model.training(adapter).model_copy(update={"path": path})


def _model(session: Session, path: str) -> Model:
    return session.run.model.model_copy(update={"path": path})


def _logger(session: Session, stage: str, steps: int) -> Callable[[int, Examples, Metrics], None]:
    last, patience = time.monotonic(), Patience(steps)

    def log(step: int, examples: Examples, metrics: Metrics) -> None:
        nonlocal last
        now = time.monotonic()
        if was_skipped(metrics):
            dump(session.folder.path / stage / "non_finite", step, examples, metrics, [])
            session.progress.note(f"WARNING: step {step} met numbers that are not finite and was skipped")
        patience.seen(metrics, step)
        figures = {
            **metrics,
            **throughput(examples.attention_mask, now - last),
            names.STEP_S: now - last,
            **session.cluster.trace.step(stage, step, last, now),
        }
        last = now
        session.tracker.log(stage, step, figures)
        session.progress.step(stage, step, steps, figures)

    return log
