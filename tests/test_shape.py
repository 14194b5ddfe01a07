"""The rules of the house that no tool checks: sizes, tunnels, clocks, cycles."""

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ("orchestrator", "actors", "launch")
FILES = sorted(file for room in ROOMS for file in (ROOT / room).rglob("*.py"))
MODULES = {
    ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file for file in FILES
}

MAX_FILE_LINES = 320
MAX_FUNCTION_LINES = 60
# Wall-clock time is for people who read records; control runs on monotonic clocks only.
MAY_TELL_WALL_TIME = {ROOT / "launch" / "tracking.py", ROOT / "launch" / "incidents.py"}
# The thread between a run and a third-party service, whose failures by design do not matter.
MAY_CATCH_ALL = {ROOT / "launch" / "sidecar.py", ROOT / "actors" / "reward_child.py"}
# Settings for the constructor of a class that is built in another process, as Ray's own call takes them; and
# what a model of any architecture tells its attention, as Transformers calls it.
MAY_PASS_ON = {("remote_worker.py", "spawn"), ("build.py", "group"), ("attention.py", "sdpa")}

Function = ast.FunctionDef | ast.AsyncFunctionDef

every_file = pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))


def nodes(file: Path) -> Iterator[ast.AST]:
    return ast.walk(ast.parse(file.read_text()))


@every_file
def test_a_file_is_at_most_320_lines(file):
    lines = len(file.read_text().splitlines())
    assert lines <= MAX_FILE_LINES, f"{lines} lines; give a part of it a file of its own"


@every_file
def test_a_function_is_at_most_60_lines(file):
    functions = [node for node in nodes(file) if isinstance(node, Function)]
    long = [f"{f.name}:{f.lineno}" for f in functions if f.end_lineno - f.lineno >= MAX_FUNCTION_LINES]
    assert long == []


@every_file
def test_no_signature_is_a_tunnel(file):
    functions = [node for node in nodes(file) if isinstance(node, Function) and node.args.kwarg]
    tunnels = [f"{f.name}:{f.lineno}" for f in functions if (file.name, f.name) not in MAY_PASS_ON]
    assert tunnels == [], "**kwargs hides what a function takes; name the parameters"


@every_file
def test_no_handler_swallows_everything(file):
    if file in MAY_CATCH_ALL:
        return
    handlers = [node for node in nodes(file) if isinstance(node, ast.ExceptHandler) and is_broad(node.type)]
    swallowed = [node.lineno for node in handlers if not passes_on(node)]
    assert swallowed == [], "name the exceptions that are expected"


def passes_on(handler: ast.ExceptHandler) -> bool:
    """Whether the handler ends by raising what it caught again."""
    last = handler.body[-1]
    return isinstance(last, ast.Raise) and last.exc is None


def is_broad(caught: ast.expr | None) -> bool:
    if isinstance(caught, ast.Tuple):
        return any(is_broad(part) for part in caught.elts)
    return caught is None or (isinstance(caught, ast.Name) and caught.id in ("Exception", "BaseException"))


@every_file
def test_no_wall_clock_in_control(file):
    if file in MAY_TELL_WALL_TIME:
        return
    calls = [
        node.lineno
        for node in nodes(file)
        if isinstance(node, ast.Attribute)
        and ast.unparse(node) in ("time.time", "datetime.now", "datetime.datetime.now")
    ]
    assert calls == [], "wall clocks jump; use time.monotonic() or time.perf_counter()"


def test_no_import_cycle_also_none_inside_a_function():
    graph = {name: set(imports(name, file)) for name, file in MODULES.items()}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def imports(name: str, file: Path) -> Iterator[str]:
    """The modules of Quartet that a module imports anywhere in its text."""
    for node in nodes(file):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        yield from (found for found in names if found in MODULES and found != name)


def test_the_rules_find_what_they_forbid():
    tree = ast.parse("def f(**rest):\n    try:\n        pass\n    except (OSError, Exception):\n        pass")
    function, handler = tree.body[0], tree.body[0].body[0].handlers[0]
    assert function.args.kwarg is not None
    assert is_broad(handler.type)
    assert not passes_on(handler)
    assert not is_broad(ast.parse("OSError", mode="eval").body)
    assert set(imports("launch.cli", ROOT / "launch" / "cli.py")) >= {
        "launch.help",
        "orchestrator.configfile",
    }
