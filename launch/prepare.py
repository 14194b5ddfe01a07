"""Everything that can be wrong with a run, found before Ray starts or a model is loaded.

Fills in what the task provides, reads every file of every stage, and compares the tokenizers of the roles.
What it returns holds tokens and no paths to data: the stages cannot meet a bad row.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
import transformers
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from actors.reward_function import RewardFunction, find_reward_function
from launch import tasks
from launch.budgets import refuse_small_budgets
from launch.foresight import refuse_what_cannot_fit
from launch.preflight import refuse_what_has_no_place
from launch.trainable import check_trainable
from orchestrator.batch import Prompt
from orchestrator.config import RL, ChatData, Evaluation, Model, Preference, RewardModel, Run, Sft
from orchestrator.data import PromptSet, read_prompts, same_tokenizer
from orchestrator.examples import Unit, mix, pack, read_units
from orchestrator.objectives._base import Layout
from orchestrator.supervised import num_steps

DISTRIBUTION_BYTES = 8 * 2**30  # of one role's log-probs over the vocabulary, on the driver

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class StageRows:
    """What a supervised stage trains on and is measured on."""

    train: Sequence[Unit]
    heldout: Sequence[Unit]  # empty: nothing is measured


@dataclass(frozen=True, slots=True, kw_only=True)
class Materials:
    """What the stages work on. None: the run does not have the stage (or the evaluation)."""

    run: Run
    tokenizer: PreTrainedTokenizerBase
    pad_id: int
    sft: StageRows | None
    reward_model: StageRows | None
    preference: StageRows | None
    prompts: PromptSet | None
    heldout_prompts: Sequence[Prompt] | None
    judge: RewardFunction | None


def prepare(run: Run, folder: Path) -> Materials:
    """Raises ValueError with field, rule, value and remedy for the first thing that is wrong."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    run = with_task(run, folder) if run.task else run
    tokenizer = load_tokenizer(run.model.path, run.model.revision, field="model.path")
    for field, path in role_models(run).items():
        same_tokenizer(tokenizer, load_tokenizer(path, None, field=field), names=("model.path", field))
    _check_length(run.model)
    refuse_what_cannot_fit(run)
    check_trainable(run)
    if run.rl:
        _check_distributions(run.rl, run.model)
    for spec in run.roles.reward.specs().values():
        find_reward_function(spec)
    evaluation = run.rl.evaluation if run.rl else None
    files = Files()
    sft = files.read(lambda: _sft_rows(run.sft, run, tokenizer)) if run.sft else None
    reward_model = (
        files.read(lambda: _stage_rows(run.reward_model, run, tokenizer)) if run.reward_model else None
    )
    preference = files.read(lambda: _stage_rows(run.preference, run, tokenizer)) if run.preference else None
    prompts = files.read(lambda: _prompts(run.rl, run.model, tokenizer)) if run.rl else None
    heldout = files.read(lambda: _heldout(evaluation, run, tokenizer)) if evaluation else None
    files.raise_all()
    stages = {"sft": sft, "reward_model": reward_model, "preference": preference}
    units = {stage: [*rows.train, *rows.heldout] for stage, rows in stages.items() if rows is not None}
    refuse_small_budgets(run, units, prompts.prompts if prompts else ())
    refuse_what_has_no_place(run, num_gpus=torch.cuda.device_count())
    return Materials(
        run=run,
        tokenizer=tokenizer,
        pad_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        sft=sft,
        reward_model=reward_model,
        preference=preference,
        prompts=prompts,
        heldout_prompts=heldout,
        judge=find_reward_function(evaluation.function) if evaluation else None,
    )


class Files:
    """Reads the files of all stages, so that the bad rows of all of them are in one error."""

    def __init__(self) -> None:
        self._complaints: list[str] = []

    def read(self, reader: Callable[[], T]) -> T | None:
        try:
            return reader()
        except ValueError as error:
            self._complaints.append(str(error))
            return None

    def raise_all(self) -> None:
        """ValueError with the complaints about every file, if there are any."""
        if self._complaints:
            raise ValueError("\n".join(self._complaints))


def with_task(run: Run, folder: Path) -> Run:
    """The run with the paths of the task's model and data in it."""
    assert run.task is not None
    files = tasks.prepare(run.task, folder / "task")
    changes: dict[str, object] = {"model": run.model.model_copy(update={"path": str(files.model)})}
    if run.sft:
        changes["sft"] = run.sft.model_copy(update={"data": files.sft})
    if run.reward_model:
        changes["reward_model"] = run.reward_model.model_copy(
            update={"data": files.pairs, "heldout": files.heldout_pairs}
        )
    if run.rl:
        evaluation = (run.rl.evaluation or Evaluation()).model_copy(update={"prompts": files.heldout_prompts})
        changes["rl"] = run.rl.model_copy(update={"prompts": files.prompts, "evaluation": evaluation})
    return run.model_copy(update=changes)


def role_models(run: Run) -> dict[str, str]:
    """The models that the run names beside the base, by field."""
    roles = {role: getattr(run.roles, role) for role in ("actor", "critic", "reward", "reference")}
    named = {f"roles.{role}.model": own.model for role, own in roles.items() if own is not None}
    if run.reward_model:
        named["reward_model.model"] = run.reward_model.model
    return {field: path for field, path in named.items() if path}


