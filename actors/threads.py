"""Compute threads of a worker on CPUs: how many, and how they wait for one another."""


def openmp(threads: int) -> dict[str, str]:
    """Environment of a worker, read when its process starts.

    Several threads wait for one another awake, a millisecond at most, before they sleep (what libgomp does by
    itself, were it not told to be passive): asleep after every operation, they need 1.4 times as long for an
    update of SmolLM2-135M, and for its generation. Where other threads want the same cores, waiting awake
    takes longer than sleeping, for generation up to 1.8 times; a single thread waits for nobody.
    """
    awake = {"GOMP_SPINCOUNT": "300000"} if threads > 1 else {}
    return {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "passive", **awake}
