"""The child process of a reward function: one JSON line of questions in, one JSON line per answer out.

    argv: SPEC MEMORY_MB PARENT_PID
    -> {"ready": true} | {"refused": why}
    <- [[response, prompt, label], ...]
    -> {"reward": 0.5} | {"error": "ZeroDivisionError('...')"}     for each question

Started by ``reward_function.py`` with limits: address space, no core file, no secrets in its environment. Its
own standard output and error go nowhere, so that a function that prints a gigabyte fills no disk. It ends
with its parent.
"""

import json
import os
import resource
import sys
import threading
import time
from typing import Any

from orchestrator import plugins


def find(spec: str) -> Any:
    """A file in actors/rewards/, or package.module:name; else ValueError."""
    return plugins.load(spec) if ":" in spec else plugins.find("actors.rewards", spec).score


def main(spec: str, memory_mb: int, parent: int) -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    resource.setrlimit(resource.RLIMIT_AS, (memory_mb * 2**20, memory_mb * 2**20))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    own = os.getpid()
    try:
        function = find(spec)
    except ValueError as error:
        answers.write(json.dumps({"refused": str(error)}) + "\n")
        return
    answers.write('{"ready": true}\n')
    for line in sys.stdin:
        for response, prompt, label in json.loads(line):
            answer = _ask(function, response, prompt, label)
            if os.getpid() != own:  # the function forked and came back twice: one process answers
                os._exit(0)
            answers.write(json.dumps(answer) + "\n")


def _ask(function: Any, response: str, prompt: str, label: str | None) -> dict[str, Any]:
    try:
        reward = function(response, prompt, label)
        return {"reward": None if reward is None else float(reward)}
    except (Exception, SystemExit) as error:  # noqa: BLE001 - somebody else's code: it goes back with its question
        return {"error": repr(error)[:500]}


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
