"""The rl stage: start the roles, restore, train, evaluate, checkpoint, export.

``Journal`` is what happens around the steps of ``orchestrator/loop.py``, which knows nothing of it.
"""

import asyncio
from collections.abc import Awaitable, Sequence
from pathlib import Path

from actors.worker import settled_heap
from launch.autoscaling import Autoscaling
from launch.build import Crew
from launch.dump import dump
from launch.engine_count import EngineCount
from launch.graceful import StoppedAfterCheckpoint
from launch.progress import write_samples
from launch.recovery import TrainedLog, through_losses
from launch.run_folder import StageResult
from launch.session import Session
from launch.tracking import cut_torn_line, read_metrics
from orchestrator import metrics as names
from orchestrator.batch import Batch, Prompt, ScoredRollout, StopReason
from orchestrator.checkpoint import Checkpoints, Retention, step_of
from orchestrator.config import RL, Run
from orchestrator.data import PromptSet
from orchestrator.driver_state import DriverState
from orchestrator.evaluate import evaluate
from orchestrator.ledger import Ledger
from orchestrator.loop import train
from orchestrator.metrics import rollout_metrics, throughput
from orchestrator.mismatch import CAUSES, MISMATCH
from orchestrator.numbers import NonFiniteError, Patience, was_skipped
from orchestrator.placement import stage_roles
from orchestrator.publish import Probe
from orchestrator.roles import Metrics, Roles
from orchestrator.shaping import RunningStats
from orchestrator.timed import timed
from orchestrator.timeline import Timeline

PROBE_TOKENS = 64
HELDOUT_ACCURACY = "heldout_accuracy"
MAX_FAILED_SAVES = 3
SAMPLES_WRITTEN = 8  # rollouts per step that writes samples


async def run_rl(session: Session, models: dict[str, str]) -> StageResult:
    """The whole stage; resumes from its newest checkpoint when there is one."""
    rl, prompts = session.run.rl, session.materials.prompts
    assert rl is not None and prompts is not None
    session.progress.header(f"rl: {rl.algorithm.name}, {len(prompts.prompts)} prompts, {rl.steps} steps")
    return await _run(session, rl, prompts, models)


async def _run(session: Session, rl: RL, prompts: PromptSet, models: dict[str, str]) -> StageResult:
    run = session.run
    crew = Crew(run, session.cluster, dict(stage_roles(run))["rl"])
    try:
        timeline = Timeline()
        roles = timed(await crew.rl(models), timeline)
        ledger = Ledger(prompts.prompts, seed=run.seed)
        assert crew.engine_count is not None
        autoscaling = autoscaling_of(session, rl, crew.engine_count)
        journal = Journal(session, rl, roles, ledger, timeline, autoscaling)

        async def go_on() -> None:
            ledger.forget()
            start = await journal.restore()
            await train(
                rl, roles, ledger, observer=journal, probe=probe_of(prompts.prompts, run), start=start,
                seed=run.seed, pad_id=session.materials.pad_id,
            )  # fmt: skip

        scaling = asyncio.create_task(crew.engine_count.follow(session.progress.note))
        try:
            with settled_heap():
                await through_losses(go_on, crew, journal)
        finally:
            scaling.cancel()
        folder = session.folder.path / "model"
        await roles.actor.export(folder)
        result: StageResult = {"model": str(folder), "steps": rl.steps, "checkpoint": str(journal.newest)}
        if rl.ema_decay is not None:
            await roles.actor.export_average(session.folder.path / "model_ema")
            result["model_ema"] = str(session.folder.path / "model_ema")
        return {**result, **journal.accuracies}
    finally:
        await crew.close()


def autoscaling_of(session: Session, rl: RL, count: EngineCount) -> Autoscaling | None:
    """None: nobody moves the number of engines but ``quartet scale``."""
    settings = session.run.engine.autoscale
    if settings is None:
        return None
    return Autoscaling(settings, count, session.progress.note, overlaps=rl.staleness > 0)


def probe_of(prompts: Sequence[Prompt], run: Run) -> Probe:
    """The first prompts, one after the other: text as the policy meets it. One token less than the engine's
    longest."""
    length = min(PROBE_TOKENS, run.model.max_length - 1)
    tokens: list[int] = []
    for prompt in prompts:
        tokens += prompt.tokens
        if len(tokens) >= length:
            break
    dtype = run.engine.dtype or run.model.dtype
    return Probe(tokens=tuple(tokens[:length]), tolerance=Probe.tolerance_of(dtype))


