"""The batch script and Slurm's answers, without a Slurm."""

import pytest

from launch.submit import sbatch
from launch.submit.job import Job
from launch.submit.targets import slurm
from tests.test_submit import a_run


def test_the_script_is_bash_and_asks_for_what_was_set(tmp_path):
    settings = slurm.CONFIG(nodes=3, gpus_per_node=8, partition="h100", time="12:00:00")
    target, job = slurm.Target(settings), Job(run=a_run(tmp_path), resume=True)
    assert target.lint(job) == []
    text = target.render(job)
    for line in ("--nodes=3", "--gres=gpu:8", "--partition=h100", "--time=12:00:00", "--signal=B:USR1@120"):
        assert f"#SBATCH {line}\n" in text
    assert "@" not in text.split("signal=B:USR1@120")[1].replace("${nodes[@]}", "").replace("[@]", "")


def test_roles_become_labels_of_their_nodes():
    settings = slurm.CONFIG(nodes=3, node_roles=("actor+critic", "", "engine"))
    assert sbatch.labels(settings) == [
        "quartet.role.actor=true,quartet.role.critic=true",
        "-",
        "quartet.role.engine=true",
    ]


@pytest.mark.parametrize(
    ("gres", "count"), [("gpu:8", 8), ("gpu:h100:8(S:0-1)", 8), ("(null)", 0), ("gpu:a:2,gpu:b:4", 6)]
)
def test_the_number_of_gpus_is_read_from_gres(gres, count):
    assert slurm.gpus(gres) == count
