"""``quartet train``: the stages of a run in their order, each starting from what the last one made.

    prepare (all that can be wrong) -> Ray -> sft -> reward_model -> preference -> rl -> the model folder

A stage that has finished is written down in stages.json; ``--resume`` goes on after it, and into the rl stage
again when ``rl.steps`` was raised.
"""

import asyncio
import time
import traceback

from launch.cluster import Cluster
from launch.graceful import CHECKPOINTED, StoppedAfterCheckpoint, StopRequest, stop_on_sigterm
from launch.prepare import prepare
from launch.progress import Progress
from launch.rl_stage import run_rl
from launch.run_folder import RunFolder, StageResult
from launch.session import Session
from launch.supervised_stage import run_preference, run_reward_model, run_sft
from launch.tracking import open_tracker
from orchestrator.config import Run
from orchestrator.secret import redact

FAILED = 1


def main(run: Run, folder: RunFolder) -> int:
    """The exit status; raises ValueError before Ray starts when something is wrong with the run."""
    started = time.monotonic()
    materials, progress = prepare(run, folder.path), Progress()
    tracker = open_tracker(materials.run)
    try:
        with Cluster(materials.run) as cluster:
            session = Session(
                materials=materials, folder=folder, cluster=cluster, progress=progress, tracker=tracker,
                stop=StopRequest(),
            )  # fmt: skip
            results = asyncio.run(until_stopped(session))
    except StoppedAfterCheckpoint as stopped:
        progress.note(str(stopped))
        return CHECKPOINTED
    except (
        RuntimeError,
        ValueError,
    ) as error:  # from here on no bad input of the user's: keep the traceback
        (folder.path / "error.log").write_text(redact(traceback.format_exc()))
        progress.note(
            f"the run failed: {error}\n(traceback in {folder.path / 'error.log'}; --resume goes on)"
        )
        return FAILED
    finally:
        tracker.close()
    progress.summary("done", summary(session, results, time.monotonic() - started))
    return 0


async def until_stopped(session: Session) -> dict[str, StageResult]:
    """SIGTERM ends a stage after its step, with a checkpoint, or the run between two stages."""
    with stop_on_sigterm(session.stop):
        return await stages(session)


async def stages(session: Session) -> dict[str, StageResult]:
    """Every stage of the run that is not finished yet."""
    run, done = session.run, session.folder.finished()
    base = run.model.path
    if run.sft:
        if "sft" not in done:
            _unless_stopped(session)
            session.folder.finish("sft", await run_sft(session, base))
        base = str(session.folder.finished()["sft"]["model"])
    reward_model = run.roles.reward.model
    if run.reward_model:
        if "reward_model" not in done:
            _unless_stopped(session)
            start = run.reward_model.model or base
            session.folder.finish("reward_model", await run_reward_model(session, start))
        reward_model = reward_model or str(session.folder.finished()["reward_model"]["model"])
    if run.preference:
        if "preference" not in done:
            _unless_stopped(session)
            session.folder.finish("preference", await run_preference(session, base))
        base = str(session.folder.finished()["preference"]["model"])
    if run.rl and int(done.get("rl", {}).get("steps", 0)) < run.rl.steps:
        _unless_stopped(session)
        session.folder.finish("rl", await run_rl(session, rl_models(run, base, reward_model)))
    return session.folder.finished()


def _unless_stopped(session: Session) -> None:
    if session.stop.asked:
        raise StoppedAfterCheckpoint(
            f"stopped between two stages, finished: {', '.join(session.folder.finished()) or 'none'}; "
            "--resume goes on"
        )


def rl_models(run: Run, base: str, reward_model: str | None) -> dict[str, str]:
    """Where the initial weights are of each role that the run may start."""
    roles = run.roles
    actor = roles.actor.model or base
    models = {"actor": actor, "reference": (roles.reference and roles.reference.model) or actor}
    if reward_model:
        models["reward"] = reward_model
    if roles.critic is not None:
        start = actor if roles.critic.start_from == "actor" else reward_model or actor
        models["critic"] = roles.critic.model or start
    return models


def summary(session: Session, results: dict[str, StageResult], seconds: float) -> list[tuple[str, str]]:
    """The figures of the stages and where to find everything."""
    rows = [
        (f"{stage} {name.replace('_', ' ')}", f"{value:.3f}")
        for stage, result in results.items()
        for name, value in result.items()
        if isinstance(value, float)
    ]
    last = list(results.values())[-1]
    folder = session.folder.path
    rows += [("model", str(last["model"])), ("metrics", str(folder / "metrics.jsonl"))]
    if "checkpoint" in last:
        rows.append(("checkpoint", str(last["checkpoint"])))
    return [*rows, ("wall time", f"{seconds:.0f} s")]