class Journal:
    """Logs, checkpoints and evaluates around the steps."""

    def __init__(
        self,
        session: Session,
        rl: RL,
        roles: Roles,
        ledger: Ledger,
        timeline: Timeline,
        autoscaling: Autoscaling | None = None,
    ) -> None:
        self.session, self.rl, self.roles, self.ledger, self.timeline = session, rl, roles, ledger, timeline
        self.autoscaling = autoscaling
        self.folder = session.folder.path / "rl"
        self.checkpoints = Checkpoints(
            self.folder / "checkpoints",
            keep=Retention(last=rl.keep_checkpoints, every=rl.keep_every, best=rl.best_metric is not None),
            background=rl.checkpoints_in_background,
        )
        cut_torn_line(session.folder.path / "samples.jsonl")
        self.failed_saves = 0  # in a row
        self.patience = Patience(rl.steps)
        self.causes: set[str] = set()  # of log-probs out of range, already spoken of
        self.stop = session.stop
        self.newest: Path | None = None
        self.trained = TrainedLog(self.folder / "trained.jsonl")
        self.state: DriverState | None = None  # after the last step; None: as restored
        self.accuracies: dict[str, float] = {}

    async def restore(self) -> DriverState:
        """What to go on from; step 0 on a fresh run. Again after a loss: what was under way then is void."""
        self.state = None
        await self.checkpoints.abandon()
        found = self.checkpoints.latest()
        if found is None:
            if has_rl_steps(self.session.folder.path):
                self.session.progress.note(
                    f"WARNING: {self.folder} holds no checkpoint: the rl stage begins again at step 1"
                )
            return DriverState(step=0, kl_coef=self.rl.algorithm.initial_kl_coef, rewards=RunningStats())
        self.newest, manifest = found.folder, found.manifest
        for damage in found.damaged:
            self.session.progress.note(f"WARNING: passed over: {damage}")
        for name, learner in self.roles.learners():
            await learner.load(self.newest / name)
        self.ledger.restore(manifest.ledger)
        self.session.progress.note(f"resumed from step {manifest.step}: {self.newest}")
        return DriverState.restored(manifest.driver)

    async def started(self, step: int) -> None:
        self.trained.cut(step)
        if step == 0:
            await self._evaluate(step, "accuracy_before")
        self.timeline.end_step()

    async def stepped(
        self, state: DriverState, groups: Sequence[Sequence[ScoredRollout]], batch: Batch, metrics: Metrics
    ) -> None:
        times, step = self.timeline.end_step(), state.step
        self.trained.add(step, self.ledger.history)
        self.state = state
        scored = [sample for group in groups for sample in group]
        truncated = sum(s.rollout.stop is StopReason.LENGTH for s in scored) / len(scored)
        figures = {
            **rollout_metrics(batch, truncated_fraction=truncated),
            **metrics,
            **throughput(batch.attention_mask, times.wall_s),
            **times.metrics(),
            **self.session.cluster.trace.step("rl", step, times.start, times.start + times.wall_s),
        }
        if self.autoscaling is not None:
            figures |= self.autoscaling.stepped(figures)
        if self.rl.best_metric not in (None, HELDOUT_ACCURACY, *figures):
            raise ValueError(
                f"rl.best_metric={self.rl.best_metric!r} is no metric of a step; known: {sorted(figures)}, "
                f"{HELDOUT_ACCURACY}"
            )
        self.session.tracker.log("rl", step, figures)
        self.session.progress.step("rl", step, self.rl.steps, figures)
        if self.rl.samples_every and (step % self.rl.samples_every == 0 or step == 1):
            write_samples(self.session.folder.path / "samples.jsonl", step, scored[:SAMPLES_WRITTEN])
        self._look_at_numbers(step, scored, batch, figures)
        await self._milestones(state, figures)
        self.timeline.end_step()

    def _look_at_numbers(
        self, step: int, scored: Sequence[ScoredRollout], batch: Batch, figures: Metrics
    ) -> None:
        """Dumps a batch that was not learned from; raises NonFiniteError when there are too many."""
        note = self.session.progress.note
        if was_skipped(figures):
            texts = [f"{s.rollout.uid} {s.reward!r} {s.rollout.text}" for s in scored]
            where = dump(self.folder / "non_finite", step, batch, figures, texts)
            note(f"WARNING: step {step} met numbers that are not finite and was skipped; batch: {where}")
        try:
            self.patience.seen(figures, step)
        except NonFiniteError as error:
            raise NonFiniteError(f"{error}. The last good checkpoint is {self.newest}") from None
        for cause in {c for c in CAUSES if f"{MISMATCH}{c}" in figures} - self.causes:
            self.causes.add(cause)
            note(
                f"WARNING: from step {step} on, engine's and trainer's log-probs differ beyond rounding; "
                f"cause: {cause} (orchestrator/mismatch.py)"
            )

    async def save_now(self) -> None:
        """What the last step left, where no checkpoint has it yet."""
        if self.state is None:
            return
        step = self.state.step
        await self._written(self.checkpoints.finish(), step)
        if self.newest is None or step_of(self.newest) != step:
            await self._save(self.state, {}, final=True)

    async def _milestones(self, state: DriverState, figures: Metrics) -> None:
        """Saves before it evaluates, which may fail, unless the save needs the figure."""
        step = state.step
        last, stopping = step == self.rl.steps, self.stop.asked
        measured_first = self.rl.best_metric == HELDOUT_ACCURACY and not stopping
        if measured_first:
            figures = figures | await self._evaluate_if_due(step)
        if last or stopping or (self.rl.save_every and step % self.rl.save_every == 0):
            await self._save(state, figures, final=last or stopping)
        else:
            await self._written(self.checkpoints.settle(), step)
        if stopping and not last:
            raise StoppedAfterCheckpoint(f"stopped after step {step}: {self.newest}; --resume goes on")
        if not measured_first:
            await self._evaluate_if_due(step)

    async def _save(self, state: DriverState, figures: Metrics, *, final: bool) -> None:
        score = None if self.rl.best_metric is None else figures.get(self.rl.best_metric)
        await self._written(self.checkpoints.finish(), state.step)  # the one before
        await self._written(self._checkpoint(state, score), state.step, final=final)
        if final:
            await self._written(self.checkpoints.finish(), state.step, final=True)

    async def _checkpoint(self, state: DriverState, score: float | None) -> Path | None:
        self.trained.write()
        learners, ledger = dict(self.roles.learners()), self.ledger.state()
        return await self.checkpoints.save(state, learners, ledger, score=score)

    async def _written(self, work: Awaitable[Path | None], step: int, *, final: bool = False) -> None:
        """A full disk is said, and the run goes on with the checkpoints it has; MAX_FAILED_SAVES times in a
        row, or at the end, it stops the run."""
        try:
            saved = await work
        except OSError as error:
            self.failed_saves += 1
            why = f"no checkpoint after step {step}: {error}; the last good one is {self.newest}"
            if final or self.failed_saves == MAX_FAILED_SAVES:
                raise RuntimeError(f"{why}; make room, then --resume") from error
            self.session.progress.note(f"WARNING: {why}")
            return
        if saved is not None:
            self.failed_saves, self.newest = 0, saved

    async def _evaluate_if_due(self, step: int) -> Metrics:
        evaluation = self.rl.evaluation
        if step == self.rl.steps:
            return await self._evaluate(step, "accuracy_after")
        if evaluation and evaluation.every and step % evaluation.every == 0:
            return await self._evaluate(step, "accuracy")
        return {}

    async def _evaluate(self, step: int, name: str) -> Metrics:
        prompts, judge = self.session.materials.heldout_prompts, self.session.materials.judge
        if prompts is None or judge is None:
            return {}
        accuracy = await evaluate(
            self.roles.engine, prompts, judge, max_new_tokens=self.rl.sampling.max_new_tokens
        )
        self.session.tracker.log("rl", step, {HELDOUT_ACCURACY: accuracy})
        self.session.progress.note(
            f"held-out accuracy {accuracy:.3f} on {len(prompts)} prompts after step {step}"
        )
        if name != names.ACCURACY:
            self.accuracies[name] = accuracy
        return {HELDOUT_ACCURACY: accuracy}


def has_rl_steps(folder: Path) -> bool:
    """Whether this directory has trained in the rl stage before."""
    file = folder / "metrics.jsonl"
    return file.exists() and any(line["stage"] == "rl" for line in read_metrics(file))
