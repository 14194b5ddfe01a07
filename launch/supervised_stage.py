"""The sft and reward_model stages: start the workers, fit, export, end them."""

import time
from collections.abc import Callable

from actors.group import PairLearnerGroup
from launch.build import Crew
from launch.prepare import Units
from launch.run_folder import StageResult
from launch.session import Session
from orchestrator import metrics as names
from orchestrator.batch import Examples
from orchestrator.collate import collate_examples
from orchestrator.config import Model
from orchestrator.metrics import throughput
from orchestrator.objectives import reward_model, sft
from orchestrator.roles import Metrics
from orchestrator.supervised import fit, num_steps

HELDOUT_BATCH = 64  # pairs per forward call of the held-out evaluation


async def run_sft(session: Session, base: str) -> StageResult:
    """Fine-tunes the base model on the actor's workers."""
    stage, units = session.run.sft, session.materials.sft
    assert stage is not None and units is not None
    steps = num_steps(len(units), stage.batch_size, stage.epochs)
    session.progress.header(f"sft: {len(units)} rows, {steps} steps")
    crew = Crew(session.run, session.cluster, ["actor"])
    try:
        learner = await crew.sft(_model(session, base), stage.optimizer, steps=steps, loss=sft.loss)
        log = _logger(session, "sft", steps)
        await fit(
            learner, units, weights=sft.weights, batch_size=stage.batch_size, steps=steps,
            seed=session.run.seed, pad_id=session.materials.pad_id, log=log,
        )  # fmt: skip
        folder = session.folder.path / "sft" / "model"
        await learner.export(folder)
    finally:
        await crew.close()
    return {"model": str(folder)}


async def run_reward_model(session: Session, base: str) -> StageResult:
    """Trains the reward model on the reward role's workers and measures it on held-out pairs."""
    stage, units, heldout = session.run.reward_model, session.materials.pairs, session.materials.heldout_pairs
    assert stage is not None and units is not None and heldout is not None
    steps = num_steps(len(units), stage.batch_size, stage.epochs)
    session.progress.header(f"reward_model: {len(units)} pairs, {steps} steps")
    crew = Crew(session.run, session.cluster, ["reward"])
    try:
        learner = await crew.reward_learner(
            _model(session, base), stage.optimizer, steps=steps, loss=reward_model.loss
        )
        log = _logger(session, "reward_model", steps)
        await fit(
            learner, units, weights=reward_model.weights, batch_size=stage.batch_size, steps=steps,
            seed=session.run.seed, pad_id=session.materials.pad_id, log=log,
        )  # fmt: skip
        accuracy = await pair_accuracy(learner, heldout, session.materials.pad_id)
        folder = session.folder.path / "reward_model" / "model"
        await learner.export(folder)
    finally:
        await crew.close()
    session.progress.note(f"held-out accuracy of the reward model {accuracy:.3f} on {len(heldout)} pairs")
    session.tracker.log("reward_model", steps, {"heldout_accuracy": accuracy})
    return {"model": str(folder), "heldout_accuracy": accuracy}


async def pair_accuracy(learner: PairLearnerGroup, pairs: Units, pad_id: int) -> float:
    """The share of pairs whose chosen response scores higher; a tie is half."""
    right = 0.0
    for start in range(0, len(pairs), HELDOUT_BATCH):
        rows = [row for pair in pairs[start : start + HELDOUT_BATCH] for row in pair]
        scores = await learner.score_examples(collate_examples(rows, pad_id=pad_id))
        margin = scores[0::2] - scores[1::2]
        right += float((margin > 0).sum()) + float((margin == 0).sum()) / 2
    return right / len(pairs)


def _model(session: Session, path: str) -> Model:
    return session.run.model.model_copy(update={"path": path})


def _logger(session: Session, stage: str, steps: int) -> Callable[[int, Examples, Metrics], None]:
    last = time.monotonic()

    def log(step: int, examples: Examples, metrics: Metrics) -> None:
        nonlocal last
        now = time.monotonic()
        figures = {**metrics, **throughput(examples.attention_mask, now - last), names.STEP_S: now - last}
        last = now
        session.tracker.log(stage, step, figures)
        session.progress.step(stage, step, steps, figures)

    return log
