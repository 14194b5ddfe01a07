"""A run that has no place on this machine is refused before anything starts."""

import resource

import pytest

from launch.preflight import refuse_what_has_no_place, stage_roles
from tests.test_config import RL, load


def test_every_stage_is_asked_with_the_roles_it_starts():
    run = load(*RL, "sft={}", "reward_model={}", "preference={objective: {name: dpo}}",
               "rl.algorithm={name: grpo, kl_coef: 0.1}")  # fmt: skip
    assert dict(stage_roles(run)) == {
        "sft": ["actor"],
        "reward_model": ["reward"],
        "preference": ["actor", "reference"],
        "rl": ["actor", "engine", "reward", "reference"],
    }


@pytest.mark.parametrize(
    ("override", "gpus", "message"),
    [
        ("roles.actor.workers=40", 0, r"the rl stage .*wants \d+ CPU; the cluster has 8"),
        ("roles.actor.gpus=2", 1, r"the rl stage .*wants 2 GPU.*has 1"),
        ("engine={gpus: 2, tensor_parallel: 2}", 1, r"2 GPU"),
    ],
)
def test_a_run_without_a_place_is_refused_with_the_number_to_change(monkeypatch, override, gpus, message):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    run = load(*RL, override)
    with pytest.raises(ValueError, match="(?s)" + message) as error:
        refuse_what_has_no_place(run, num_gpus=gpus, num_cpus=8)
    assert "lower " in str(error.value)
    refuse_what_has_no_place(run, num_gpus=4, num_cpus=64)
    refuse_what_has_no_place(load(*RL, override, "ray_address=auto"), num_gpus=0, num_cpus=1)


def test_a_process_that_may_open_no_files_to_speak_of_is_refused(monkeypatch):
    """FAULTS 30."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, before[1]))
    try:
        with pytest.raises(ValueError, match=r"may have 64 files open, and Ray needs 256; .*ulimit -n 4096"):
            refuse_what_has_no_place(load(*RL), num_gpus=0, num_cpus=64)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    refuse_what_has_no_place(load(*RL), num_gpus=0, num_cpus=64)
