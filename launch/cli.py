"""The command ``quartet``: reads the run, refuses what is wrong with it in a fraction of a second, then
starts it.

Invariant: nothing here imports torch or ray. ``launch.train``, which does, is imported after the run is
valid, so a typo costs 0.3 s and no device. A ValueError is the user's to read: one line on stderr, exit
status 2.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import textwrap
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from importlib import import_module, metadata, resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import NoReturn

from launch import help as field_help
from launch.environment import prepare_environment
from orchestrator.config import Run
from orchestrator.configfile import load_run, run_as_yaml
from orchestrator.plugins import nearest
from orchestrator.secret import redact, redact_logs, refuse_secrets

PRESETS, ALGORITHMS = "launch.presets", "algorithms"
REFUSED, INTERRUPTED = 2, 130

OVERVIEW = """\
usage: quartet VERB ...

Trains language models from human feedback on Ray, DeepSpeed and vLLM.

verbs
  train RUN... [a.b.c=value ...] [--resume | --fresh]   train; RUN is a YAML file or a preset
  evaluate RUN... [a.b.c=value ...]                     measure a checkpoint: loss, reward, pass@k, win rate
  export RUN|ADAPTER --to FOLDER [--base MODEL]         merge an adapter into a plain model folder
  config RUN... [a.b.c=value ...]                       print the run with every default filled in
  report RUN                                            one page: curves, device time, timeline, samples
  bench SUITE... | compare A B                          how fast each part is, against what bounds it
  scale RUN engine=4 [--to TARGET]                      engines join or leave a run that is at work
  train --help                                          every field of a run
  submit RUN... --to TARGET                             the run on local, ray, kuberay or slurm;
                                                        also render, lint, status, logs, stop, resume
  plan RUN... [--cluster 4x8xH200]                      memory, time and cost of a run before renting devices
  doctor                                                checks this machine, or a Ray cluster
  serve-reward MODEL                                    a reward model as a service
  --help, --version                                     this text; the version

Several RUNs lie on one another, the last on top: quartet train quickstart dapo rl.steps=10

presets of whole runs
  {runs}
presets of algorithms, to lay on a run
  {algorithms}
