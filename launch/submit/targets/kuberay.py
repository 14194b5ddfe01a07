"""Kubernetes through the KubeRay operator: RayJobs by ``kubectl``, whose own access rules apply."""

from __future__ import annotations

import base64
import json
import secrets
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from typing import Any

import yaml

from launch.graceful import CHECKPOINTED
from launch.submit import capacity, features, kube_rules, kube_scale
from launch.submit.job import Job, Report, State
from launch.submit.kube_settings import CONFIG
from launch.submit.manifests import meta
from launch.submit.polling import wait_until
from orchestrator.config import Run

__all__ = ["CONFIG", "Target"]
KUBECTL_TIMEOUT_S = 60
STATES = {
    "SUCCEEDED": State.SUCCEEDED,
    "FAILED": State.FAILED,
    "STOPPED": State.STOPPED,
    "RUNNING": State.RUNNING,
}
UNITS = {"m": 1e-3, "": 1.0}


class Target:
    def __init__(self, settings: CONFIG) -> None:
        self.settings = settings

    def render(self, job: Job) -> str:
        return yaml.safe_dump_all(features.render(job, self.settings), sort_keys=False)

    def lint(self, job: Job) -> list[str]:
        rayjob = features.render(job, self.settings)[-1]
        return [*kube_rules.job_rules(job, self.settings), *kube_rules.operator_rules(rayjob)]

    def preflight(self, job: Job) -> list[str]:
        if self._kubectl("get", "crd", "rayjobs.ray.io", check=False).returncode:
            return [
                "the cluster has no CRD rayjobs.ray.io, or may not be asked; install the KubeRay operator"
            ]
        found = [
            f"{kind} {name} is not in namespace {self.settings.namespace}; create it "
            f"(docs/cluster-kubernetes.md)"
            for kind, name in features.external(self.settings)
            if name != self.settings.token_secret and not self._exists(kind, name)
        ]
        return found + (capacity.too_large(job.run, self._nodes()) if self.settings.check_capacity else [])

    def submit(self, job: Job) -> None:
        """Objects that several attempts share stay; those of this attempt are taken back when one fails."""
        if not self._exists("Secret", self.settings.token_secret):
            self._apply([token_secret(self.settings)], create=True)
        rendered = features.render(job, self.settings)
        self._apply(rendered[:-2])
        try:
            self._apply(rendered[-2:])
        except ValueError:
            for item in reversed(rendered[-2:]):
                self._kubectl(
                    "delete", item["kind"], item["metadata"]["name"], "--ignore-not-found", check=False
                )
            raise

    def reports(self, run: Run) -> list[Report]:
        answer = self._kubectl("get", "rayjobs.ray.io", "-l", f"quartet/run={run.name}", "-o", "json")
        return [report(item) for item in json.loads(answer.stdout)["items"]]

    def logs(self, run: Run, id: str, *, follow: bool) -> Iterator[str]:
        if pod := self._head(id):
            answer = self._kubectl("exec", pod, "--", "ray", "job", "logs", id, check=False)
            if not answer.returncode:
                yield answer.stdout

    def stop(self, run: Run, id: str) -> None:
        """Through Ray, whose SIGTERM makes the job write a checkpoint; a job that has no head yet is
        deleted."""
        if not (pod := self._head(id)):
            self._kubectl("delete", "rayjobs.ray.io", id)
            return
        self._kubectl("exec", pod, "--", "ray", "job", "stop", "--no-wait", id)
        wait_until(
            lambda: all(r.state.is_over for r in self.reports(run) if r.id == id),
            self.settings.stop_grace_s + 60,
            f"{id} did not end within stop_grace_s={self.settings.stop_grace_s} s; see `kubectl describe "
            f"rayjob {id}`",
        )

    def scale(self, run: Run, id: str, engines: int) -> str:
        """What was done; in which order, and why, says kube_scale.py."""
        name, head = self._cluster(id), self._head(id)
        if not (name and head):
            raise ValueError(f"{id} has no head yet; scale it when it runs")
        cluster = json.loads(self._kubectl("get", "rayclusters.ray.io", name, "-o", "json").stdout)
        index, group = kube_scale.group_of_engines(cluster)
        folder, wanted = str(run.run_dir), kube_scale.pods_wanted(run, self.settings, engines)
        asking = (self.settings.python, "-m", "launch.cli", "scale", folder, f"engine={engines}")
        self._kubectl("exec", head, "--", *asking)
        if cluster["spec"].get("enableInTreeAutoscaling"):
            return f"{id} was asked for {engines} engine(s); Ray's autoscaler gives them pods"
        free: list[str] = []
        if wanted < group["replicas"]:
            roster = lambda: self._kubectl("exec", head, "--", "cat", f"{folder}/roster.json").stdout  # noqa: E731
            wait_until(
                lambda: kube_scale.engines_in(roster()) <= engines,
                self.settings.stop_grace_s,
                f"after stop_grace_s={self.settings.stop_grace_s} s more than {engines} engine(s) are still "
                "there; their pods stay. The same command once more gives them back",
            )
            free = kube_scale.idle_pods(roster(), self._pods(name, "group=engine"))
            free = free[: group["replicas"] - wanted]
            wanted = group["replicas"] - len(free)
        if wanted != group["replicas"]:
            patch = kube_scale.resized(index, wanted, without=free)
            self._kubectl("patch", "rayclusters.ray.io", name, "--type=json", "-p", patch)
        return f"{id} was asked for {engines} engine(s); their worker group has {wanted} pod(s)"

    def _cluster(self, id: str) -> str:
        """Empty until the operator has made it."""
        return self._kubectl("get", "rayjobs.ray.io", id, "-o", "jsonpath={.status.rayClusterName}").stdout

    def _head(self, id: str) -> str | None:
        cluster = self._cluster(id)
        return next(iter(self._pods(cluster, "node-type=head")), None) if cluster else None

    def _pods(self, cluster: str, label: str) -> list[str]:
        selector = f"ray.io/cluster={cluster},ray.io/{label}"
        found = self._kubectl("get", "pods", "-l", selector, "-o", "jsonpath={.items[*].metadata.name}")
        return found.stdout.split()

    def _exists(self, kind: str, name: str) -> bool:
        return not self._kubectl("get", kind, name, check=False).returncode

    def _nodes(self) -> list[dict[str, float]]:
        items = json.loads(self._kubectl("get", "nodes", "-o", "json").stdout)["items"]
        return [
            {"CPU": quantity(a.get("cpu", "0")), "GPU": quantity(a.get("nvidia.com/gpu", "0"))}
            for a in (item["status"]["allocatable"] for item in items)
        ]

    def _apply(self, objects: Sequence[dict[str, Any]], *, create: bool = False) -> None:
        """Through standard input: nothing of it is on a command line."""
        verb = ["create"] if create else ["apply", "--server-side", "--force-conflicts"]
        self._kubectl(*verb, "-f", "-", text=yaml.safe_dump_all(objects))

    def _kubectl(
        self, *arguments: str, text: str | None = None, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        if shutil.which("kubectl") is None:
            raise ValueError("kubectl is not on PATH; install it and log in to the cluster")
        where = ["--namespace", self.settings.namespace]
        where += ["--context", self.settings.context] if self.settings.context else []
        try:
            answer = subprocess.run(
                ["kubectl", *where, *arguments], input=text, capture_output=True, text=True,
                timeout=KUBECTL_TIMEOUT_S, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise ValueError(
                f"kubectl {arguments[0]} took more than {KUBECTL_TIMEOUT_S} s; is the API up?"
            ) from None
        if check and answer.returncode:
            raise ValueError(f"kubectl {arguments[0]}: {answer.stderr.strip()}")
        return answer


def token_secret(settings: CONFIG) -> dict[str, Any]:
    """Made once, sent once, never rendered."""
    token = base64.b64encode(secrets.token_hex(32).encode()).decode()
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": meta(settings.token_secret, settings),
        "type": "Opaque",
        "data": {"auth_token": token},
    }


def report(rayjob: dict[str, Any]) -> Report:
    """The job's own status first; the deployment's where there is no job yet."""
    status, name = rayjob.get("status", {}), rayjob["metadata"]["name"]
    deployment, message = status.get("jobDeploymentStatus", ""), status.get("message", "")
    state = STATES.get(status.get("jobStatus", ""), State.PENDING)
    if deployment in ("Failed", "ValidationFailed"):
        state = State.FAILED
    if deployment == "Retrying":
        state = State.PENDING
    stopped = f"exit code {CHECKPOINTED}" in message
    return Report(id=name, state=State.STOPPED if stopped else state, message=" ".join(message.split())[:200])


def quantity(text: str) -> float:
    """Kubernetes numbers without binary units: "7910m" is 7.91, "8" is 8."""
    unit = text[-1:] if text[-1:] in UNITS else ""
    return float(text.removesuffix(unit) if unit else text) * UNITS[unit]
