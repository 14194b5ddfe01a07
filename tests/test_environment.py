"""What libgomp, which torch brings, makes of the environment of a worker."""

import os
import re
import subprocess
import sys

import pytest

from launch.environment import WORKER_ENV, openmp


@pytest.mark.skipif(sys.platform != "linux", reason="libgomp is Linux's")
@pytest.mark.parametrize(("threads", "spins"), [(1, "0"), (2, "300000")])
def test_threads_sleep_at_once_only_where_there_is_one(threads: int, spins: str) -> None:
    environment = {**os.environ, **WORKER_ENV, **openmp(threads), "OMP_DISPLAY_ENV": "verbose"}
    done = subprocess.run(
        [sys.executable, "-c", "import torch"], env=environment, capture_output=True, text=True, check=True
    )
    said = dict(re.findall(r"(GOMP_SPINCOUNT|OMP_NUM_THREADS|OMP_WAIT_POLICY) = '(\w+)'", done.stderr))
    assert said == {"GOMP_SPINCOUNT": spins, "OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}
