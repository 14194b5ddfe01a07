"""``make mutants``: every known bug, put back one at a time, must make a test fail.

python -m tests.mutants              those whose tests need torch only
python -m tests.mutants --slow       also those that start DeepSpeed or vLLM
python -m tests.mutants KL advantage  those with one of these texts in their name, row or file
"""

import argparse
import os
import signal
import sys
import time

from tests.mutants.play import copies, play, sound
from tests.mutants.record import complaints
from tests.mutants.rows import MUTANTS


def main() -> int:
    """0 when all are killed; 1 when one survives; 2 when they cannot be played."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description="Puts known bugs back.")
    parser.add_argument("texts", nargs="*", help="only mutants with one of these in name, row or file")
    parser.add_argument("--slow", action="store_true", help="also mutants that need DeepSpeed or vLLM")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="at once; default: one per core")
    given = parser.parse_args()
    chosen = [m for m in MUTANTS if given.slow or not m.slow]
    if given.texts:
        chosen = [m for m in chosen if any(t in f"{m.row} {m.name} {m.file}" for t in given.texts)]
    if stale := complaints(chosen):
        print("\n".join(stale), file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that copies and children go too
    began = time.monotonic()
    with copies(given.jobs, slow=any(m.slow for m in chosen)) as free:
        without = sound(free, chosen)
        if without.verdict != "survived":
            print(f"the tests fail without any mutant: {without.by}", file=sys.stderr)
            return 2
        print(f"{len(chosen)} mutants; their tests pass without them in {without.seconds:.0f} s")
        outcomes = []
        for mutant, outcome in play(free, chosen, given.jobs):
            outcomes.append(outcome)
            told = f"{outcome.verdict:9} {outcome.seconds:5.1f} s  {mutant.row:5} {mutant.name}: {outcome.by}"
            print(told, flush=True)
    counts = {verdict: [o.verdict for o in outcomes].count(verdict) for verdict in
              ("killed", "survived", "crashed", "hung")}  # fmt: skip
    print(", ".join(f"{count} {verdict}" for verdict, count in counts.items()), end="; ")
    print(f"{time.monotonic() - began:.0f} s")
    return 0 if counts["killed"] == len(chosen) else 1


if __name__ == "__main__":
    sys.exit(main())
