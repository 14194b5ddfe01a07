"""`quartet submit --to kuberay` and the other verbs: the real kubectl against a double of the API server."""

import base64
import copy
import json
import secrets
import shutil

import pytest

from launch import cli
from launch.submit import kustomize
from tests import kubernetes
from tests.kube_api import KubeApi
from tests.ray_head import free_port

K8S = kustomize.K8S
NODE = {"status": {"allocatable": {"cpu": "96", "nvidia.com/gpu": "8"}}}
CANARIES = {name: secrets.token_hex(16) for name in ("WANDB_API_KEY", "HF_TOKEN", "QUARTET_REWARD_TOKEN")}
pytestmark = pytest.mark.skipif(
    shutil.which("kubectl") is None, reason="kubectl is not here; install kubernetes-client"
)


class Head:
    """What `kubectl exec` meets in the head pod: Ray's Jobs commands, and what the operator makes of them."""

    def __init__(self) -> None:
        self.asked = []
        self.engines = []  # the pods in which they live
        self.log, self.pieces = "", []  # pieces are said one after the other, then the job succeeds

    def __call__(self, pod, argv):
        self.asked.append((pod, *argv))
        job = argv[-1]
        if argv[0] == "cat":
            engines = [{"role": "engine", "rank": k, "node": node} for k, node in enumerate(self.engines)]
            return json.dumps([{"role": "driver", "rank": 0, "node": pod}, *engines]), 0
        if argv[1:4] == ["-m", "launch.cli", "scale"]:
            return self.scaled(int(job.removeprefix("engine=")))
        if argv[:3] == ["ray", "job", "stop"]:
            self.api.set_status(
                job, jobDeploymentStatus="Failed", jobStatus="FAILED", rayClusterName=f"{job}-x",
                message="Job entrypoint command failed with exit code 75, last available logs",
            )  # fmt: skip
            return "", 0
        if self.pieces:
            self.log += self.pieces.pop(0)
            if not self.pieces:
                self.runs(job, jobDeploymentStatus="Complete", jobStatus="SUCCEEDED")
        return self.log, 0

    def scaled(self, engines):
        """The run in the head pod is asked; what leaves has left, and pods for what joins come later."""
        if engines > 9:
            return "quartet: error: max=9", 2
        del self.engines[engines:]
        return "", 0

    def runs(self, job, **status):
        """The operator has started the cluster and the job."""
        pod = {"spec": {"containers": [{"name": "ray-head", "image": "i"}]}}
        labels = {"ray.io/cluster": f"{job}-x", "ray.io/node-type": "head"}
        self.api.put("pods", f"{job}-x-head", labels=labels, **pod)
        status = status or {"jobDeploymentStatus": "Running", "jobStatus": "RUNNING"}
        self.api.set_status(job, rayClusterName=f"{job}-x", **status)


@pytest.fixture
def head(tmp_path, monkeypatch):
    head = Head()
    head.api = api = KubeApi(tmp_path, head)
    api.put("customresourcedefinitions", "rayjobs.ray.io")
    api.put("secrets", "quartet-secrets")
    for number in range(2):
        api.put("nodes", f"node-{number}", **NODE)
    (tmp_path / "config").write_text(api.kubeconfig())
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "config"))
    monkeypatch.setenv("HOME", str(tmp_path))  # kubectl's cache
    for name, value in CANARIES.items():
        monkeypatch.setenv(name, value)
    yield head
    api.close()


@pytest.fixture
def schemas():
    """By which the double judges a job before it keeps it; read here, for a skip in its thread is no skip."""
    kubernetes.structural("RayJob")


@pytest.fixture
def quartet(capsys):
    """The verb, then further arguments -> (status, all that was printed)."""

    def call(verb, *arguments):
        status = cli.main([verb, str(K8S / "run.yaml"), "--to", str(K8S / "target.yaml"), *arguments])
        said = capsys.readouterr()
        return status, said.out + said.err

    return call


@pytest.mark.usefixtures("schemas")
def test_submit_status_logs_stop_and_resume(head, quartet):
    api, printed = head.api, []

    def ask(*arguments):
        status, said = quartet(*arguments)
        printed.append(said)
        return status, said

    assert ask("status")[0] == 5
    assert ask("submit") == (0, "submitted ppo-0\n")
    assert api.names("rayjobs") == ["ppo-0"] and api.names("configmaps") == ["ppo-0-config"]
    assert api.names("secrets") == ["quartet-ray-token", "quartet-secrets"]
    status, said = ask("submit")
    assert status == 3 and "already submitted" in said and api.names("rayjobs") == ["ppo-0"]
    assert ask("status") == (3, "ppo-0  pending\n")

    head.runs("ppo-0")
    assert ask("status") == (3, "ppo-0  running\n")
    status, said = ask("resume")
    assert status == 2 and "ppo-0 is running; stop it first" in said
    head.log = "[start] head healthy\n"
    assert ask("logs") == (0, head.log)
    assert ask("stop") == (
        0,
        "ppo-0  stopped  Job entrypoint command failed with exit code 75, last available logs\n",
    )
    assert ("ppo-0-x-head", "ray", "job", "stop", "--no-wait", "ppo-0") in head.asked
    assert ask("status")[0] == 4

    head.log, head.pieces = "", ["rl step 1/2\n", "rl step 2/2\n"]
    assert ask("resume") == (0, "submitted ppo-1\n")
    assert "--resume" in api.objects["rayjobs", "ppo-1"]["spec"]["entrypoint"].split()
    assert "--resume" not in api.objects["rayjobs", "ppo-0"]["spec"]["entrypoint"].split()
    head.runs("ppo-1")
    status, said = ask("logs", "--wait")  # the stream ends twice; the job's status says when it is over
    assert status == 0 and said.count("rl step 1/2\n") == 1 and "ppo-1  succeeded" in said
    assert ask("status", "--attempt", "0")[0] == 4

    token = base64.b64decode(api.objects["secrets", "quartet-ray-token"]["data"]["auth_token"]).decode()
    stored = json.dumps({" ".join(key): item for key, item in api.objects.items() if key[0] != "secrets"})
    for secret in [*CANARIES.values(), token, base64.b64encode(token.encode()).decode()]:
        assert secret not in stored and not any(secret in text for text in printed)
        assert not any(secret in word for words in head.asked for word in words)


