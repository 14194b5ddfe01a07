"""One manifest for all learners and the driver: written last, verified on load.

A checkpoint is a folder ``step-00000042``. The learners write into ``tmp-00000042``; every file is synced
and hashed; then the manifest with the sha256 of every file, and of itself; then one rename makes it a
checkpoint. So a crash or a full disk at any moment leaves the checkpoints that were there, and a ``tmp-``
folder that nobody reads (FAULTS 16, 17). Older checkpoints go only after the newer one is on disk, and are
renamed away before they are deleted: half of one is never seen.

In the background (``rl.checkpoints_in_background``), three parts instead of one:

    save     the learners copy their state and write it while they train on
    settle   after each later step: when all have written, the manifest and the rename, in a thread
    finish   before the next save and at the end: waits for that

A checkpoint that is damaged is passed over with a word about it, and the one before is used; when all are
damaged the run stops. It never starts over by itself (FAULTS 18).
"""

import asyncio
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from orchestrator.driver_state import DriverState
from orchestrator.durable import Disk
from orchestrator.roles import Learner

MANIFEST = "manifest.json"


class CheckpointError(ValueError):
    """A checkpoint that must not be loaded; the message says which file and why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """Everything a resume needs beside the learners' own files."""

    step: int
    ledger: dict[str, Any]  # Ledger.state()
    driver: dict[str, Any]  # DriverState.plain()
    files: dict[str, str]  # relative path -> sha256
    score: float | None = None  # what "best" compares, the higher the better; None: not measured

    def text(self) -> str:
        """The only text of this manifest: its fields, and their sha256."""
        fields = asdict(self)
        checksum = hashlib.sha256(json.dumps(fields).encode()).hexdigest()
        return json.dumps({**fields, "sha256": checksum}, indent=1)

    @classmethod
    def read(cls, text: str) -> "Manifest":
        """Raises ValueError, TypeError or KeyError unless it is exactly what ``text`` wrote."""
        fields = json.loads(text)
        del fields["sha256"]
        manifest = cls(**fields)
        if manifest.text() != text:
            raise ValueError("it differs from its own checksum")
        return manifest


