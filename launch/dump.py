"""Batches that were not learned from, kept so that somebody can see why."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from orchestrator.batch import Batch, Examples

MOST = 20  # folders of one stage; the first ones tell the story


def dump(
    folder: Path, step: int, records: Batch | Examples, metrics: Mapping[str, float], texts: Sequence[str]
) -> Path | None:
    """``folder``/step-00000012: batch.safetensors, every column, and why.json, the step's figures and the
    texts. None when there are MOST already, or the disk takes no more."""
    target = folder / f"step-{step:08d}"
    if len(list(folder.glob("step-*"))) >= MOST:
        return None
    columns = {field.name: getattr(records, field.name) for field in fields(records)}
    tensors = {name: value.contiguous() for name, value in columns.items() if isinstance(value, Tensor)}
    try:
        target.mkdir(parents=True, exist_ok=True)
        save_file(tensors, target / "batch.safetensors")
        figures = {name: repr(value) for name, value in metrics.items()}  # JSON has no NaN
        (target / "why.json").write_text(json.dumps({"metrics": figures, "texts": list(texts)}, indent=1))
    except OSError:
        return None
    return target
