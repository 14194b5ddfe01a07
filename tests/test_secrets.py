"""Secrets show nowhere: type, filter, configurations, argv, files of a run; and what loads runs no code."""

import io
import logging
import os
import pickle
import re
from pathlib import Path

import pytest

from launch import cli
from launch.environment import prepare_environment
from launch.sidecar import SideCar
from launch.tracking import Tracker
from launch.wandb_sink import WandbSink
from orchestrator.secret import Redaction, Secret, redact, refuse_secrets, secrets_of, without_secrets
from tests.ray_head import ROOT
from tests.test_config import RL, load

CANARY = "canary-7f3a91c2"
NAMES = ("WANDB_API_KEY", "HF_TOKEN", "QUARTET_REWARD_TOKEN", "RAY_AUTH_TOKEN", "AWS_SECRET_ACCESS_KEY")


@pytest.fixture
def canaries(monkeypatch):
    values = {name: f"{CANARY}-{number}" for number, name in enumerate(NAMES)}
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    return values


def test_a_secret_shows_in_no_text_and_travels_nowhere():
    secret = Secret(CANARY)
    shown = f"{secret} {secret!r} {[secret]} " + str(secret)
    assert CANARY not in shown and secret.reveal() == CANARY and not Secret("")
    with pytest.raises(TypeError, match="not sent anywhere"):
        pickle.dumps({"token": secret})


def test_which_variables_hold_secrets():
    environment = {
        "WANDB_API_KEY": "abc123def", "RAY_AUTH_TOKEN": "0" * 64, "DB_PASSWORD": "hunter2!",
        "RAY_AUTH_TOKEN_PATH": "/run/token", "TOKENIZERS_PARALLELISM": "false", "HF_TOKEN": "x1",
        "HOME": "/root",
    }  # fmt: skip
    assert set(secrets_of(environment)) == {"WANDB_API_KEY", "RAY_AUTH_TOKEN", "DB_PASSWORD"}
    assert set(without_secrets(environment)) == {"HOME"}


def test_text_is_redacted_by_name_and_passwords_of_urls_too():
    environment = {"HF_TOKEN": "abc123", "OTHER_TOKEN": "abc123def"}
    assert redact("say abc123def and abc123", environment) == "say [OTHER_TOKEN] and [HF_TOKEN]"
    assert redact("get http://me:hunter2@host:80/x", {}) == "get http://[password]@host:80/x"


def test_what_is_logged_holds_no_secret_tracebacks_included(canaries):
    token = canaries["HF_TOKEN"]
    handler = logging.StreamHandler(stream := io.StringIO())
    handler.addFilter(Redaction())
    logger = logging.getLogger("test-secrets")
    logger.addHandler(handler)
    try:
        logger.warning("asked with %s", token)
        try:
            raise ValueError(f"refused {token}")
        except ValueError:
            logger.exception("failed")
    finally:
        logger.removeHandler(handler)
    text = stream.getvalue()
    assert CANARY not in text and text.count("[HF_TOKEN]") >= 2 and "Traceback" in text


@pytest.mark.parametrize(
    "override", ["name={}", "roles.reward.function=http://h:1?t={}", "tracking.wandb_project=a-{}-b"]
)
def test_a_run_that_holds_a_secret_is_refused_without_showing_it(canaries, override, capsys):
    """So no config.yaml, wandb config or job ever has one."""
    argument = override.format(canaries["WANDB_API_KEY"])
    assert cli.main(["config", "quickstart", argument]) == 2
    said = capsys.readouterr()
    assert "the run holds a secret" in said.err and "[WANDB_API_KEY]" in said.err
    assert CANARY not in said.err + said.out


def test_a_password_in_a_url_of_a_run_is_refused():
    with pytest.raises(ValueError, match=r"the run holds a secret: .*http://\[password\]@host"):
        refuse_secrets("function: http://me:hunter2@host:1", {})


@pytest.mark.slow
def test_what_wandb_keeps_of_a_run_holds_no_secret(canaries, tmp_path):
    """Its configuration, its metadata, its logs; and the command line of its process."""
    run = load(*RL, f"run_dir={tmp_path}", "tracking.wandb=offline")
    sink = WandbSink(run)
    tracker = Tracker(tmp_path / "metrics.jsonl", [SideCar("wandb", sink)])
    for step in range(3):
        tracker.log("rl", step, {"reward": 1.0})
    while sink._child is None:
        pass
    assert CANARY not in Path(f"/proc/{sink._child.pid}/cmdline").read_text()
    tracker.close(60)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in files)
    assert [str(path) for path in files if CANARY.encode() in path.read_bytes()] == []


def test_errors_on_the_way_to_the_terminal_are_redacted(canaries, monkeypatch, capsys):
    def fail(argv):
        raise ValueError(f"HTTP 401 for {canaries['HF_TOKEN']}")

    monkeypatch.setitem(cli.VERBS, "doctor", fail)
    assert cli.main(["doctor"]) == 2
    assert "HTTP 401 for [HF_TOKEN]" in (said := capsys.readouterr().err) and CANARY not in said


# a Ray of our own, and what is loaded


def test_a_ray_of_our_own_wants_a_token_of_this_run(monkeypatch):
    for name in ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    tokens = []
    for _ in range(2):
        prepare_environment()
        assert os.environ["RAY_AUTH_MODE"] == "token"
        tokens.append(os.environ.pop("RAY_AUTH_TOKEN"))
    assert len(tokens[0]) == 64 and tokens[0] != tokens[1]


def test_a_ray_of_our_own_has_no_dashboard():
    """The only other `ray.init` of ours joins a cluster that is there."""
    callers = [
        str(path.relative_to(ROOT))
        for path in sources()
        if re.search(r"^\s+ray\.init\(", path.read_text(), re.M)
    ]
    assert sorted(callers) == ["launch/cluster.py", "launch/submit/wait_for_nodes.py"]
    assert "ray.init(address=address," in (ROOT / "launch/submit/wait_for_nodes.py").read_text()
    assert '"include_dashboard": False' in (ROOT / "launch/cluster.py").read_text()


def sources():
    return [path for room in ("orchestrator", "actors", "launch") for path in (ROOT / room).rglob("*.py")]


@pytest.mark.parametrize(
    "forbidden",
    [r"trust_remote_code[\"']?\s*[=:]\s*True", r"weights_only\s*=\s*False", r"yaml\.load\(",
     r"\beval\(", r"\bexec\(", r"shell\s*=\s*True", r"verify\s*=\s*False"],
)  # fmt: skip
def test_no_source_says(forbidden):
    found = [f"{path}: {line}" for path in sources() for line in path.read_text().splitlines()
             if re.search(forbidden, line) and ".eval()" not in line]  # fmt: skip
    assert found == []


def test_whatever_is_loaded_with_torch_is_weights_only():
    loads = [line for path in sources() for line in path.read_text().splitlines() if "torch.load(" in line]
    assert all("weights_only=True" in line for line in loads)
