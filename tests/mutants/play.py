"""Runs the named tests of each mutant in a copy of the tree that has the bug.

    forkserver   has imported torch, transformers, pytest, and nothing of ours: a start takes no time
    slot         one per core: a copy of the tree, in which one mutant after the other is put in and taken out
    child        one per mutant: sees its slot's copy and nothing else of ours, runs pytest, reports

A mutant is killed when a test fails with an assertion or an error that somebody typed. A test that cannot be
collected, or a bug that the interpreter stumbles over outside the test (NameError, TypeError, ...), proves
nothing.
"""

import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue
from tempfile import TemporaryDirectory

from tests.mutants.record import ROOT, Mutant

OURS = ("actors", "launch", "orchestrator", "tests")
PRELOADED = ["numpy", "pytest", "torch", "transformers.models.llama.modeling_llama", "pyarrow.parquet"]
PRELOADED_SLOW = ["deepspeed", "peft", "ray"]  # 8 s of imports; vLLM starts processes of its own
CRASHES = (ImportError, SyntaxError, NameError, AttributeError, TypeError, LookupError)
LIMIT_S = {False: 120, True: 400}  # of one pytest, by ``slow``


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of one pytest."""

    verdict: str  # "killed"; or "survived", "crashed", "hung"
    by: str  # the test that failed first, and its error; the end of pytest's output where that says more
    seconds: float


class Witness:
    """A pytest plugin that remembers the first failure: (node id, error type's name, whether it counts)."""

    def __init__(self) -> None:
        self.first: tuple[str, str, bool] | None = None

    def pytest_exception_interact(self, node, call, report) -> None:
        import pytest

        error, last = call.excinfo.type, Path(call.excinfo.traceback[-1].path)
        crashed = issubclass(error, CRASHES) and not last.is_relative_to(Path.cwd() / "tests")
        counts = isinstance(node, pytest.Item) and not crashed
        self.first = self.first or (node.nodeid, error.__name__, counts)


def child(copy: Path, tests: Sequence[str], log: Path, answer: Connection) -> None:
    """Sends ("passed" | "killed" | "crashed", by whom)."""
    os.setsid()  # so that all it starts can be ended with it
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.chdir(copy)
    sys.dont_write_bytecode = True  # two versions of a file within a second would share their cache
    os.environ |= {"PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1", "HF_HUB_OFFLINE": "1"}
    sys.path = [str(copy), *(path for path in sys.path if Path(path or ".").resolve() not in (ROOT, copy))]
    for name in [name for name in sys.modules if name.partition(".")[0] in OURS]:
        del sys.modules[name]
    import pytest

    witness = Witness()
    options = ["-x", "-q", "--no-header", "--tb=short", "-p", "no:cacheprovider", "--rootdir", str(copy)]
    code = pytest.main([*options, *tests], plugins=[witness])
    if code == pytest.ExitCode.OK:
        answer.send(("passed", ""))
    elif code == pytest.ExitCode.TESTS_FAILED and witness.first and witness.first[2]:
        answer.send(("killed", f"{witness.first[0]} ({witness.first[1]})"))
    else:
        answer.send(("crashed", str(witness.first or code)))
    os._exit(0)  # threads and loops that a failed test left must not hold it


def run(copy: Path, tests: Sequence[str], *, limit_s: float) -> Outcome:
    """One pytest in a process of its own."""
    context = multiprocessing.get_context("forkserver")
    log, began = copy.with_suffix(".log"), time.monotonic()
    mine, theirs = context.Pipe(duplex=False)
    process = context.Process(target=child, args=(copy, list(tests), log, theirs))
    process.start()
    theirs.close()
    try:
        verdict, by = mine.recv() if mine.poll(limit_s) else ("hung", f"no end within {limit_s} s")
    except EOFError:
        verdict, by = "crashed", "its process ended"
    with_it(process.pid)
    process.join()
    if verdict in ("crashed", "hung"):
        by += "\n" + "\n".join(log.read_text(errors="replace").splitlines()[-25:])
    verdict = "survived" if verdict == "passed" else verdict
    return Outcome(verdict=verdict, by=by, seconds=time.monotonic() - began)


def with_it(pid: int | None) -> None:
    """Ends a process and whatever it started."""
    try:
        os.killpg(pid or 0, signal.SIGKILL)
    except ProcessLookupError:
        return


@contextmanager
def copies(count: int, *, slow: bool) -> Iterator[SimpleQueue]:
    """So many copies of the tree: what git has or would add. ``slow``: for mutants that are."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    files = subprocess.run(listed, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED + PRELOADED_SLOW * slow)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if shutil.which("nvidia-smi") is None:  # as actors/backend.py sets it before it imports deepspeed
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    with TemporaryDirectory(prefix="mutants-") as folder:
        free: SimpleQueue = SimpleQueue()
        for number in range(count):
            copy = Path(folder).resolve() / f"tree-{number}"
            for name in filter(None, files.split("\0")):
                if (ROOT / name).is_file():
                    (copy / name).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(ROOT / name, copy / name)
            free.put(copy)
        yield free


def sound(free: SimpleQueue, mutants: Sequence[Mutant]) -> Outcome:
    """The named tests of all mutants, without any."""
    tests = list(dict.fromkeys(test for mutant in mutants for test in mutant.tests))
    copy = free.get()
    try:
        return run(copy, tests, limit_s=1800)
    finally:
        free.put(copy)


def play(free: SimpleQueue, mutants: Sequence[Mutant], jobs: int) -> Iterator[tuple[Mutant, Outcome]]:
    """Each mutant with what became of it, as they end."""

    def one(mutant: Mutant) -> tuple[Mutant, Outcome]:
        copy: Path = free.get()
        file = copy / mutant.file
        whole = file.read_text()
        try:
            file.write_text(mutant.mutated(copy))
            return mutant, run(copy, mutant.tests, limit_s=LIMIT_S[mutant.slow])
        finally:
            file.write_text(whole)
            free.put(copy)

    slots = ThreadPoolExecutor(jobs)
    try:
        for done in as_completed([slots.submit(one, mutant) for mutant in mutants]):
            yield done.result()
    finally:
        slots.shutdown(cancel_futures=True)
