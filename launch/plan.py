"""``quartet plan RUN... --cluster 4x8xH200``: memory, time and cost of a run on devices that nobody has
rented."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import yaml

from launch.foresight import shapes_of, this_machine
from orchestrator.config import Run
from orchestrator.plan.calibration import read_calibration
from orchestrator.plan.devices import parse_cluster
from orchestrator.plan.fit import Planned, fits
from orchestrator.plan.text import memory_text, time_text
from orchestrator.plan.workload import workload

DOES_NOT_FIT = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--cluster", help="NODESxDEVICESxKIND, e.g. 4x8xH200; default: the cores of this machine"
    )
    parser.add_argument("--prompt-tokens", type=int, help="mean length of the prompts")
    parser.add_argument("--response-tokens", type=float, help="mean length of the responses")
    parser.add_argument("--calibration", type=Path, help="rates measured on such devices, a JSON file")
    parser.add_argument("--price", type=float, help="of a device for an hour; default: a guess")
    parser.add_argument("--top", type=int, default=3, help="layouts to print; 0: only the run as it is")
    parser.add_argument("--out", type=Path, help="folder for the layouts, as YAML to lay on the run")


def main(run: Run, arguments: argparse.Namespace) -> int:
    """Prints the plan; the exit status is 1 when neither the run as it is nor any layout fits."""
    _check(arguments)
    cluster = parse_cluster(arguments.cluster) if arguments.cluster else this_machine()
    flow = None
    if run.rl is not None:
        flow = workload(run, run.rl, prompt=arguments.prompt_tokens, response=arguments.response_tokens)
    rates, overheads = read_calibration(arguments.calibration, cluster.device, run.model.dtype)
    plan = Planned(run=run, shapes=shapes_of(run), cluster=cluster, workload=flow, overheads=overheads)
    price = cluster.device.price if arguments.price is None else arguments.price

    print(f"{run.name} as it is, on {cluster.text}")
    found = fits(plan)
    print(memory_text(plan, found))
    cannot = any(fit.cannot for fit in found)
    if run.rl is None:
        return DOES_NOT_FIT if cannot else 0
    # The simulation runs the driver's loop, and with it torch.
    from orchestrator.plan.predict import predict  # noqa: PLC0415
    from orchestrator.plan.search import search  # noqa: PLC0415

    if not cannot:
        print(time_text(plan, predict(plan, rates), rates, price=price))
    if not arguments.top:
        return DOES_NOT_FIT if cannot else 0
    best = search(plan, rates, top=arguments.top)
    print(
        f"\n{best.num_divisions} layouts of {cluster.text}: {best.num_fitting} fit, "
        f"{best.num_simulated} simulated"
    )
    if best.why_none:
        print(f"the nearest one: {best.why_none}")
    for number, (candidate, prediction) in enumerate(best.best, start=1):
        text = yaml.safe_dump(candidate.tree, sort_keys=False)
        print(f"\n# layout {number}: quartet train RUN plan-{number}.yaml")
        words = time_text(replace(plan, run=candidate.run), prediction, rates, price=price)
        print("# " + words.replace("\n", "\n# "))
        print(text, end="")
        if arguments.out:
            arguments.out.mkdir(parents=True, exist_ok=True)
            (arguments.out / f"plan-{number}.yaml").write_text(text)
    return DOES_NOT_FIT if cannot and not best.best else 0


def _check(arguments: argparse.Namespace) -> None:
    if arguments.top < 0:
        raise ValueError(f"--top={arguments.top} layouts; give 0 or more")
    if arguments.price is not None and arguments.price < 0:
        raise ValueError(f"--price={arguments.price:g} is below 0; give what a device costs for an hour")
