"""``quartet evaluate``: one checkpoint measured, and compared with another, without training anything.

    prepare -> Ray -> for each checkpoint: [reference: loss] -> [engine: answers] -> [reward: judgement]

The roles of one part end before the next starts, so that a checkpoint needs the devices of its largest part.
Everything is written into ``run_dir/evaluation``: rollouts in samples.jsonl, figures in evaluation.json.
"""

import asyncio
import json
from dataclasses import dataclass

import transformers

from actors.reward_function import find_reward_function
from launch.build import Crew
from launch.cluster import Cluster
from launch.prepare import Files, load_tokenizer
from launch.progress import Progress, write_samples
from orchestrator.batch import Prompt, ScoredRollout
from orchestrator.config import MODEL, Evaluate, Model, Run
from orchestrator.data import read_prompts, same_tokenizer
from orchestrator.evaluate import answers, judged, reward_figures, win_figures
from orchestrator.examples import Unit, read_units
from orchestrator.heldout import measure
from orchestrator.objectives import sft
from orchestrator.roles import Sampling

POLICY_STAGES = ("rl", "preference", "sft")  # latest first


@dataclass(frozen=True, slots=True, kw_only=True)
class Exam:
    """What is asked of each checkpoint."""

    run: Run
    settings: Evaluate
    pad_id: int
    units: list[Unit] | None  # None: no loss is measured
    prompts: tuple[Prompt, ...] | None  # None: nothing is answered
    reward_model: str | None


def main(run: Run) -> int:
    """Prints and writes the figures; ValueError before Ray starts for anything wrong with the request."""
    settings = run.evaluate
    if settings is None:
        raise ValueError("evaluate is not set; give evaluate.heldout, evaluate.prompts, or both")
    stages_file = run.run_dir.absolute() / "stages.json"
    stages = json.loads(stages_file.read_text()) if stages_file.exists() else {}
    done = [str(stages[stage]["model"]) for stage in POLICY_STAGES if stage in stages]
    ours = settings.model or (done[0] if done else run.model.path)
    run = run.model_copy(update={"run_dir": run.run_dir.absolute() / "evaluation"})
    judge = run.roles.reward.model or stages.get("reward_model", {}).get("model")
    exam = prepare(run, settings, ours, judge)
    run.run_dir.mkdir(parents=True, exist_ok=True)
    with Cluster(run) as cluster:
        figures = asyncio.run(_compare(exam, cluster, ours))
    (run.run_dir / "evaluation.json").write_text(json.dumps({"model": ours, **figures}, indent=1))
    rows = [(name.replace("_", " "), f"{figure:.4f}") for name, figure in figures.items()]
    Progress().summary(ours, [*rows, ("written to", str(run.run_dir / "evaluation.json"))])
    return 0


def prepare(run: Run, settings: Evaluate, ours: str, judge: str | None) -> Exam:
    """Raises ValueError with field, rule, value and remedy."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    tokenizer = load_tokenizer(ours, None, field="evaluate.model")
    weights = run.roles.reward.weights(stage=judge is not None) if settings.prompts else {}
    others = {"evaluate.against": settings.against, "roles.reward.model": judge if MODEL in weights else None}
    for field, path in others.items():
        if path:
            same_tokenizer(
                tokenizer, load_tokenizer(path, None, field=field), names=("evaluate.model", field)
            )
    if settings.prompts and not weights:
        raise ValueError("nothing judges the answers: set roles.reward.model or roles.reward.function")
    for spec in run.roles.reward.specs().values():
        find_reward_function(spec)
    files = Files()
    units, prompts = None, None
    if settings.heldout is not None:
        heldout, length = settings.heldout, run.model.max_length
        units = files.read(
            lambda: read_units(
                heldout, tokenizer, layout="examples", max_length=length, field="evaluate.heldout"
            )
        )
    if settings.prompts is not None:
        asked, room = settings.prompts, run.model.max_length - settings.sampling.max_new_tokens
        prompts = files.read(
            lambda: read_prompts(asked, tokenizer, room=room, field="evaluate.prompts").prompts
        )
    files.raise_all()
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return Exam(run=run, settings=settings, pad_id=pad_id, units=units, prompts=prompts, reward_model=judge)


async def _compare(exam: Exam, cluster: Cluster, ours: str) -> dict[str, float]:
    figures, mine = await _measure(exam, cluster, ours)
    if exam.settings.against is None:
        return figures
    others, theirs = await _measure(exam, cluster, exam.settings.against)
    figures |= {f"against_{name}": figure for name, figure in others.items()}
    return figures | (win_figures(mine, theirs) if mine else {})


async def _measure(exam: Exam, cluster: Cluster, path: str) -> tuple[dict[str, float], list[list[float]]]:
    """Figures of one checkpoint, and the rewards of its answers to each prompt."""
    figures: dict[str, float] = {}
    if exam.units is not None:
        figures |= await _loss(exam, cluster, path, exam.units)
    if exam.prompts is None:
        return figures, []
    groups = await _answers(exam, cluster, path, exam.prompts)
    write_samples(exam.run.run_dir / "samples.jsonl", 0, [sample for group in groups for sample in group])
    rewards = [[sample.reward for sample in group] for group in groups]
    settings = exam.settings
    figures |= reward_figures(rewards, pass_at=settings.pass_at, solved_from=settings.solved_from)
    return figures, rewards


async def _loss(exam: Exam, cluster: Cluster, path: str, units: list[Unit]) -> dict[str, float]:
    crew = Crew(exam.run, cluster, ["reference"])
    try:
        scorer = await crew.reference(_model(exam, path))
        return (await measure(scorer, units, sft.CONFIG(), pad_id=exam.pad_id)).figures
    finally:
        await crew.close()


async def _answers(
    exam: Exam, cluster: Cluster, path: str, prompts: tuple[Prompt, ...]
) -> list[list[ScoredRollout]]:
    settings = exam.settings
    sampling = Sampling(
        temperature=settings.sampling.temperature,
        top_p=settings.sampling.top_p,
        max_new_tokens=settings.sampling.max_new_tokens,
    )
    crew = Crew(exam.run, cluster, ["engine"])
    try:
        rollouts = await answers(await crew.engines(path), prompts, settings.samples_per_prompt, sampling)
    finally:
        await crew.close()
    crew = Crew(exam.run, cluster, ["reward"])
    try:
        return await judged(await crew.reward(exam.reward_model), rollouts)
    finally:
        await crew.close()


def _model(exam: Exam, path: str) -> Model:
    return exam.run.model.model_copy(update={"path": path})