"""


class Parser(argparse.ArgumentParser):
    """argparse, but complaints are ValueErrors like every other complaint."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; see `{self.prog} --help`")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; the exit status is 0, what training returns, 2 (refused) or 130 (interrupted)."""
    redact_logs()
    try:
        return dispatch(sys.argv[1:] if argv is None else argv)
    except ValueError as error:
        print(redact(f"quartet: error: {error}"), file=sys.stderr)
        return REFUSED
    except KeyboardInterrupt:
        print("quartet: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # `quartet train --help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def dispatch(argv: Sequence[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(OVERVIEW.format(runs="  ".join(presets()), algorithms="  ".join(algorithms())), end="")
        return 0 if argv else REFUSED
    if argv[0] == "--version":
        print(f"quartet {metadata.version('quartet-rlhf')}")
        return 0
    if argv[0] not in VERBS:
        raise ValueError(
            f"unknown verb {argv[0]!r}{nearest(argv[0], list(VERBS))}; known: {', '.join(VERBS)}"
        )
    return VERBS[argv[0]](argv[1:])


def train(argv: Sequence[str]) -> int:
    """``quartet train RUN... [a.b.c=value ...] [--resume | --fresh] [--supervise]``."""
    if "-h" in argv or "--help" in argv:
        print(train_help(colour=sys.stdout.isatty() and "NO_COLOR" not in os.environ), end="")
        return 0
    arguments = train_parser().parse_intermixed_args(argv)
    run = resolve(arguments.words)
    if not (run.sft or run.reward_model or run.preference or run.rl):
        raise ValueError("no stage: give at least one of sft, reward_model, preference, rl")
    if arguments.supervise:
        from launch import keep_going  # noqa: PLC0415 - only this option needs it

        options = [name for name in ("resume", "fresh") if getattr(arguments, name)]
        return keep_going.main(arguments.words, options, restarts=run.recovery.restarts)

    prepare_environment()
    from launch.run_folder import RunFolder  # noqa: PLC0415

    # Held before the slow imports: a second run on the same directory is refused in less than a second.
    with RunFolder(run, resume=arguments.resume, fresh=arguments.fresh) as folder:
        from launch import train as training  # noqa: PLC0415 - torch and ray load here

        return training.main(run, folder)


def config(argv: Sequence[str]) -> int:
    """``quartet config RUN... [a.b.c=value ...]``."""
    if "-h" in argv or "--help" in argv:
        print("usage: quartet config RUN... [a.b.c=value ...]\n\nPrints the run, every default filled in.")
        return 0
    arguments = run_parser("config").parse_intermixed_args(argv)
    print(run_as_yaml(resolve(arguments.words)), end="")
    return 0


def evaluate(argv: Sequence[str]) -> int:
    """``quartet evaluate RUN... [a.b.c=value ...]``."""
    if "-h" in argv or "--help" in argv:
        print("usage: quartet evaluate RUN... [a.b.c=value ...]\n\nMeasures what its `evaluate:` names.")
        return 0
    arguments = run_parser("evaluate").parse_intermixed_args(argv)
    run = resolve(arguments.words)

    prepare_environment()
    from launch import evaluate as evaluation  # noqa: PLC0415 - torch and ray load here

    return evaluation.main(run)


def report(argv: Sequence[str]) -> int:
    """``quartet report RUN``: a run_dir, or what was trained."""
    if "-h" in argv or "--help" in argv:
        print("usage: quartet report RUN\n\nWrites report.html; RUN is a run_dir, or a YAML file or preset.")
        return 0
    words = run_parser("report").parse_intermixed_args(argv).words
    from launch import report as pages  # noqa: PLC0415

    is_folder = len(words) == 1 and Path(words[0]).is_dir()
    return pages.main(Path(words[0]) if is_folder else resolve(words).run_dir)


def export(argv: Sequence[str]) -> int:
    """``quartet export RUN... --to FOLDER`` or ``quartet export ADAPTER --to FOLDER [--base MODEL]``."""
    parser = run_parser("export")
    parser.add_argument("-h", "--help", action="help")
    parser.add_argument("--to", required=True, type=Path, help="folder of the merged model")
    parser.add_argument("--base", help="the model it was trained on, where that is no longer where it was")
    arguments = parser.parse_intermixed_args(argv)
    folder = Path(arguments.words[0])
    run = None if folder.is_dir() else resolve(arguments.words)

    prepare_environment()
    from launch import export as exporting  # noqa: PLC0415 - torch loads here

    adapter = folder if run is None else exporting.adapter_of(run)
    print(f"merged {adapter} into {exporting.export(adapter, arguments.to, base=arguments.base)}")
    return 0


def scale(argv: Sequence[str]) -> int:
    """``quartet scale RUN engine=4 [--to TARGET]``: a run_dir, or what was trained or submitted."""
    from launch import scale as scaling  # noqa: PLC0415
    from launch.submit import verbs  # noqa: PLC0415

    parser = run_parser("scale")
    verbs.add_arguments(parser)
    arguments = parser.parse_intermixed_args(argv)
    words, arguments.changes = scaling.split(arguments.words)
    if len(words) == 1 and Path(words[0]).is_dir():
        return scaling.main(Path(words[0]), arguments.changes)
    return verbs.main("scale", resolve(words), arguments)


def on_target(verb: str, argv: Sequence[str]) -> int:
    """``quartet submit RUN... [a.b.c=value ...] --to TARGET [--at key=value] [--wait]``, and its sister
    verbs."""
    from launch.submit import verbs  # noqa: PLC0415 - only these verbs need it

    parser = run_parser(verb)
    parser.add_argument("-h", "--help", action="help")
    verbs.add_arguments(parser)
    arguments = parser.parse_intermixed_args(argv)
    return verbs.main(verb, resolve(arguments.words), arguments)


def plan(argv: Sequence[str]) -> int:
    """``quartet plan RUN... [a.b.c=value ...] [--cluster 4x8xH200]``."""
    from launch import plan as foresight  # noqa: PLC0415

    parser = run_parser("plan")
    parser.add_argument("-h", "--help", action="help")
    foresight.add_arguments(parser)
    arguments = parser.parse_intermixed_args(argv)
    return foresight.main(resolve(arguments.words), arguments)


def lazily(module: str, prepared: bool, argv: Sequence[str]) -> int:
    """A verb with a module of its own, which loads what only it needs; ``prepared``: torch or ray."""
    if prepared:
        prepare_environment()
    return int(import_module(module).main(argv))


ON_TARGET = ("submit", "render", "lint", "status", "logs", "stop", "resume")
VERBS: dict[str, Callable[[Sequence[str]], int]] = {
    "train": train,
    "evaluate": evaluate,
    "config": config,
    "export": export,
    "report": report,
    "bench": partial(lazily, "launch.bench.main", True),
    "scale": scale,
    **{verb: partial(on_target, verb) for verb in ON_TARGET},
    "plan": plan,
    "doctor": partial(lazily, "launch.doctor", False),
    "serve-reward": partial(lazily, "launch.serve_reward", True),
}


def run_parser(verb: str) -> Parser:
    parser = Parser(prog=f"quartet {verb}", add_help=False)
    parser.add_argument("words", nargs="+", metavar="RUN")
    return parser


def train_parser() -> Parser:
    parser = run_parser("train")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--fresh", action="store_true")
    parser.add_argument("--supervise", action="store_true")
    return parser


def train_help(*, colour: bool) -> str:
    opening = (
        "usage: quartet train RUN... [a.b.c=value ...] [--resume | --fresh] [--supervise]\n\n"
        f"RUN is a YAML file, or a preset: {', '.join(presets())}.\n"
        "Several RUNs lie on one another, the last on top. Presets of algorithms, to lay on a run:\n"
        f"{textwrap.fill(', '.join(algorithms()), field_help.WIDTH)}.\n"
        "Values are YAML: 0.5, true, null, [1, 2].\n"
        "When run_dir holds a run: --resume goes on from its last checkpoint, --fresh starts over.\n"
        "--supervise starts it again from there whenever it dies, at most recovery.restarts times an hour.\n"
    )
    return opening + field_help.render(
        [*field_help.run_sections(), *field_help.algorithm_sections(), *field_help.objective_sections()],
        colour=colour,
    )


def resolve(words: Sequence[str]) -> Run:
    """The validated run: YAML paths and presets laid on one another, then ``a.b.c=value`` in their order."""
    overrides = [word for word in words if re.match(r"[\w.]*=", word)]
    runs = [word for word in words if word not in overrides]
    if not runs:
        raise ValueError(f"{words[0]!r} overrides no run; give a YAML file or a preset first")
    if not any(is_file(name) or name in presets() for name in runs) and runs[0] in algorithms():
        raise ValueError(
            f"{runs[0]!r} is an algorithm and no whole run; lay it on one: quartet train quickstart {runs[0]}"
        )
    with ExitStack() as open_files:
        files = [Path(name) if is_file(name) else open_files.enter_context(preset(name)) for name in runs]
        run = load_run(files, overrides)
    refuse_secrets(run_as_yaml(run))
    return run


def is_file(word: str) -> bool:
    return word.endswith((".yaml", ".yml")) or os.sep in word


def preset(name: str) -> AbstractContextManager[Path]:
    """The file of a preset, of a run or an algorithm; ValueError lists the known ones."""
    folder = resources.files(PRESETS)
    if name in presets():
        return resources.as_file(folder / f"{name}.yaml")
    if name in algorithms():
        return resources.as_file(folder / ALGORITHMS / f"{name}.yaml")
    known = [*presets(), *algorithms()]
    raise ValueError(
        f"unknown preset {name!r}{nearest(name, known)}; known: {', '.join(known)}; or give a .yaml file"
    )


def presets() -> list[str]:
    """Names of the YAML files in launch/presets/: whole runs."""
    return _names(resources.files(PRESETS))


def algorithms() -> list[str]:
    """Names of the YAML files in launch/presets/algorithms/: what a paper sets, to lay on a run."""
    return _names(resources.files(PRESETS) / ALGORITHMS)


def _names(folder: Traversable) -> list[str]:
    files = (entry.name for entry in folder.iterdir())
    return sorted(name.removesuffix(".yaml") for name in files if name.endswith(".yaml"))


if __name__ == "__main__":
    sys.exit(main())
