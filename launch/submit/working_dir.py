"""The folder that a Ray job is given: Quartet itself, the resolved run, and what the user adds.

Its content is small and known: three packages, ``run.yaml`` and ``settings.files``. Secrets cannot slip in:
names that look like keys or environments are refused, not skipped, so that nobody waits for a file that is
not there.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from launch.submit.job import Job

UPLOAD_LIMIT = 100 * 2**20  # of Ray's Jobs API: above it, HTTP 413 after the upload
PACKAGES = ("orchestrator", "actors", "launch")
ROOT = Path(__file__).parents[2]
SECRET_NAMES = (
    ".env",
    ".env.*",
    "*.pem",
    "*.key",
    "id_rsa*",
    "id_ed25519*",
    ".netrc",
    "auth_token",
    "credentials*",
)


def complaints(files: Sequence[str]) -> list[str]:
    """What is wrong with the user's files, a line each."""
    found = []
    for name in files:
        path = Path(name)
        if not path.exists():
            found.append(f"files: {name} does not exist; give paths relative to the current folder")
            continue
        listed = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
        found += [
            f"files: {p} looks like a secret; take it out, and use `secrets: {{NAME: /file/on/the/cluster}}`"
            for p in listed
            if any(p.match(pattern) for pattern in SECRET_NAMES)
        ]
    size = sum(p.stat().st_size for n in files for p in [Path(n), *Path(n).rglob("*")] if p.is_file())
    if size > UPLOAD_LIMIT:
        found.append(
            f"files: {size / 2**20:.0f} MiB is above Ray's upload limit of {UPLOAD_LIMIT // 2**20} MiB; "
            f"put data on "
            "storage that every node mounts and give its absolute path in the run"
        )
    return found


def stage(job: Job, files: Sequence[str], folder: Path) -> Path:
    """Fills ``folder``; its content, and with it Ray's package address, depends on the job alone."""
    for package in PACKAGES:
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    for name in files:
        source = Path(name)
        target = folder / source.name
        shutil.copytree(source, target) if source.is_dir() else shutil.copy2(source, target)
    (folder / "run.yaml").write_text(job.config)
    return folder
