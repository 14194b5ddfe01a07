"""Reads and writes the run tree: defaults <- YAML files <- ``a.b.c=value``. Nothing else can set a knob.

Several files lie on one another, the last on top: a mapping is merged key by key, anything else replaced.
One exception: an algorithm of another name replaces the whole one below it, whose settings it does not know.

Every complaint is a ValueError with the path of the field, the rule, the value and, for a name, its nearest
neighbour.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from orchestrator import plugins
from orchestrator.config import Run, algorithm
from orchestrator.plugins import nearest

ALGORITHM = ("rl", "algorithm")  # whose fields depend on the name among them
DEFAULT_OBJECTIVES = {"reward_model": "bradley_terry", "preference": "dpo"}


def load_run(files: Sequence[Path], overrides: Sequence[str]) -> Run:
    """The validated run; ValueError lists everything that is wrong with it, a line each."""
    tree: dict[str, Any] = {}
    for file in files:
        tree = merged(tree, read_yaml(file))
    for override in overrides:
        apply_override(tree, override)
    try:
        return Run(**tree)
    except ValidationError as error:
        where = f"{' + '.join(map(str, files))}: " if files else ""
        raise ValueError("\n".join(f"{where}{line}" for line in explain(error, tree))) from None


def read_yaml(file: Path) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(file.read_text())
    except OSError as error:
        raise ValueError(f"{file}: {error.strerror}; give a YAML file or the name of a preset") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{file} is not YAML: {error}") from None
    if not isinstance(tree, dict):
        raise ValueError(
            f"{file} holds {type(tree).__name__}; expected fields of a run, e.g. `model: {{path: ...}}`"
        )
    return tree


def merged(below: dict[str, Any], above: dict[str, Any], path: tuple[str, ...] = ()) -> dict[str, Any]:
    """The tree ``above`` laid on ``below``.

    >>> merged({"seed": 1, "rl": {"steps": 3}}, {"rl": {"staleness": 1}})
    {'seed': 1, 'rl': {'steps': 3, 'staleness': 1}}
    """
    tree = dict(below)
    for key, value in above.items():
        under: Any = tree.get(key)
        here, both = (*path, key), isinstance(value, dict) and isinstance(under, dict)
        name = under.get("name", "ppo") if both and here == ALGORITHM else None
        other = name is not None and value.get("name", name) != name
        tree[key] = merged(under, value, here) if both and not other else value
    return tree


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Sets one ``a.b.c=value``; the value is YAML, so ``[1, 2]`` and ``null`` mean what they say."""
    path, equals, text = override.partition("=")
    if not equals or not all(path.split(".")):
        raise ValueError(f"{override!r} is not an override; expected a.b.c=value")
    *parents, leaf = path.split(".")
    node = tree
    for parent in parents:
        below = node.get(parent)
        node[parent] = (
            dict(below) if isinstance(below, dict) else {}
        )  # a YAML alias is one dict in two places
        node = node[parent]
    try:
        node[leaf] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{override!r}: the value is not YAML: {error}") from None


def explain(error: ValidationError, tree: dict[str, Any]) -> list[str]:
    """One line per complaint about ``tree``: field, rule, value, remedy."""
    lines = []
    for item in error.errors():
        path = [str(part) for part in item["loc"]]
        if item["type"] == "extra_forbidden":
            known = known_fields(path[:-1], tree)
            lines.append(
                f"unknown field {'.'.join(path)}{nearest(path[-1], known)}; known here: {', '.join(known)}"
            )
        elif item["type"] == "value_error":
            lines.append(": ".join(filter(None, [".".join(path), str(item["ctx"]["error"])])))
        else:
            lines.append(f"{'.'.join(path)}: {item['msg']}; got {item['input']!r}")
    return lines


def known_fields(path: Sequence[str], tree: dict[str, Any]) -> list[str]:
    """The field names of the settings class that a path leads to."""
    if tuple(path) == ALGORITHM:
        return sorted(type(algorithm({"name": tree["rl"]["algorithm"].get("name", "ppo")})).model_fields)
    if path[1:] == ["objective"]:  # likewise
        name = tree[path[0]]["objective"].get("name", DEFAULT_OBJECTIVES[path[0]])
        return sorted(plugins.find("orchestrator.objectives", name).CONFIG.model_fields)
    settings: type[BaseModel] = Run
    parts = iter(path)
    for part in parts:
        field = settings.model_fields.get(part)
        inner = (
            [t for t in (field.annotation, *get_args(field.annotation)) if is_settings(t)] if field else []
        )
        if not inner:
            return []
        settings = inner[0]
        if field is not None and get_origin(field.annotation) is dict:
            next(parts, None)  # a name of the user's
    return sorted(settings.model_fields)


def is_settings(annotation: object) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def write_run(run: Run, file: Path) -> None:
    """The resolved tree; ``load_run`` of it gives the same run."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(run_as_yaml(run))


def run_as_yaml(run: Run) -> str:
    """Every field of the run with its value, in the order of the classes."""
    tree = run.model_dump(mode="json")
    if run.rl is not None:
        tree["rl"]["algorithm"] = {"name": run.rl.algorithm.name, **tree["rl"]["algorithm"]}
    for name in ("reward_model", "preference"):
        if (stage := getattr(run, name)) is not None:
            tree[name]["objective"] = {"name": stage.objective.name, **tree[name]["objective"]}
    return yaml.safe_dump(tree, sort_keys=False)
