"""Everything that can be wrong with a run, found before Ray starts or a model is loaded.

Fills in what the task provides, reads every file of every stage, and compares the tokenizers of the roles.
What it returns holds tokens and no paths to data: the stages cannot meet a bad row.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import transformers
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from actors.reward_function import RewardFunction, find_reward_function
from launch import tasks
from orchestrator.batch import Prompt
from orchestrator.config import RL, Evaluation, Model, RewardModel, Run
from orchestrator.data import PromptSet, read_examples, read_pairs, read_prompts, same_tokenizer
from orchestrator.supervised import Row, num_steps

DISTRIBUTION_BYTES = 8 * 2**30  # of one role's log-probs over the vocabulary, on the driver

Units = Sequence[Sequence[Row]]  # one row (SFT) or the two rows of a pair, which stay together


@dataclass(frozen=True, slots=True, kw_only=True)
class Materials:
    """What the stages work on. None: the run does not have the stage (or the evaluation)."""

    run: Run
    tokenizer: PreTrainedTokenizerBase
    pad_id: int
    sft: Units | None
    pairs: Units | None
    heldout_pairs: Units | None
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
    if run.rl:
        _check_distributions(run.rl, run.model)
    for spec in run.roles.reward.specs().values():
        find_reward_function(spec)
    pairs, heldout = _pairs(run.reward_model, run.model, tokenizer) if run.reward_model else (None, None)
    sft = None
    if run.sft:
        rows = read_examples(run.sft.data, tokenizer, max_length=run.model.max_length, field="sft.data")
        sft = [[row] for row in rows]
        num_steps(len(sft), run.sft.batch_size, run.sft.epochs)
    evaluation = run.rl.evaluation if run.rl else None
    return Materials(
        run=run,
        tokenizer=tokenizer,
        pad_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        sft=sft,
        pairs=pairs,
        heldout_pairs=heldout,
        prompts=_prompts(run.rl, run.model, tokenizer) if run.rl else None,
        heldout_prompts=_heldout(evaluation, run, tokenizer) if evaluation else None,
        judge=find_reward_function(evaluation.function) if evaluation else None,
    )


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


def _pairs(stage: RewardModel, model: Model, tokenizer: PreTrainedTokenizerBase) -> tuple[Units, Units]:
    pairs = read_pairs(stage.data, tokenizer, max_length=model.max_length, field="reward_model.data")
    if stage.heldout is not None:
        heldout = read_pairs(
            stage.heldout, tokenizer, max_length=model.max_length, field="reward_model.heldout"
        )
    else:
        count = max(1, round(len(pairs) * stage.heldout_fraction))
        pairs, heldout = pairs[:-count], pairs[-count:]
    num_steps(len(pairs), stage.batch_size, stage.epochs)
    return pairs, heldout


def _prompts(rl: RL, model: Model, tokenizer: PreTrainedTokenizerBase) -> PromptSet:
    room = model.max_length - rl.sampling.max_new_tokens
    return read_prompts(rl.prompts, tokenizer, room=room, field="rl.prompts")


def _heldout(evaluation: Evaluation, run: Run, tokenizer: PreTrainedTokenizerBase) -> Sequence[Prompt]:
    assert run.rl is not None
    room = run.model.max_length - run.rl.sampling.max_new_tokens
    return read_prompts(evaluation.prompts, tokenizer, room=room, field="rl.evaluation.prompts").prompts
