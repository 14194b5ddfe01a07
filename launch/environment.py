"""Environment variables that must be set before Ray or torch are imported; ``launch/cli.py`` calls it
first."""

import os
import secrets

WORKER_ENV = {
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # a role without GPUs must not hide those of others
    "RAY_ENABLE_ZERO_COPY_TORCH_TENSORS": "1",  # workers read a batch where it lies
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_WAIT_POLICY": "passive",  # spinning threads of idle roles would take the cores of the busy one
}

# Activations of 100 MB come and go in every layer. glibc gives each back to the kernel and takes it again,
# 4 KB at a time; kept, and in 2 MB pages, an update of SmolLM2-135M on CPUs takes half the time.
MODEL_ENV = {
    "GLIBC_TUNABLES": ":".join(
        f"glibc.malloc.{name}={value}"
        for name, value in {
            "arena_max": 1,  # Ray runs verbs in a thread; arenas of threads hold no more than 64 MB
            "hugetlb": 1,
            "mmap_threshold": 2**32,
            "trim_threshold": 2**33,
            "top_pad": 2**26,
        }.items()
    )
}


def prepare_environment() -> None:
    """For the driver and, by inheritance, for a Ray that it starts itself. What the user has set stays."""
    defaults = {
        **WORKER_ENV,
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",  # at its default of 15 every other process goes first
        # Without these two, a Ray of our own would write a token file into the home directory.
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
    }
    if os.environ.get("RAY_ADDRESS"):
        del defaults["RAY_AUTH_MODE"], defaults["RAY_AUTH_TOKEN"]
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
