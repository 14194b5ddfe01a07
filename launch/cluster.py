"""Ray, placement groups and the roster: the machines of a run, from a configuration to processes with names.

Invariant: whatever the cluster cannot grant is said within ``placement.timeout_s``, with what was asked, what
is there, and which number to change.
"""

import asyncio
import json
import logging
import os
import socket
import time
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from actors.vital_signs import RosterLine
from launch.leftovers import end_leftovers
from launch.submit.startup import mark
from launch.trace import RunTrace
from orchestrator.config import Run
from orchestrator.placement import Layout, Resources, Seat, engines_apart, layout, request, shortage

# Of one look at a placement group, in a thread that nobody can interrupt; Ray takes whole seconds.
GRANT_S = 1
SLURM_GRANT_S = 20.0  # a job gets no more nodes: what is not free by then is not there
OBJECT_STORE_BYTES = 512 * 2**20  # of a Ray of our own: a few batches of experience


ROLE_LABEL = "quartet.role."  # a node with the label quartet.role.actor=true is for the actor


def role_labels(plan: Layout, group: int, labels: set[str]) -> dict[str, str]:
    """The node labels that a placement group asks for: those of its roles for which some node is labelled.

    Example: on a cluster with nodes labelled quartet.role.actor, the actor's group gets
    {"quartet.role.actor": "true"}; on one without labels every group gets {} and may live anywhere.
    """
    roles = [role for role, seats in plan.seats.items() if group in {seat.group for seat in seats}]
    return {ROLE_LABEL + role: "true" for role in roles if ROLE_LABEL + role in labels}


def _groups_of(plan: Layout) -> list[PlacementGroup]:
    """Asks Ray for them and waits for nothing."""
    labels = {label for node in ray.nodes() if node["Alive"] for label in node.get("Labels", {})}
    return [
        placement_group(
            [*bundles],
            strategy="PACK",
            bundle_label_selector=[role_labels(plan, index, labels)] * len(bundles),
        )
        for index, bundles in enumerate(plan.groups)
    ]


class PlacementError(RuntimeError):
    """The cluster cannot grant what the run asks for."""


class Cluster(AbstractContextManager["Cluster"]):
    """A Ray connection and the placement groups of the current stage. Leaving it ends what it started."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._groups: list[PlacementGroup] = []
        self._single: list[PlacementGroup] = []  # of these, those of one engine that came later
        self._address = run.ray_address or os.environ.get("RAY_ADDRESS")
        self._fixed = "SLURM_JOB_ID" in os.environ  # the nodes are those of a job's allocation
        self._roster: list[RosterLine] = []
        self.trace = RunTrace(run.run_dir / "trace.json" if run.tracking.trace else None)

    def __enter__(self) -> Self:
        local = {
            "address": "local",  # not one that somebody else has started on this machine
            "num_cpus": os.cpu_count(),
            "object_store_memory": OBJECT_STORE_BYTES,
            "include_dashboard": False,
        }
        where: dict[str, Any] = local if self._address is None else {"address": self._address}
        # What Ray says, every time, of two choices of ours: tokens are on, and records arrive read-only.
        logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)
        warnings.filterwarnings("ignore", message="Zero-copy tensor serialization is enabled")
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        end_leftovers(Path(self._run.run_dir) / "roster.json")
        ray.init(logging_level="warning", log_to_driver=False, **where)
        alive = [node for node in ray.nodes() if node["Alive"]]
        mark("head healthy")
        mark(
            "nodes joined",
            f"{len(alive)} ({', '.join(sorted(node['NodeManagerAddress'] for node in alive))})",
        )
        self.record([RosterLine(role="driver", rank=0, pid=os.getpid(), node=socket.gethostname())])
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()
        self.trace.close()
        ray.shutdown()

    def place(self, roles: Sequence[str]) -> tuple[Layout, list[PlacementGroup]]:
        """Reserves the devices of a stage; raises PlacementError when they are not granted in time."""
        plan = engines_apart(layout(self._run, roles))
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        if self._address is None and (why := shortage(self._run, plan, nodes)):
            raise PlacementError(why)
        self._groups = _groups_of(plan)
        deadline = time.monotonic() + self._run.placement.timeout_s
        for group in self._groups:
            if not group.wait(max(0.1, deadline - time.monotonic())):
                raise PlacementError(self._refusal(plan))
        mark("placement groups ready", ", ".join(roles))
        return plan, self._groups

    async def one_more_engine(self) -> tuple[Seat, PlacementGroup]:
        """A seat in a group of its own; PlacementError when the cluster does not grant it in time."""
        engine = self._run.engine.model_copy(update={"replicas": 1})
        plan = layout(self._run.model_copy(update={"engine": engine}), ["engine"])
        (group,) = _groups_of(plan)
        timeout_s = self._run.placement.timeout_s
        deadline = time.monotonic() + (min(timeout_s, SLURM_GRANT_S) if self._fixed else timeout_s)
        try:
            while not await asyncio.to_thread(group.wait, GRANT_S):
                if time.monotonic() > deadline:
                    raise PlacementError(self._refusal(plan))
        except BaseException:  # cancelled too: the run is over
            remove_placement_group(group)
            raise
        self._groups.append(group)
        self._single.append(group)
        return plan.seats["engine"][0], group

    def give_back(self, group: PlacementGroup) -> bool:
        """Of ``one_more_engine``; False for a group that others live in."""
        if group not in self._single:
            return False
        self._single.remove(group)
        self._groups.remove(group)
        remove_placement_group(group)
        return True

    def release(self) -> None:
        """Gives the devices back."""
        for group in self._groups:
            remove_placement_group(group)
        self._groups, self._single = [], []

    def record(self, lines: Sequence[RosterLine]) -> None:
        """Writes the roster anew; a line replaces the one of the same role and rank."""
        taken = {(line.role, line.rank) for line in lines}
        self._roster = [line for line in self._roster if (line.role, line.rank) not in taken]
        self._roster += lines
        path = Path(self._run.run_dir) / "roster.json"
        draft = path.with_suffix(".tmp")
        draft.write_text(json.dumps([asdict(line) for line in self._roster], indent=1))
        draft.rename(path)

    def forget_engine(self, index: int) -> None:
        """It has left a stage that goes on."""
        self.trace.book.leave(f"engine {index}")
        own, child = ("engine", index), f"engine {index} child"
        self._roster = [x for x in self._roster if (x.role, x.rank) != own and x.role != child]
        self.record([])

    def forget(self) -> None:
        """The workers of a stage have ended; the driver stays."""
        self._roster = [line for line in self._roster if line.role == "driver"]
        self.record([])

    def _refusal(self, plan: Layout) -> str:
        nodes: list[Resources] = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        if why := shortage(self._run, plan, nodes):
            return why
        free = {name: amount for name, amount in ray.available_resources().items() if name in ("CPU", "GPU")}
        if self._fixed:
            return (
                f"{request(self._run, plan)}\nfinds no room in Slurm's allocation, in which only {free} is "
                "free: ask for less, or submit the run with more nodes"
            )
        return (
            f"{request(self._run, plan)}\nwas not granted within "
            f"placement.timeout_s={self._run.placement.timeout_s:g} s. The cluster is large enough, but only "
            f"{free} is free now: wait for other jobs, or raise the timeout"
        )