def load_tokenizer(path: str, revision: str | None, *, field: str) -> PreTrainedTokenizerBase:
    if (Path(path) / "adapter_config.json").exists():
        raise ValueError(
            f"{field}={path!r} is an adapter and no model; merge it first: quartet export {path} --to FOLDER"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, revision=revision)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"{field}={path!r} has no tokenizer that loads ({reason}); give a Hub id or a model folder"
        ) from error
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"{field}={path!r}: the tokenizer has no EOS token, so no response could end; set eos_token"
        )
    return tokenizer


def _check_length(model: Model) -> None:
    limit = getattr(_config(model), "max_position_embeddings", None)
    if limit is not None and model.max_length > limit:
        raise ValueError(
            f"model.max_length={model.max_length} is more than the {limit} positions of {model.path}; "
            f"set it to {limit} or less"
        )


def _check_distributions(rl: RL, model: Model) -> None:
    """The KL over the whole vocabulary: actor and reference each answer with [B, T, V] float32, and the
    reference's travels on to the learners."""
    if not rl.algorithm.wants_distribution:
        return
    B, V = rl.prompts_per_step * rl.samples_per_prompt, _config(model).vocab_size
    num_bytes = 4 * B * model.max_length * V
    if num_bytes > DISTRIBUTION_BYTES:
        raise ValueError(
            f"the KL over the whole vocabulary wants {num_bytes / 2**30:.3g} GiB a role for {B} sequences x "
            f"{model.max_length} tokens x {V} words x 4 bytes, at most {DISTRIBUTION_BYTES / 2**30:.3g} are "
            "allowed; estimate it from samples (kl_estimator=k1, k2 or k3), or lower rl.prompts_per_step, "
            "rl.samples_per_prompt or model.max_length"
        )


def _config(model: Model) -> PretrainedConfig:
    whole = AutoConfig.from_pretrained(model.path, revision=model.revision)
    return whole.get_text_config()


def _sft_rows(stage: Sft | None, run: Run, tokenizer: PreTrainedTokenizerBase) -> StageRows:
    assert stage is not None
    files, found = Files(), []
    for index, data in enumerate((stage.data, *stage.mixture)):
        field = "sft.data" if index == 0 else f"sft.mixture.{index - 1}"
        found.append(files.read(partial(_units, data, "examples", run, tokenizer, field)))
    files.raise_all()
    sets = [units for units in found if units is not None]
    held = [_held_out(units, stage.heldout_fraction) for units in sets]
    trained = [units[: len(units) - len(out)] for units, out in zip(sets, held, strict=True)]
    ratios = [data.ratio for data in (stage.data, *stage.mixture)]
    known = [ratio if ratio is not None else len(units) for ratio, units in zip(ratios, trained, strict=True)]
    train = mix(trained, known, seed=run.seed) if stage.mixture else trained[0]
    heldout = [unit for units in held for unit in units]
    if stage.packing:
        train = pack(train, max_length=run.model.max_length, seed=run.seed)
        heldout = pack(heldout, max_length=run.model.max_length, seed=run.seed)
    num_steps(len(train), stage.batch_size, stage.epochs)
    return StageRows(train=train, heldout=heldout)


def _stage_rows(
    stage: RewardModel | Preference | None, run: Run, tokenizer: PreTrainedTokenizerBase
) -> StageRows:
    assert stage is not None
    layout, files = stage.objective.layout, Files()
    name = stage.objective.stage
    train = files.read(lambda: _units(stage.data, layout, run, tokenizer, f"{name}.data"))
    heldout: list[Unit] | None = None
    if stage.heldout is not None:
        data = stage.heldout
        heldout = files.read(lambda: _units(data, layout, run, tokenizer, f"{name}.heldout"))
    files.raise_all()
    assert train is not None
    if heldout is None:
        heldout = _held_out(train, stage.heldout_fraction)
        train = train[: len(train) - len(heldout)]
    num_steps(len(train), stage.batch_size, stage.epochs)
    return StageRows(train=train, heldout=heldout)


def _units(
    data: ChatData, layout: Layout, run: Run, tokenizer: PreTrainedTokenizerBase, field: str
) -> list[Unit]:
    return read_units(data, tokenizer, layout=layout, max_length=run.model.max_length, field=field)


def _held_out(units: list[Unit], fraction: float) -> list[Unit]:
    """The last of the rows: at least one when the fraction is above 0."""
    return units[len(units) - max(1, round(len(units) * fraction)) :] if fraction else []


def _prompts(rl: RL | None, model: Model, tokenizer: PreTrainedTokenizerBase) -> PromptSet:
    assert rl is not None
    room = model.max_length - rl.sampling.max_new_tokens
    return read_prompts(rl.prompts, tokenizer, room=room, field="rl.prompts")


def _heldout(evaluation: Evaluation | None, run: Run, tokenizer: PreTrainedTokenizerBase) -> Sequence[Prompt]:
    assert run.rl is not None and evaluation is not None
    room = run.model.max_length - run.rl.sampling.max_new_tokens
    return read_prompts(evaluation.prompts, tokenizer, room=room, field="rl.evaluation.prompts").prompts
