"""Rows of a file or a Hub data set, and the complaints about them. Nothing here knows prompts or tokens.

A row that cannot be read does not end the reading: it becomes an ``Unreadable``, so that one error names
every bad row of a file. Row numbers count from 0, blank lines left out.
"""

import csv
import gzip
import importlib
import importlib.util
import json
import logging
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from orchestrator.plugins import nearest

log = logging.getLogger(__name__)

NUM_SHOWN = 20  # bad rows listed one by one; the rest is a count
MAX_CSV_CELL = 2**30  # Python's own limit of 128 KiB is less than one long dialogue


@dataclass(frozen=True, slots=True)
class Unreadable:
    """Stands where a row should be."""

    reason: str


Row = dict[str, Any] | Unreadable


@dataclass(slots=True)
class Complaints:
    """Bad rows of one table, collected; ``raise_all`` reports them together."""

    where: str  # "rl.prompts.path='gsm8k.jsonl'"
    max_bad_rows: int = 0  # so many are left out with a warning
    lines: list[str] = field(default_factory=list)

    def add(self, row: int, reason: str) -> None:
        """``reason`` ends with the remedy: "the prompt is empty; fill it in"."""
        self.lines.append(f"  row {row}: {reason}")

    def raise_all(self) -> None:
        """ValueError with the first rows and a count of the others; a warning when so many are allowed."""
        if self.lines:
            hidden = len(self.lines) - NUM_SHOWN
            more = [f"  ... and {hidden} more"] if hidden > 0 else []
            plural = "s" if len(self.lines) > 1 else ""
            found = f"{self.where}: {len(self.lines)} bad row{plural} (numbered from 0)"
            if len(self.lines) <= self.max_bad_rows:
                log.warning("%s", "\n".join([f"{found}; left out", *self.lines[:NUM_SHOWN], *more]))
                return
            allowed = f" (max_bad_rows={self.max_bad_rows})" if self.max_bad_rows else ""
            head = f"{found}; correct or remove them{allowed}"
            raise ValueError("\n".join([head, *self.lines[:NUM_SHOWN], *more]))


def read_rows(path: str, *, split: str, max_rows: int | None, field: str) -> list[Row]:
    """The first ``max_rows`` rows, in file order.

    Raises ValueError, naming ``field``, for a missing file, an unknown or damaged format, and no rows.
    """
    where = f"{field}.path={path!r}"
    if not path:
        raise ValueError(f"{where} is empty; give a JSON, JSONL, Parquet or CSV file, or a Hub data set id")
    file = Path(path)
    suffix = "".join(s for s in file.suffixes[-2:] if s in (*READERS, ".gz")).lower()
    if suffix in READERS:
        try:
            rows = READERS[suffix](file)
        except FileNotFoundError:
            message = f"{where}: no such file{_near(file)}; paths are relative to {Path.cwd()}"
            raise ValueError(message) from None
        except (OSError, EOFError, zlib.error, csv.Error, UnicodeDecodeError, _arrow_error()) as error:
            message = f"{where} cannot be read: {error}; is the file complete, and its ending right?"
            raise ValueError(message) from error
    elif file.exists() or path.count("/") > 1 or path.startswith("."):
        state = "is no data file" if file.exists() else "does not exist"
        raise ValueError(f"{where} {state}; give a file ending in one of {', '.join(READERS)}, or a Hub id")
    else:
        rows = _read_hub(path, split, where)
    rows = rows[:max_rows]
    if not rows:
        raise ValueError(f"{where} holds no rows; give it at least one")
    return rows


def require_columns(rows: list[Row], columns: dict[str, str], where: str) -> None:
    """Every wanted column must be in at least one row: a mistyped key is one error and not one a row.

    ``columns`` maps the name of the setting to its value; "" stands for no column. Raises ValueError.
    """
    known = sorted({name for row in rows if isinstance(row, dict) for name in row})
    for key, column in columns.items():
        if known and column and column not in known:
            raise ValueError(
                f"{where}.{key}={column!r} is no column of the data{nearest(column, known)}; "
                f"its columns: {', '.join(known)}"
            )


def _read_json(file: Path) -> list[Row]:
    """A list of objects, or one object a line; gzip by its ending."""
    content = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    content = content.removeprefix(b"\xef\xbb\xbf").strip()
    if not content.startswith(b"["):
        # Not str.splitlines: it also splits at U+2028, which JSON texts may hold.
        return [_parse(line) for line in content.split(b"\n") if line.strip()]
    try:
        values = json.loads(content)
    except ValueError as error:
        raise OSError(f"not JSON ({error})") from error
    return [_as_row(value) for value in values]


def _parse(line: bytes) -> Row:
    try:
        return _as_row(json.loads(line))
    except (ValueError, RecursionError) as error:  # a JSON or an encoding error
        return Unreadable(f"not JSON ({error}): {line[:60]!r}; write one complete object a line")


def _as_row(value: object) -> Row:
    if isinstance(value, dict):
        return value
    return Unreadable(f"a row is an object with columns, this is {type(value).__name__}: {str(value)[:60]!r}")


def _read_csv(file: Path) -> list[Row]:
    csv.field_size_limit(MAX_CSV_CELL)
    with file.open(newline="", encoding="utf-8-sig") as lines:
        return list(_csv_rows(csv.DictReader(lines, strict=True)))


def _csv_rows(reader: Iterable[dict[str | Any, Any]]) -> Iterator[Row]:
    for row in reader:
        extra = row.pop(None, None)
        yield Unreadable(f"{len(extra)} cells more than the header; quote commas") if extra else row


def _read_parquet(file: Path) -> list[Row]:
    parquet = importlib.import_module("pyarrow.parquet")
    rows: list[Row] = parquet.read_table(file).to_pylist()
    return rows


def _arrow_error() -> type[Exception]:
    error: type[Exception] = importlib.import_module("pyarrow").ArrowException
    return error


def _read_hub(name: str, split: str, where: str) -> list[Row]:
    if importlib.util.find_spec("datasets") is None:
        raise ValueError(
            f"{where} is no file here, and the package `datasets`, which reads Hub data sets, is not "
            "installed; correct the path or run `pip install datasets`"
        )
    datasets = importlib.import_module("datasets")
    try:
        return [dict(row) for row in datasets.load_dataset(name, split=split)]
    except (OSError, ValueError) as error:  # DataFilesNotFoundError and an offline machine are OSErrors
        raise ValueError(f"{where} with split={split!r} cannot be read from the Hub: {error}") from error


def _near(file: Path) -> str:
    """A file in the same folder with a similar name."""
    folder = file.parent
    if not folder.is_dir():
        return f" (nor a folder {str(folder)!r})"
    return nearest(file.name, [f.name for f in folder.iterdir()])


READERS: dict[str, Callable[[Path], list[Row]]] = {
    ".json": _read_json,
    ".jsonl": _read_json,
    ".json.gz": _read_json,
    ".jsonl.gz": _read_json,
    ".parquet": _read_parquet,
    ".csv": _read_csv,
}
