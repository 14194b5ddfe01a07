"""``quartet plan RUN... --cluster 4x8xH200``: memory and time of a run on devices that nobody has rented
yet."""

from __future__ import annotations

import argparse

from launch.foresight import shapes_of, this_machine
from orchestrator.config import Run
from orchestrator.plan.devices import parse_cluster
from orchestrator.plan.fit import Planned, fits
from orchestrator.plan.memory import Overheads
from orchestrator.plan.text import memory_text
from orchestrator.plan.workload import workload

DOES_NOT_FIT = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--cluster", help="NODESxDEVICESxKIND, e.g. 4x8xH200; default: the cores of this machine"
    )
    parser.add_argument("--prompt-tokens", type=int, help="mean length of the prompts")
    parser.add_argument("--response-tokens", type=float, help="mean length of the responses")


def main(run: Run, arguments: argparse.Namespace) -> int:
    """Prints the plan; the exit status is 1 when the run as it stands cannot fit."""
    cluster = parse_cluster(arguments.cluster) if arguments.cluster else this_machine()
    flow = None
    if run.rl is not None:
        flow = workload(run, run.rl, prompt=arguments.prompt_tokens, response=arguments.response_tokens)
    planned = Planned(run=run, shapes=shapes_of(run), cluster=cluster, workload=flow, overheads=Overheads())
    found = fits(planned)
    print(memory_text(planned, found))
    return DOES_NOT_FIT if any(fit.cannot for fit in found) else 0
