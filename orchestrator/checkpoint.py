"""One manifest for all learners and the driver: written last, verified on load.

A checkpoint is a folder ``step-00000042``. The learners write into ``tmp-00000042``; then the manifest with
the sha256 of every file; then one rename makes it a checkpoint. A crash before the rename leaves a ``tmp-``
folder that nobody reads (FAULTS 16, 17). Older checkpoints go only after the newer one is complete.
"""

import asyncio
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from orchestrator.driver_state import DriverState
from orchestrator.roles import Learner

MANIFEST = "manifest.json"


class CheckpointError(ValueError):
    """A checkpoint that must not be loaded; the message says which file and why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """Everything a resume needs beside the learners' own files."""

    step: int
    ledger: dict[str, int]
    driver: dict[str, Any]  # DriverState.plain()
    files: dict[str, str]  # relative path -> sha256


class Checkpoints:
    """The checkpoints of one run."""

    def __init__(self, folder: Path, *, keep: int) -> None:
        self._folder, self._keep = folder, keep

    async def save(self, state: DriverState, learners: Mapping[str, Learner], ledger: dict[str, int]) -> Path:
        step = state.step
        draft, final = self._folder / f"tmp-{step:08d}", self._folder / f"step-{step:08d}"
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        await asyncio.gather(*(learner.save(draft / name) for name, learner in learners.items()))
        files = {str(path.relative_to(draft)): sha256(path) for path in files_of(draft)}
        manifest = Manifest(step=step, ledger=ledger, driver=state.plain(), files=files)
        write_durably(draft / MANIFEST, json.dumps(asdict(manifest), indent=1))
        shutil.rmtree(final, ignore_errors=True)
        draft.rename(final)
        sync_folder(self._folder)
        for old in self._complete()[: -self._keep]:
            shutil.rmtree(old)
        return final

    def latest(self) -> tuple[Path, Manifest] | None:
        """The newest checkpoint, verified; None when there is none. Raises CheckpointError when it is
        damaged."""
        complete = self._complete()
        return (complete[-1], verify(complete[-1])) if complete else None

    def _complete(self) -> list[Path]:
        return sorted(path for path in self._folder.glob("step-*") if (path / MANIFEST).exists())


def verify(folder: Path) -> Manifest:
    """The manifest, after every file it names was read and matched."""
    try:
        manifest = Manifest(**json.loads((folder / MANIFEST).read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"{folder / MANIFEST} cannot be read: {error}; remove {folder} to use an older one"
        ) from error
    for name, checksum in manifest.files.items():
        path = folder / name
        if not path.exists() or sha256(path) != checksum:
            state = "differs from its checksum" if path.exists() else "is missing"
            raise CheckpointError(f"{path} {state}; remove {folder} to resume from an older checkpoint")
    return manifest


def files_of(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file())


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_durably(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """A rename is on disk only when its folder is."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