@dataclass(frozen=True, slots=True, kw_only=True)
class Retention:
    """Which complete checkpoints stay: the ``last`` n, those of every ``every``-th step (0: none), and with
    ``best`` the one of the highest score, the later of two equal ones."""

    last: int
    every: int = 0
    best: bool = False

    def kept(self, manifests: Sequence[Manifest]) -> set[int]:
        """Positions in ``manifests``, which are in order of their steps."""
        numbers = range(len(manifests))
        kept = set(numbers[-self.last :])
        kept |= {n for n in numbers if self.every and manifests[n].step % self.every == 0}
        scored = [(score, n) for n in numbers if (score := manifests[n].score) is not None]
        return kept | ({max(scored)[1]} if self.best and scored else set())


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """The newest checkpoint that is whole, and what was wrong with newer ones."""

    folder: Path
    manifest: Manifest
    damaged: Sequence[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pending:
    """A save whose files may still be under way."""

    draft: Path
    learners: Mapping[str, Learner]
    manifest: Manifest  # its files are not known yet


class Checkpoints:
    """The checkpoints of one run. One save at a time."""

    def __init__(
        self, folder: Path, *, keep: Retention, background: bool = False, disk: Disk | None = None
    ) -> None:
        self._folder, self._keep, self._background = folder, keep, background
        self._disk = disk or Disk()
        self._pending: _Pending | None = None
        self._damaged: dict[Path, str] = {}  # seen by ``latest``: not counted by retention, and not touched

    async def save(
        self,
        state: DriverState,
        learners: Mapping[str, Learner],
        ledger: dict[str, Any],
        *,
        score: float | None = None,
    ) -> Path | None:
        """The complete checkpoint; None: it becomes one in the background. OSError: the disk is full, and
        the older checkpoints are as they were."""
        await self.finish()
        for stale in sorted(self._folder.glob("tmp-*")):
            self._disk.remove_tree(stale)
        draft = self._folder / f"tmp-{state.step:08d}"
        self._disk.make_folder(draft)
        await asyncio.gather(
            *(learner.save(draft / name, self._background) for name, learner in learners.items())
        )
        manifest = Manifest(step=state.step, ledger=ledger, driver=state.plain(), files={}, score=score)
        self._pending = _Pending(draft=draft, learners=dict(learners), manifest=manifest)
        return None if self._background else await self.finish()

    async def settle(self) -> Path | None:
        """The checkpoint that was under way, if it is complete by now."""
        pending = self._pending
        if pending is None or not all([await learner.saved() for learner in pending.learners.values()]):
            return None
        return await self.finish()

    async def finish(self) -> Path | None:
        """Waits until the save under way is a checkpoint; None when there is none."""
        pending, self._pending = self._pending, None
        if pending is None:
            return None
        await asyncio.gather(*(learner.saved(wait=True) for learner in pending.learners.values()))
        return await asyncio.to_thread(self._seal, pending)

    async def abandon(self) -> None:
        """Forgets the save under way, some of whose learners are gone; who still writes is waited for."""
        pending, self._pending = self._pending, None
        if pending is not None:
            writing = (learner.saved(wait=True) for learner in pending.learners.values())
            await asyncio.gather(*writing, return_exceptions=True)

    def _seal(self, pending: _Pending) -> Path:
        """From files to a checkpoint, in this order and no other."""
        draft, disk = pending.draft, self._disk
        files = {str(path.relative_to(draft)): sha256(path) for path in files_of(draft)}
        fields = {**asdict(pending.manifest), "files": files}
        disk.write(draft / MANIFEST, Manifest(**fields).text().encode())
        disk.sync_tree(draft)
        final = self._folder / draft.name.replace("tmp-", "step-")
        while final.exists():  # a damaged one, which was passed over: nothing is deleted before this is safe
            final = final.with_name(final.name + "+")
        disk.rename(draft, final)
        disk.sync(self._folder)
        self._prune()
        return final

    def _prune(self) -> None:
        manifests: list[Manifest] = []
        folders: list[Path] = []
        for folder in self._complete():
            try:
                manifest = read_manifest(folder)
            except CheckpointError as error:
                self._damaged[folder] = str(error)
            if folder not in self._damaged:
                manifests.append(manifest)
                folders.append(folder)
        kept = self._keep.kept(manifests)
        for number, folder in enumerate(folders):
            if number not in kept:
                aside = folder.with_name(folder.name.replace("step-", "tmp-gone-"))
                self._disk.rename(folder, aside)
                self._disk.remove_tree(aside)

    def latest(self) -> Found | None:
        """The newest whole checkpoint; None when there is none at all. Raises CheckpointError when there are
        some and all are damaged."""
        self._damaged = {}
        for folder in reversed(self._complete()):
            try:
                return Found(folder=folder, manifest=verify(folder), damaged=list(self._damaged.values()))
            except CheckpointError as error:
                self._damaged[folder] = str(error)
        if self._damaged:
            raise CheckpointError(
                "every checkpoint is damaged, and the run does not start over by itself:\n"
                + "\n".join(self._damaged.values())
                + "\nrestore one of them, or start over with --fresh"
            )
        return None

    def _complete(self) -> list[Path]:
        """In the order of their steps; a "+" sorts behind the damaged one whose step it repeats."""
        return sorted(self._folder.glob("step-*"))


def verify(folder: Path) -> Manifest:
    """The manifest, after every file it names was read and matched."""
    manifest = read_manifest(folder)
    for name, checksum in manifest.files.items():
        path = folder / name
        if not path.exists() or sha256(path) != checksum:
            state = "differs from its checksum" if path.exists() else "is missing"
            raise CheckpointError(f"{path} {state}: the checkpoint is damaged")
    return manifest


def read_manifest(folder: Path) -> Manifest:
    """Raises CheckpointError unless it is there and as it was written."""
    try:
        return Manifest.read((folder / MANIFEST).read_bytes().decode())
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{folder / MANIFEST} cannot be trusted: {error}") from error


def step_of(folder: Path) -> int:
    """12 of step-00000012, and of step-00000012+."""
    return int(folder.name.removeprefix("step-").rstrip("+"))


def files_of(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file())


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
