"""The few filesystem calls that a checkpoint consists of, each of which may be the last.

What is written is on disk when the call returns: a file when its bytes were fsynced, a name when its folder
was. ``Disk`` is an object so that a test can end the world at any one of its calls.
"""

import os
import stat
from collections.abc import Iterator
from pathlib import Path


class Disk:
    """Raises OSError as the operating system does."""

    def make_folder(self, path: Path) -> None:
        path.mkdir(parents=True)

    def write(self, path: Path, data: bytes) -> None:
        """Not on disk before ``sync``."""
        path.write_bytes(data)

    def sync(self, path: Path) -> None:
        """A file's bytes, or the names in a folder."""
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def rename(self, source: Path, target: Path) -> None:
        """Within one file system, and atomic."""
        source.rename(target)

    def remove(self, path: Path) -> None:
        path.rmdir() if stat.S_ISDIR(path.lstat().st_mode) else path.unlink()

    def sync_tree(self, folder: Path) -> None:
        """Every file and every folder in it, the innermost first, then the folder itself."""
        for path in tree(folder):
            self.sync(path)
        self.sync(folder)

    def remove_tree(self, folder: Path) -> None:
        for path in tree(folder):
            self.remove(path)
        self.remove(folder)


def tree(folder: Path) -> Iterator[Path]:
    """What is in a folder and below, the innermost first."""
    return iter(sorted(folder.rglob("*"), key=lambda path: (-len(path.parts), path)))


def write_durably(path: Path, text: str) -> None:
    """A file whose bytes are on disk; its name is when its folder is synced."""
    disk = Disk()
    disk.write(path, text.encode())
    disk.sync(path)


def replace_durably(path: Path, text: str) -> None:
    """The file holds the old text or the new one, whatever happens."""
    draft = path.with_name(path.name + ".tmp")
    write_durably(draft, text)
    Disk().rename(draft, path)
    Disk().sync(path.parent)
