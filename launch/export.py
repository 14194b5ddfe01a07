"""``quartet export``: an adapter and its base become a plain model folder.

The adapter is a PEFT folder: what a checkpoint of a run holds beside the training state, what a stage leaves
beside its model, or one that was trained elsewhere. Of a run it is the one in the newest checkpoint.
"""

import json
from pathlib import Path

import torch
import transformers
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from actors.adapter import base_of
from actors.learner import ADAPTER
from orchestrator.checkpoint import Checkpoints
from orchestrator.config import Run

CONFIG = "adapter_config.json"
VIRTUAL = ("PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING")


def adapter_of(run: Run) -> Path:
    """The actor's adapter in the newest checkpoint of a run. ValueError where there is none."""
    folder = run.run_dir.absolute() / "rl" / "checkpoints"
    latest = Checkpoints(folder, keep=1).latest()
    if latest is None:
        raise ValueError(f"{folder} holds no checkpoint; give a PEFT folder, or train with rl.save_every")
    found = latest[0] / "actor" / ADAPTER
    if not (found / CONFIG).exists():
        raise ValueError(
            f"{latest[0]} holds no adapter: the actor trained all its weights; see model/ of the run"
        )
    return found


def export(adapter: Path, to: Path, *, base: str | None) -> Path:
    """Writes the merged model with its tokenizer into ``to``. ValueError for what cannot be merged."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if not (adapter / CONFIG).exists():
        raise ValueError(f"{adapter} is no PEFT folder: it has no {CONFIG}; give one that has")
    if to.exists() and any(to.iterdir()):
        raise ValueError(f"--to {to} exists and is not empty; choose another folder")
    settings = json.loads((adapter / CONFIG).read_text())
    if settings["peft_type"] in VIRTUAL:
        raise ValueError(
            f"{adapter} holds virtual tokens ({settings['peft_type']}), which no weights can stand for; load "
            "it with PeftModel.from_pretrained"
        )
    path = base or base_of(adapter)
    classifier = settings["task_type"] == "SEQ_CLS"
    try:
        if classifier:
            model = AutoModelForSequenceClassification.from_pretrained(path, num_labels=1, dtype="auto")
        else:
            model = AutoModelForCausalLM.from_pretrained(path, dtype="auto")
    except OSError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"the adapter's base {path!r} does not load ({reason}); give it with --base"
        ) from error
    with torch.no_grad():
        merged = PeftModel.from_pretrained(model, adapter).merge_and_unload(safe_merge=True)
    merged.save_pretrained(to)
    AutoTokenizer.from_pretrained(path).save_pretrained(to)
    return to
