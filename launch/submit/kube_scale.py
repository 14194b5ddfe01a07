"""More engines of a run on KubeRay, or fewer: the replicas of their worker group in the RayCluster.

    more     the run is asked first, so what it refuses changes nothing; then the group gets pods, for which
             the placement groups of the new engines wait (placement.timeout_s)
    fewer    the run is asked; when the engines have left, the pods in which nobody of the run lives go, by
             name: the operator would take any

A RayJob makes its RayCluster once and leaves its later changes alone.
"""

from __future__ import annotations

import json
from typing import Any

from launch.submit.kube_settings import CONFIG
from launch.submit.manifests import engine_pods
from orchestrator.config import Run

Object = dict[str, Any]


def group_of_engines(cluster: Object) -> tuple[int, Object]:
    """Where it is among the worker groups of a RayCluster; ValueError when engines share their pods."""
    groups = cluster["spec"]["workerGroupSpecs"]
    for index, group in enumerate(groups):
        if group["groupName"] == "engine":
            return index, group
    names = ", ".join(group["groupName"] for group in groups)
    raise ValueError(
        f"no worker group of {cluster['metadata']['name']} is for engines alone (there are {names}); give "
        "them devices of their own (placement.share) and submit the run again"
    )


def resized(index: int, replicas: int, *, without: list[str]) -> str:
    """A JSON patch (RFC 6902); ``without``: the pods that go."""
    path = f"/spec/workerGroupSpecs/{index}"
    names = ("replicas", "minReplicas", "maxReplicas")
    operations: list[Object] = [{"op": "test", "path": f"{path}/groupName", "value": "engine"}]
    operations += [{"op": "replace", "path": f"{path}/{name}", "value": replicas} for name in names]
    operations.append({"op": "add", "path": f"{path}/scaleStrategy", "value": {"workersToDelete": without}})
    return json.dumps(operations)


def pods_wanted(run: Run, settings: CONFIG, engines: int) -> int:
    """Not fewer than it was submitted with: their seats stay reserved for engines that come back."""
    return max(engine_pods(run, settings, engines), engine_pods(run, settings, run.engine.replicas))


def engines_in(roster: str) -> int:
    """Of the text of roster.json."""
    return sum(line["role"] == "engine" for line in json.loads(roster))


def idle_pods(roster: str, pods: list[str]) -> list[str]:
    """Of ``pods``, those in which no process of the run lives; a pod's name is its host's."""
    hosts = {line["node"] for line in json.loads(roster)}
    return [pod for pod in pods if pod not in hosts]
