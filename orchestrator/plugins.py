"""The folder is the registry: ``algorithms/grpo.py`` is the algorithm "grpo". Nothing is registered anywhere
else."""

import difflib
import importlib
import pkgutil
from types import ModuleType
from typing import Any


def names(package: str) -> list[str]:
    """What a folder offers, in alphabetical order; files that start with an underscore are not offers."""
    folder = importlib.import_module(package)
    return sorted(m.name for m in pkgutil.iter_modules(folder.__path__) if not m.name.startswith("_"))


def find(package: str, name: str) -> ModuleType:
    """The module ``name`` of a folder; ValueError lists the known ones."""
    known = names(package)
    if name not in known:
        kind = package.rsplit(".", 1)[-1].removesuffix("s")
        raise ValueError(f"unknown {kind} {name!r}{nearest(name, known)}; known: {', '.join(known)}")
    return importlib.import_module(f"{package}.{name}")


def load(spec: str) -> Any:
    """The object behind ``pkg.module:Name``; ValueError says what is missing."""
    module_name, _, attribute = spec.partition(":")
    try:
        return getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"{spec!r} cannot be loaded: {error}; expected package.module:name on PYTHONPATH"
        ) from error


def nearest(name: str, known: list[str]) -> str:
    """A hint for a message: ", did you mean 'grpo'?" or nothing."""
    close = difflib.get_close_matches(name, known, n=1)
    return f", did you mean {close[0]!r}?" if close else ""