@pytest.mark.usefixtures("schemas")
def test_the_engines_of_a_run_at_work_get_pods_and_give_them_back_by_name(head, quartet):
    api, cluster = head.api, "ppo-0-x"

    def group():
        groups = api.objects["rayclusters", cluster]["spec"]["workerGroupSpecs"]
        found = next(one for one in groups if one["groupName"] == "engine")
        return found["replicas"], found["maxReplicas"], found.get("scaleStrategy")

    alone = ("--at", "gpus_per_pod=1")  # one engine in a pod; the run begins with two
    quartet("submit", *alone)
    status, said = quartet("scale", "engine=4", *alone)
    assert status == 2 and "ppo-0 is pending; only a run at work changes its engines" in said
    head.runs("ppo-0")
    spec = api.objects["rayjobs", "ppo-0"]["spec"]["rayClusterSpec"]
    api.put("rayclusters", cluster, spec=copy.deepcopy(spec))
    assert group() == (2, 2, None)
    asked = copy.deepcopy(api.objects["rayclusters", cluster])

    assert quartet("scale", "engine=10", *alone)[0] == 2  # the run refuses it
    assert api.objects["rayclusters", cluster] == asked
    assert quartet("scale", "engine=4", *alone) == (
        0,
        "ppo-0 was asked for 4 engine(s); their worker group has 4 pod(s)\n",
    )
    assert group() == (4, 4, {"workersToDelete": []})
    head.engines = [f"engine-{k}" for k in range(4)]
    for pod in head.engines:
        labels = {"ray.io/cluster": cluster, "ray.io/group": "engine"}
        api.put("pods", pod, labels=labels, spec={"containers": []})
    assert quartet("scale", "engine=3", *alone) == (
        0,
        "ppo-0 was asked for 3 engine(s); their worker group has 3 pod(s)\n",
    )
    assert group() == (3, 3, {"workersToDelete": ["engine-3"]})
    del api.objects["pods", "engine-3"]
    # The seats of the first two stay reserved, so their pods do.
    assert quartet("scale", "engine=1", *alone) == (
        0,
        "ppo-0 was asked for 1 engine(s); their worker group has 2 pod(s)\n",
    )
    assert group()[0] == 2
    api.objects["rayclusters", cluster]["spec"]["enableInTreeAutoscaling"] = True
    assert "Ray's autoscaler gives them pods" in quartet("scale", "engine=4", *alone)[1]
    assert group()[0] == 2
    api.objects["rayclusters", cluster]["spec"]["workerGroupSpecs"] = [
        one | {"groupName": "actor-engine"} for one in spec["workerGroupSpecs"][:1]
    ]
    status, said = quartet("scale", "engine=2", *alone)
    assert status == 2 and "no worker group of ppo-0-x is for engines alone (there are actor-engine)" in said


@pytest.mark.usefixtures("schemas")
def test_a_job_without_a_head_is_stopped_by_deleting_it(head, quartet):
    quartet("submit")
    head.api.set_status("ppo-0", jobDeploymentStatus="Initializing")
    quartet("stop")
    assert head.api.names("rayjobs") == []


def test_a_job_that_the_api_refuses_leaves_nothing_of_its_attempt(head, quartet):
    head.api.refused = {"rayjobs"}
    status, said = quartet("submit")
    assert status == 2 and "rayjobs is forbidden" in said
    assert head.api.names("configmaps") == [] and head.api.names("rayjobs") == []


@pytest.mark.parametrize("case", ["crd", "secret", "capacity", "token", "address"])
def test_what_the_cluster_lacks_is_said_before_anything_is_made(head, quartet, tmp_path, case):
    api, before = head.api, None
    if case == "crd":
        del api.objects["customresourcedefinitions", "rayjobs.ray.io"]
        said = "no CRD rayjobs.ray.io"
    elif case == "secret":
        del api.objects["secrets", "quartet-secrets"]
        said = "Secret quartet-secrets is not in namespace quartet; create it"
    elif case == "capacity":
        del api.objects["nodes", "node-0"]
        api.put("nodes", "node-1", status={"allocatable": {"cpu": "96", "nvidia.com/gpu": "4"}})
        said = "GPU"
    elif case == "token":
        (tmp_path / "config").write_text(api.kubeconfig(token="wrong"))
        said = "You must be logged in to the server"
    else:
        (tmp_path / "config").write_text(api.kubeconfig(port=free_port()))
        said = "was refused"
    before = set(api.objects)
    status, printed = quartet("submit")
    assert status == 2 and said in printed, printed
    assert set(api.objects) == before
    assert not any(request.startswith(("POST", "PATCH")) for request in api.requests)
