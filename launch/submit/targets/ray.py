"""A running Ray cluster, through its Jobs API.

The token goes into the header of each request and nowhere else; the job's runtime environment holds no
secret.
"""

from __future__ import annotations

import json
import os
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from launch.environment import WORKER_ENV
from launch.submit import capacity, working_dir
from launch.submit.job import Job, Report, State, TargetSettings, entrypoint, shell
from launch.submit.polling import wait_until
from orchestrator.config import Run

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

STATES = {
    "PENDING": State.PENDING,
    "RUNNING": State.RUNNING,
    "SUCCEEDED": State.SUCCEEDED,
    "FAILED": State.FAILED,
    "STOPPED": State.STOPPED,
}
HTTP_TIMEOUT_S = 10


class CONFIG(TargetSettings):
    kind: Literal["ray"] = "ray"
    address: str = "http://127.0.0.1:8265"
    """The dashboard of the cluster, where its Jobs API answers."""
    token_file: str | None = None
    """File with the cluster's token; default: RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH, then ~/.ray/auth_token."""
    allow_open: bool = False
    """Submit to a cluster that answers without a token: whoever reaches it can run code there."""
    files: tuple[str, ...] = ()
    """Files and folders that are sent along, e.g. small data and reward functions."""
    python: str = "python"
    """Python on the cluster that has Quartet's dependencies."""
    entrypoint_cpus: float = 0
    """CPUs reserved for the driver; above 0 it can also run on a worker node."""


class Target:
    def __init__(self, settings: CONFIG) -> None:
        self.settings = settings

    def render(self, job: Job) -> str:
        request = {**self._request(job), "working_dir": ["<quartet>", "run.yaml", *self.settings.files]}
        request["headers"] = {"Authorization": "Bearer <token>"}
        text = json.dumps(request, indent=2)
        return f"# POST {self.settings.address}/api/jobs/\n{text}\n# run.yaml\n{job.config}"

    def lint(self, job: Job) -> list[str]:
        found = working_dir.complaints(self.settings.files)
        if not job.run.run_dir.is_absolute():
            found.append(
                f"run_dir={job.run.run_dir} is relative, and a Ray job's folder is deleted with the job; "
                f"give an "
                "absolute path on storage that every node mounts"
            )
        return found

    def preflight(self, job: Job) -> list[str]:
        address = self.settings.address
        if not self.settings.allow_open and self._get("/api/version", token=None)[0] == 200:
            return [
                f"address={address} answers without a token: whoever reaches it can run code there. "
                f"Start it with "
                "RAY_AUTH_MODE=token, or set allow_open=true"
            ]
        status, answer = self._get("/api/version", token=self._token())
        if status in (401, 403):
            return [self._refusal(status)]
        if status != 200:
            return [
                f"address={address} answered HTTP {status} to /api/version; is it the dashboard of a Ray "
                f"head?"
            ]
        theirs, ours = answer["ray_version"], metadata.version("ray")
        if theirs != ours:
            return [
                f"address={address} runs Ray {theirs}, this is {ours}; install the same version on both sides"
            ]
        if not (nodes := self._nodes()):
            return [f"address={address} has no live node yet; wait until `ray status` shows one"]
        return capacity.too_large(job.run, nodes)

    def submit(self, job: Job) -> None:
        with tempfile.TemporaryDirectory(prefix="quartet-") as folder:
            working_dir.stage(job, self.settings.files, Path(folder))
            request = self._request(job)
            request["runtime_env"]["working_dir"] = folder
            self._client().submit_job(**request)

    def reports(self, run: Run) -> list[Report]:
        status, answer = self._get("/api/jobs/", token=self._token())
        if status != 200:
            raise ValueError(self._refusal(status))
        return [
            Report(
                id=job["submission_id"],
                state=STATES[job["status"]],
                exit_code=job.get("driver_exit_code"),
                message=(job.get("message") or "").splitlines()[0] if job.get("message") else "",
            )
            for job in answer
            if job.get("submission_id") and (job.get("metadata") or {}).get("quartet_run") == run.name
        ]

    def logs(self, run: Run, id: str, *, follow: bool) -> Iterator[str]:
        """Asked anew rather than streamed: the log is the truth of what was said, whoever reads it when."""
        yield self._client().get_job_logs(id)

    def stop(self, run: Run, id: str) -> None:
        client = self._client()
        client.stop_job(id)
        wait_until(
            lambda: STATES[client.get_job_status(id).value].is_over,
            self.settings.stop_grace_s + 30,
            f"{id} did not end within stop_grace_s={self.settings.stop_grace_s} s and Ray's own 30 s",
        )

    def _request(self, job: Job) -> dict[str, Any]:
        environment = {
            **WORKER_ENV,
            "RAY_JOB_STOP_WAIT_TIME_S": str(self.settings.stop_grace_s),  # Ray's own is 3 s, then SIGKILL
            "QUARTET_RAY_VERSION": metadata.version("ray"),
            "RAY_worker_niceness": "0",
        }
        argv = entrypoint(
            "run.yaml", resume=job.resume, secrets=self.settings.secrets, python=self.settings.python
        )
        return {
            "submission_id": job.id,
            "entrypoint": shell(argv),
            "entrypoint_num_cpus": self.settings.entrypoint_cpus,
            "metadata": {"quartet_run": job.run.name, "quartet_attempt": str(job.attempt)},
            "runtime_env": {"env_vars": environment},
        }

    def _client(self) -> JobSubmissionClient:
        from ray.job_submission import JobSubmissionClient  # noqa: PLC0415 - a second, and only this target needs it

        token = self._token()
        return JobSubmissionClient(
            self.settings.address, headers={"Authorization": f"Bearer {token}"} if token else None
        )

    def _token(self) -> str | None:
        if self.settings.token_file:
            return read_token(Path(self.settings.token_file))
        if token := os.environ.get("RAY_AUTH_TOKEN"):
            return token
        path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
        return read_token(path) if path.exists() else None

    def _get(self, path: str, *, token: str | None) -> tuple[int, Any]:
        """(HTTP status, the decoded answer); ValueError when nobody answers."""
        request = urllib.request.Request(self.settings.address.rstrip("/") + path)
        if token:
            request.add_header("Authorization", f"Bearer {token}")
        try:
            with urllib.request.urlopen(request, timeout=HTTP_TIMEOUT_S) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, None
        except (urllib.error.URLError, OSError, ValueError) as error:
            raise ValueError(
                f"address={self.settings.address} cannot be reached ({getattr(error, 'reason', error)}); "
                f"is the "
                "head up, and the port forwarded?"
            ) from None

    def _refusal(self, status: int) -> str:
        return (
            f"address={self.settings.address} refused the token (HTTP {status}); give the cluster's own in "
            "token_file or RAY_AUTH_TOKEN_PATH"
        )

    def _nodes(self) -> list[dict[str, float]]:
        status, answer = self._get("/api/v0/nodes?detail=1&limit=10000", token=self._token())
        if status != 200:
            raise ValueError(
                f"address={self.settings.address} answered HTTP {status} to the list of its nodes"
            )
        nodes = answer["data"]["result"]["result"]
        return [node["resources_total"] for node in nodes if node["state"] == "ALIVE"]


def read_token(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError as error:
        raise ValueError(
            f"token file {path}: {error.strerror}; write the cluster's token there, mode 0600"
        ) from None
