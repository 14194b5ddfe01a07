"""Supervised stages one after the other, on real workers, and a run that goes on at the stage that failed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from tests.models import tiny_model

pytestmark = [pytest.mark.ray, pytest.mark.slow]
ROOT = Path(__file__).parents[1]
ENV = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}


def quartet(*arguments: str) -> subprocess.CompletedProcess:
    """The command of this working tree."""
    command = [sys.executable, "-m", "launch.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=400, env=ENV, cwd=ROOT)


@pytest.fixture(scope="module")
def here(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline")
    tiny_model(folder / "base", tied=True)
    pairs = [{"prompt": f"{n}+1=", "response": f" {n + 1}.", "rejected": "no idea"} for n in range(40)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    labels = [
        {"prompt": row["prompt"], "response": row[key], "label": key == "response"}
        for row in pairs
        for key in ("response", "rejected")
    ]
    (folder / "labels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in labels))
    ranks = [{"prompt": row["prompt"], "responses": [row["response"], "perhaps", "no idea"]} for row in pairs]
    (folder / "ranks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ranks))
    (folder / "text.jsonl").write_text(
        "".join(json.dumps({"t": "so it is " * n}) + "\n" for n in range(1, 20))
    )
    return folder


def write(here: Path, name: str, **stages) -> str:
    small = {"cpus_per_worker": 0.2}
    run = {
        "run_dir": str(here / name),
        "model": {"path": str(here / "base"), "dtype": "float32", "max_length": 64},
        "roles": {"actor": small, "reward": small, "reference": small},
        "placement": {"timeout_s": 5},
        **stages,
    }
    (here / f"{name}.yaml").write_text(yaml.safe_dump(run))
    return str(here / f"{name}.yaml")


def logged(folder: Path, stage: str, name: str) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line[name] for line in lines if line["stage"] == stage and name in line]


def test_a_failed_stage_is_where_a_resume_goes_on(here):
    """sft -> reward_model -> preference; a file is in the way of the last one's folder, then it is not."""
    optimizer = {"learning_rate": 5e-3}
    file = write(
        here, "chain",
        sft={
            "data": {"path": str(here / "pairs.jsonl"), "ratio": 3}, "packing": True, "batch_size": 4,
            "epochs": 3,
            "mixture": [{"path": str(here / "text.jsonl"), "text_key": "t", "ratio": 1}],
            "heldout_fraction": 0.1, "optimizer": optimizer,
        },
        reward_model={
            "objective": {"name": "ranking"}, "data": {"path": str(here / "ranks.jsonl")}, "batch_size": 6,
            "epochs": 3, "optimizer": optimizer,
        },
        preference={
            "objective": {"name": "dpo", "beta": 0.5}, "data": {"path": str(here / "pairs.jsonl")},
            "batch_size": 6, "epochs": 3, "optimizer": optimizer,
        },
    )  # fmt: skip
    folder = here / "chain"
    folder.mkdir()
    (folder / "config.yaml").touch()  # so that it is the folder of a run
    (folder / "preference").touch()
    result = quartet("train", file)
    assert result.returncode == 1, result.stdout + result.stderr
    stages = json.loads((folder / "stages.json").read_text())
    assert list(stages) == ["sft", "reward_model"]
    before = logged(folder, "sft", "loss")
    (folder / "preference").unlink()

    result = quartet("train", file, "--resume")
    assert result.returncode == 0, result.stdout + result.stderr
    stages = json.loads((folder / "stages.json").read_text())
    assert list(stages) == ["sft", "reward_model", "preference"]
    assert logged(folder, "sft", "loss") == before  # it was not trained again
    assert before[-1] < before[0]
    assert stages["reward_model"]["heldout_accuracy"] > 0.5
    assert logged(folder, "preference", "margin")[0] == pytest.approx(0.0, abs=1e-4)  # policy = reference
    assert logged(folder, "preference", "margin")[-1] > 0.5
    *_, before, after = logged(folder, "preference", "heldout_margin")
    assert before == pytest.approx(0.0, abs=1e-4) and after > 0.5
    assert {"chosen_logprob", "rejected_logprob", "accuracy"} <= _names(folder, "preference")
    AutoModelForCausalLM.from_pretrained(stages["preference"]["model"])
    judge = AutoModelForSequenceClassification.from_pretrained(stages["reward_model"]["model"])
    assert judge.config.num_labels == 1 and judge.config.reward_std > 0


def _names(folder: Path, stage: str) -> set[str]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {name for line in lines if line["stage"] == stage for name in line}


@pytest.mark.parametrize("name", ["kto", "simpo"])
def test_a_reference_is_asked_once_or_never_started(here, name):
    data = "labels.jsonl" if name == "kto" else "pairs.jsonl"
    stage = {
        "objective": {"name": name}, "data": {"path": str(here / data)}, "precompute_reference": True,
        "batch_size": 8, "epochs": 2, "optimizer": {"learning_rate": 5e-3},
    }  # fmt: skip
    result = quartet("train", write(here, name, preference=stage))
    assert result.returncode == 0, result.stdout + result.stderr
    margins = logged(here / name, "preference", "margin")
    assert margins[-1] > margins[0]
    assert (name == "kto") == ("kl" in _names(here / name, "preference"))


def test_sigterm_leaves_a_checkpoint_from_which_the_stage_goes_on_as_if_nothing_had_happened(here):
    """The learner's state and the order of the rows: the model is that of the run that was not stopped."""
    stage = {
        "data": {"path": str(here / "pairs.jsonl")}, "batch_size": 4, "epochs": 15,
        "optimizer": {"learning_rate": 1e-3},
    }  # fmt: skip
    whole = quartet("train", write(here, "whole", sft=stage))
    assert whole.returncode == 0, whole.stdout + whole.stderr
    file, folder = write(here, "halves", sft=stage), here / "halves"
    with subprocess.Popen(
        [sys.executable, "-m", "launch.cli", "train", file],
        env=ENV,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    ) as run:
        for _ in range(600):
            if (folder / "metrics.jsonl").exists() and logged(folder, "sft", "loss"):
                break
            time.sleep(0.1)
        run.send_signal(signal.SIGTERM)
        said = run.communicate(timeout=200)[0]
    done = len(logged(folder, "sft", "loss"))
    assert run.returncode == 75 and f"stopped after step {done}:" in said and 0 < done < 150, said
    resumed = quartet("train", file, "--resume")
    assert resumed.returncode == 0 and f"resumed from step {done}" in resumed.stdout, resumed.stdout
    assert not (folder / "sft" / "checkpoints").exists()
    models = [load_file(here / name / "sft" / "model" / "model.safetensors") for name in ("whole", "halves")]
    assert all(tensor.equal(models[1][key]) for key, tensor in models[0].items())


def test_a_reference_asked_once_trains_as_the_live_one(here):
    models = {}
    for precompute in (False, True):
        stage = {
            "objective": {"name": "dpo"}, "data": {"path": str(here / "pairs.jsonl")},
            "precompute_reference": precompute, "batch_size": 8, "optimizer": {"learning_rate": 1e-3},
        }  # fmt: skip
        name = f"dpo-{precompute}"
        result = quartet("train", write(here, name, preference=stage))
        assert result.returncode == 0, result.stdout + result.stderr
        models[precompute] = load_file(here / name / "preference" / "model" / "model.safetensors")
    for key, tensor in models[True].items():
        assert (tensor - models[False][key]).abs().max() < 1e-4, key
