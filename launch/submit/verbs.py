"""``quartet render | lint | submit | status | logs | stop | resume RUN --to TARGET``.

TARGET is ``local``, ``ray``, ``kuberay``, ``slurm``, or a YAML file with ``kind:`` and the target's settings;
``--at key=value`` sets one of them. The verbs are the same everywhere; what differs is in ``targets/``.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

from pydantic import ValidationError

from launch import scale as scaling
from launch.submit.job import NOT_FOUND, Job, Report, Scales, State, Target, attempts
from launch.submit.startup import Startup
from orchestrator import plugins
from orchestrator.config import Run
from orchestrator.configfile import apply_override, read_yaml

FOLDER = "launch.submit.targets"
POLL_S = 1.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--to", default="local", metavar="TARGET", help="local, ray, kuberay, slurm or a YAML file"
    )
    parser.add_argument(
        "--at", action="append", default=[], metavar="KEY=VALUE", help="a setting of the target"
    )
    parser.add_argument("--attempt", type=int, help="which attempt; default: the newest")
    parser.add_argument(
        "--wait", action="store_true", help="follow the start and the log until the job is over"
    )


def main(verb: str, run: Run, arguments: argparse.Namespace) -> int:
    """One verb; the exit status is described in docs/cluster.md."""
    target = find_target(arguments.to, arguments.at)
    return VERBS[verb](target, run, arguments)


def find_target(name: str, overrides: list[str]) -> Target:
    tree = read_yaml(Path(name)) if name.endswith((".yaml", ".yml")) else {"kind": name}
    for override in overrides:
        apply_override(tree, override)
    if "kind" not in tree:
        raise ValueError(f"{name}: `kind` is missing; one of {', '.join(plugins.names(FOLDER))}")
    module = plugins.find(FOLDER, str(tree["kind"]))
    try:
        return module.Target(module.CONFIG(**tree))
    except ValidationError as error:
        known = ", ".join(module.CONFIG.model_fields)
        lines = [
            f"--to {name}: {'.'.join(map(str, e['loc']))}: {e['msg']}; known: {known}" for e in error.errors()
        ]
        raise ValueError("\n".join(lines)) from None


def render(target: Target, run: Run, arguments: argparse.Namespace) -> int:
    write(target.render(Job(run=run, attempt=arguments.attempt or 0)))
    return 0


def lint(target: Target, run: Run, arguments: argparse.Namespace) -> int:
    refuse(target.lint(Job(run=run, attempt=arguments.attempt or 0)))
    write("nothing to complain about\n")
    return 0


def submit(target: Target, run: Run, arguments: argparse.Namespace) -> int:
    """The first attempt. Submitting what is there already changes nothing and reports it."""
    refuse(target.lint(Job(run=run)))
    known = attempts(target.reports(run), run.name)
    if known:
        write(f"{line(known[-1])}\nalready submitted; `quartet resume` makes the next attempt\n")
        return watch(target, run, known[-1].id) if arguments.wait else known[-1].status
    return create(target, Job(run=run), arguments)


def resume(target: Target, run: Run, arguments: argparse.Namespace) -> int:
    """The next attempt, from the newest checkpoint; the last one must be over."""
    known = attempts(target.reports(run), run.name)
    if known and not known[-1].state.is_over:
        raise ValueError(
            f"{known[-1].id} is {known[-1].state}; stop it first, or follow it with `quartet logs`"
        )
    job = Job(run=run, attempt=known[-1].attempt + 1 if known else 0, resume=True)
    refuse(target.lint(job))
    return create(target, job, arguments)


def create(target: Target, job: Job, arguments: argparse.Namespace) -> int:
    refuse(target.preflight(job))
    target.submit(job)
    write(f"submitted {job.id}\n")
    return watch(target, job.run, job.id) if arguments.wait else 0


def status(target: Target, run: Run, arguments: argparse.Namespace) -> int:
    known = attempts(target.reports(run), run.name)
    if not known:
        write(f"{run.name} was never submitted here\n")
        return NOT_FOUND
    write("".join(f"{line(report)}\n" for report in known))
    return chosen(known, arguments.attempt).status


def logs(target: Target, run: Run, arguments: argparse.Namespace) -> int:
    report = chosen(attempts(target.reports(run), run.name), arguments.attempt)
    if arguments.wait:
        return watch(target, run, report.id)
    for text in target.logs(run, report.id, follow=False):
        write(text)
    return 0


def stop(target: Target, run: Run, arguments: argparse.Namespace) -> int:
    report = chosen(attempts(target.reports(run), run.name), arguments.attempt)
    if report.state.is_over:
        write(f"{line(report)}\n")
        return 0
    target.stop(run, report.id)
    write(f"{line(chosen(attempts(target.reports(run), run.name), report.attempt))}\n")
    return 0


def scale(target: Target, run: Run, arguments: argparse.Namespace) -> int:
    """``arguments.changes``: ["engine=4"]. Where the target has no say in devices, the run_dir is enough."""
    if not isinstance(target, Scales):
        return scaling.main(run.run_dir, arguments.changes)
    engines = scaling.count(arguments.changes)
    report = chosen(attempts(target.reports(run), run.name), arguments.attempt)
    if report.state is not State.RUNNING:
        raise ValueError(f"{report.id} is {report.state}; only a run at work changes its engines")
    write(f"{target.scale(run, report.id, engines)}\n")
    return 0


def watch(target: Target, run: Run, id: str) -> int:
    """Follows one attempt to its end. A log that ends early is asked for again while the job is not over."""
    startup, shown = Startup(deadline_s=target.settings.start_deadline_s), 0
    while True:
        report = next((r for r in target.reports(run) if r.id == id), None)
        if report is None:
            raise ValueError(f"{id} has disappeared from the target; `quartet status` shows what is left")
        text = "".join(target.logs(run, id, follow=False))
        write(text[shown:])
        shown = max(shown, len(text))
        for event in startup.feed(text):
            sys.stderr.write(event + "\n")
        if report.state.is_over:
            write(f"{line(report)}\n")
            return report.status
        if why := startup.late():
            target.stop(run, id)
            raise ValueError(f"{id} was stopped: {why}")
        time.sleep(POLL_S)


def chosen(known: list[Report], attempt: int | None) -> Report:
    for report in known:
        if attempt in (None, report.attempt) and (attempt is not None or report is known[-1]):
            return report
    there = ", ".join(report.id for report in known) or "none"
    raise ValueError(f"no such attempt here; known: {there}")


def line(report: Report) -> str:
    code = "" if report.exit_code is None else f"  exit code {report.exit_code}"
    return f"{report.id}  {report.state}{code}{'  ' + report.message if report.message else ''}"


def refuse(complaints: list[str]) -> None:
    if complaints:
        raise ValueError("\n".join(complaints))


def write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


VERBS: dict[str, Callable[[Target, Run, argparse.Namespace], int]] = {
    "render": render,
    "lint": lint,
    "submit": submit,
    "status": status,
    "logs": logs,
    "stop": stop,
    "resume": resume,
    "scale": scale,
}
