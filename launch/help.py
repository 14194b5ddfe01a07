"""Turns the settings classes into ``quartet train --help``, so that a knob is documented in one place: under
its field.

Example, one leaf as it is printed:

    rl.sampling.temperature  float > 0 = 1.0
        Sampling temperature; the trainer scores at the same one.
"""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic.fields import FieldInfo

from orchestrator import plugins
from orchestrator.config import Run
from orchestrator.settings import Settings

WIDTH = 100
BOLD, CYAN, RESET = "\x1b[1m", "\x1b[36m", "\x1b[0m"


@dataclass(frozen=True, slots=True, kw_only=True)
class Leaf:
    """One knob, e.g. path "sft.batch_size", kind "int > 0", default "32"."""

    path: str
    kind: str
    default: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    title: str
    text: str
    leaves: tuple[Leaf, ...]


def run_sections() -> list[Section]:
    """The run tree: its own leaves first, then one section per field that is a tree itself."""
    own, trees = [], []
    for name, field in Run.model_fields.items():
        if (inner := settings_of(field.annotation)) is None:
            own.append(leaf(name, field, field.get_default(call_default_factory=True)))
        else:
            trees.append(section(name, inner, field))
    return [Section(title="run", text=inspect.getdoc(Run) or "", leaves=tuple(own)), *trees]


def section(name: str, settings: type[Settings], field: FieldInfo) -> Section:
    default = field.get_default(call_default_factory=True)
    absent = " Absent unless set." if default is None else ""
    return Section(
        title=name,
        text=(field.description or "") + absent,
        leaves=tuple(leaves_of(settings, f"{name}.", default or settings())),
    )


def algorithm_sections() -> list[Section]:
    """One section per file in orchestrator/algorithms/."""
    found = []
    for name in plugins.names("orchestrator.algorithms"):
        settings = vars(plugins.find("orchestrator.algorithms", name)).get("CONFIG")
        if settings is not None:
            leaves = tuple(leaves_of(settings, "rl.algorithm.", settings()))
            found.append(
                Section(title=f"rl.algorithm.name={name}", text=inspect.getdoc(settings) or "", leaves=leaves)
            )
    return found


def objective_sections() -> list[Section]:
    """One section per file in orchestrator/objectives/ that a stage chooses by name and that has settings."""
    found = []
    for name in plugins.names("orchestrator.objectives"):
        settings = vars(plugins.find("orchestrator.objectives", name))["CONFIG"]
        title = f"{settings.stage}.objective.name={name}"
        leaves = tuple(leaves_of(settings, f"{settings.stage}.objective.", settings()))
        if leaves:
            found.append(Section(title=title, text=inspect.getdoc(settings) or "", leaves=leaves))
    return found


def leaves_of(settings: type[Settings], prefix: str, defaults: Settings) -> Iterator[Leaf]:
    """Every leaf under a settings class, with the defaults of the instance that its parent holds."""
    for name, field in settings.model_fields.items():
        value = getattr(defaults, name)
        inner = settings_of(field.annotation)
        if inner is None:
            yield leaf(prefix + name, field, value)
        elif inner is Settings:  # whose class depends on a name: the algorithm
            known = " | ".join(plugins.names("orchestrator.algorithms"))
            yield Leaf(
                path=f"{prefix}{name}.name", kind=known, default=value.name, text=field.description or ""
            )
        else:
            own = f"{name}.NAME" if get_origin(field.annotation) is dict else name
            yield from leaves_of(inner, f"{prefix}{own}.", value or inner())


def leaf(path: str, field: FieldInfo, value: object) -> Leaf:
    kind = kind_of(field.annotation) + bounds(field.metadata)
    return Leaf(path=path, kind=kind, default=shown(value), text=field.description or "")


def settings_of(annotation: Any) -> type[Settings] | None:
    """The settings class in an annotation such as ``Sft | None``; None when the field is a leaf."""
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, Settings):
            return candidate
    return None


def kind_of(annotation: Any) -> str:
    """An annotation as a user reads it: ``PositiveInt | None`` is "int > 0 | null"."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return kind_of(args[0]) + bounds(args[1:])
    if origin in (Union, UnionType):
        return " | ".join(kind_of(a) for a in args)
    if origin is Literal:
        return " | ".join(str(a) for a in args)
    if origin is tuple:
        return f"[{', '.join('...' if a is Ellipsis else kind_of(a) for a in args)}]"
    if annotation in (str, Path, NoneType):
        return {str: "text", Path: "path", NoneType: "null"}[annotation]
    return str(annotation.__name__)


def bounds(metadata: Sequence[Any]) -> str:
    """The limits of a number: " >= 0, <= 1"."""
    limits = []
    for rule in metadata:
        for part in rule.metadata if isinstance(rule, FieldInfo) else (rule,):
            match part:
                case annotated_types.Gt(gt=limit):
                    limits.append(f"> {limit}")
                case annotated_types.Ge(ge=limit):
                    limits.append(f">= {limit}")
                case annotated_types.Le(le=limit):
                    limits.append(f"<= {limit}")
    return " " + ", ".join(limits) if limits else ""


def shown(value: object) -> str:
    """A default as one would type it after ``=``."""
    if isinstance(value, tuple):
        return f"[{', '.join(shown(v) for v in value)}]"
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    return '""' if value == "" else str(value)


def render(sections: Sequence[Section], *, colour: bool) -> str:
    """The sections as text of at most WIDTH columns; escape codes only when asked for."""
    bold, cyan, reset = (BOLD, CYAN, RESET) if colour else ("", "", "")
    lines: list[str] = []
    for part in sections:
        lines += ["", f"{bold}{part.title}{reset}", *wrapped(part.text, 2)]
        for item in part.leaves:
            rest = f"{item.kind} = {item.default}"
            if len(item.path) + len(rest) + 4 <= WIDTH:
                lines.append(f"  {cyan}{item.path}{reset}  {rest}")
            else:
                lines += [f"  {cyan}{item.path}{reset}", *wrapped(rest, 4)]
            lines += wrapped(item.text, 6)
    return "\n".join(lines) + "\n"


def wrapped(text: str, indent: int) -> list[str]:
    margin = " " * indent
    return textwrap.wrap(" ".join(text.split()), WIDTH, initial_indent=margin, subsequent_indent=margin)
