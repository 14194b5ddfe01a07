"""What libgomp, which torch brings, makes of the environment of a worker."""

import os
import re
import subprocess
import sys

import pytest

from actors.engine_params import environment
from actors.threads import openmp
from launch.environment import WORKER_ENV
from orchestrator.config import EngineConfig

ROLES = {
    "trainer": openmp,
    "engine": lambda threads: environment(EngineConfig(threads=threads), "cpu"),
}


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.skipif(sys.platform != "linux", reason="libgomp is Linux's")
@pytest.mark.parametrize(("threads", "spins"), [(1, "0"), (2, "300000")])
def test_threads_sleep_at_once_only_where_there_is_one(role: str, threads: int, spins: str) -> None:
    env = {**os.environ, **WORKER_ENV, **ROLES[role](threads), "OMP_DISPLAY_ENV": "verbose"}
    done = subprocess.run(
        [sys.executable, "-c", "import torch"], env=env, capture_output=True, text=True, check=True
    )
    said = dict(re.findall(r"(GOMP_SPINCOUNT|OMP_NUM_THREADS|OMP_WAIT_POLICY) = '(\w+)'", done.stderr))
    assert said == {"GOMP_SPINCOUNT": spins, "OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}
