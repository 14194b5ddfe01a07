"""Reward functions that nobody should write (FAULTS 15)."""

import os
import sys
import time


def good(response, prompt, label):
    return len(response) / 2


def raises(response, prompt, label):
    return 1 / len(label or "")


def loops(response, prompt, label):
    while True:
        pass


def sleeps(response, prompt, label):
    time.sleep(3600)


def exits(response, prompt, label):
    os._exit(0)


def quits(response, prompt, label):
    sys.exit(0)


def eats(response, prompt, label):
    return len(bytearray(2**34))


def prints(response, prompt, label):
    line = "x" * 2**20
    for _ in range(1024):
        print(line)
    return 1.0


def forks(response, prompt, label):
    os.fork()
    return 2.0


def leaves(response, prompt, label):
    """A process that would outlive it."""
    if os.fork() == 0:
        time.sleep(3600)
    return float(os.getpid())


def none(response, prompt, label):
    return None


def words(response, prompt, label):
    return "high"


def secrets(response, prompt, label):
    return float(sum("canary" in value for value in os.environ.values()))
