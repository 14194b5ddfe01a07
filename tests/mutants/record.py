"""What a mutant is: one known bug, put back into the tree by replacing one text."""

import ast
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

OTHER = "OTHER"  # a bug of the same kinds that is no row of the list
ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, slots=True, kw_only=True)
class Mutant:
    """Example: Mutant(name="a clamp kills the KL's gradient", row="B13", file="orchestrator/kl.py",
    old="where(mask, 0.0)\\n    match", new="where(mask, 0.0).clamp(-10, 10)\\n    match", tests=(...,))."""

    name: str  # what is wrong, in a few words
    file: str  # from the root of the tree
    old: str  # occurs exactly once in the file
    new: str
    tests: tuple[str, ...]  # node ids; at least one of them must fail
    row: str = OTHER  # of the list of bugs (rows.py)
    slow: bool = False  # its tests start DeepSpeed or vLLM

    def mutated(self, root: Path = ROOT) -> str:
        """The file with the bug. ValueError when the mutant is stale: the text is not there exactly once."""
        text = (root / self.file).read_text()
        if (count := text.count(self.old)) != 1:
            raise ValueError(f"its old text occurs {count} times in {self.file}; write it anew")
        return text.replace(self.old, self.new)


def complaints(mutants: Iterable[Mutant]) -> list[str]:
    """Why mutants cannot be played: stale texts, no syntax, tests that do not exist."""
    found = []
    for mutant in mutants:
        try:
            ast.parse(mutant.mutated())
        except (OSError, ValueError, SyntaxError) as error:
            found.append(f"{mutant.name}: {error}")
        found += [f"{mutant.name}: no test {test}" for test in mutant.tests if not exists(test)]
    return found


def exists(node: str) -> bool:
    """Whether "file::Class::test[params]" is defined; the parameters are pytest's to check."""
    file, *names = node.partition("[")[0].split("::")
    return (ROOT / file).is_file() and bool(names) and tuple(names) in _defined(file)


@cache
def _defined(file: str) -> frozenset[tuple[str, ...]]:
    """("test_x",) and ("TestX", "test_y") of a file."""
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    found: set[tuple[str, ...]] = set()
    for node in ast.parse((ROOT / file).read_text()).body:
        if isinstance(node, functions):
            found.add((node.name,))
        elif isinstance(node, ast.ClassDef):
            found |= {(node.name, inner.name) for inner in node.body if isinstance(inner, functions)}
    return frozenset(found)
