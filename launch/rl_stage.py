"""The rl stage: start the roles, restore, train, evaluate, checkpoint, export.

``Journal`` is what happens around the steps of ``orchestrator/loop.py``, which knows nothing of it.
"""

from collections.abc import Sequence
from pathlib import Path

from launch.build import Crew, rl_roles
from launch.graceful import StoppedAfterCheckpoint
from launch.progress import write_samples
from launch.run_folder import StageResult
from launch.session import Session
from orchestrator import metrics as names
from orchestrator.batch import Batch, Prompt, ScoredRollout, StopReason
from orchestrator.checkpoint import Checkpoints
from orchestrator.config import RL, Run
from orchestrator.data import PromptSet
from orchestrator.driver_state import DriverState
from orchestrator.evaluate import evaluate
from orchestrator.ledger import Ledger
from orchestrator.loop import train
from orchestrator.metrics import rollout_metrics, throughput
from orchestrator.publish import Probe
from orchestrator.roles import Metrics, Roles
from orchestrator.shaping import RunningStats
from orchestrator.timed import timed
from orchestrator.timeline import Timeline

PROBE_TOKENS = 64
SAMPLES_WRITTEN = 8  # rollouts per step that writes samples


async def run_rl(session: Session, models: dict[str, str]) -> StageResult:
    """The whole stage; resumes from its newest checkpoint when there is one."""
    rl, prompts = session.run.rl, session.materials.prompts
    assert rl is not None and prompts is not None
    session.progress.header(f"rl: {rl.algorithm.name}, {len(prompts.prompts)} prompts, {rl.steps} steps")
    return await _run(session, rl, prompts, models)


async def _run(session: Session, rl: RL, prompts: PromptSet, models: dict[str, str]) -> StageResult:
    run = session.run
    crew = Crew(run, session.cluster, rl_roles(run))
    try:
        timeline = Timeline()
        roles = timed(await crew.rl(models), timeline)
        ledger = Ledger(prompts.prompts, seed=run.seed)
        journal = Journal(session, rl, roles, ledger, timeline)
        start = await journal.restore()
        await train(
            rl, roles, ledger, observer=journal, probe=probe_of(prompts.prompts, run), start=start,
            seed=run.seed, pad_id=session.materials.pad_id,
        )  # fmt: skip
        folder = session.folder.path / "model"
        await roles.actor.export(folder)
        result: StageResult = {"model": str(folder), "steps": rl.steps, "checkpoint": str(journal.newest)}
        if rl.ema_decay is not None:
            await roles.actor.export_average(session.folder.path / "model_ema")
            result["model_ema"] = str(session.folder.path / "model_ema")
        return {**result, **journal.accuracies}
    finally:
        await crew.close()


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

    def __init__(self, session: Session, rl: RL, roles: Roles, ledger: Ledger, timeline: Timeline) -> None:
        self.session, self.rl, self.roles, self.ledger, self.timeline = session, rl, roles, ledger, timeline
        self.folder = session.folder.path / "rl"
        self.checkpoints = Checkpoints(self.folder / "checkpoints", keep=rl.keep_checkpoints)
        self.stop = session.stop
        self.newest: Path | None = None
        self.accuracies: dict[str, float] = {}

    async def restore(self) -> DriverState:
        """What to go on from; step 0 on a fresh run."""
        latest = self.checkpoints.latest()
        if latest is None:
            return DriverState(step=0, kl_coef=self.rl.algorithm.initial_kl_coef, rewards=RunningStats())
        self.newest, manifest = latest
        for name, learner in self.roles.learners():
            await learner.load(self.newest / name)
        self.ledger.restore(manifest.ledger)
        self.session.progress.note(f"resumed from step {manifest.step}: {self.newest}")
        return DriverState.restored(manifest.driver)

    async def started(self, step: int) -> None:
        if step == 0:
            await self._evaluate(step, "accuracy_before")
        self.timeline.end_step()

    async def stepped(
        self, state: DriverState, groups: Sequence[Sequence[ScoredRollout]], batch: Batch, metrics: Metrics
    ) -> None:
        times, step = self.timeline.end_step(), state.step
        scored = [sample for group in groups for sample in group]
        truncated = sum(s.rollout.stop is StopReason.LENGTH for s in scored) / len(scored)
        figures = {
            **rollout_metrics(batch, truncated_fraction=truncated),
            **metrics,
            **throughput(batch.attention_mask, times.wall_s),
            **times.metrics(),
            **self.session.cluster.trace.step("rl", step, times.start, times.start + times.wall_s),
        }
        self.session.tracker.log("rl", step, figures)
        self.session.progress.step("rl", step, self.rl.steps, figures)
        if self.rl.samples_every and (step % self.rl.samples_every == 0 or step == 1):
            write_samples(self.session.folder.path / "samples.jsonl", step, scored[:SAMPLES_WRITTEN])
        await self._milestones(state)
        self.timeline.end_step()

    async def _milestones(self, state: DriverState) -> None:
        step = state.step
        last = step == self.rl.steps
        if last or self.stop.asked or (self.rl.save_every and step % self.rl.save_every == 0):
            self.newest = await self.checkpoints.save(state, dict(self.roles.learners()), self.ledger.state())
        if self.stop.asked and not last:
            raise StoppedAfterCheckpoint(f"stopped after step {step}: {self.newest}; --resume goes on")
        evaluation = self.rl.evaluation
        if last:
            await self._evaluate(step, "accuracy_after")
        elif evaluation and evaluation.every and step % evaluation.every == 0:
            await self._evaluate(step, "accuracy")

    async def _evaluate(self, step: int, name: str) -> None:
        prompts, judge = self.session.materials.heldout_prompts, self.session.materials.judge
        if prompts is None or judge is None:
            return
        accuracy = await evaluate(
            self.roles.engine, prompts, judge, max_new_tokens=self.rl.sampling.max_new_tokens
        )
        self.session.tracker.log("rl", step, {"heldout_accuracy": accuracy})
        self.session.progress.note(
            f"held-out accuracy {accuracy:.3f} on {len(prompts)} prompts after step {step}"
        )
        if name != names.ACCURACY:
            self.accuracies[name] = accuracy
