"""A reward function of the user's costs its own process at most: limits on time and memory, errors with the
sample's name."""

import os
import time
from dataclasses import replace

import psutil
import pytest

from actors.reward import Judge
from actors.reward_function import ChildFunction, Limits, RewardFunctionError, find_reward_function, judge_all
from tests.fakes import prompt, rollout

TWO = [rollout(prompt(4), k) for k in range(2)]
SHORT = Limits(answer_s=0.5, memory_mb=1024)


def nasty(name, limits=SHORT):
    return find_reward_function(f"tests.nasty_rewards:{name}", limits)


def test_answers_come_in_order_however_many_and_from_one_child():
    function = nasty("good")
    questions = [("x" * k, "p", None) for k in range(200)]
    assert function.score_all(questions, ["?"] * 200) == [k / 2 for k in range(200)]
    big = [("x" * 10**6, "p", None)] * 3  # far more than a pipe holds
    assert function.score_all(big, ["?"] * 3) == [5e5] * 3
    assert find_reward_function("exact_match")("7", "3+4=", "7") == 1.0


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("raises", r"failed for sample 0/4/0: ZeroDivisionError"),
        ("loops", r"failed for sample 0/4/0: it took longer than 0\.5 s and was ended"),
        ("sleeps", r"failed for sample 0/4/0: it took longer than 0\.5 s and was ended"),
        ("exits", r"failed for sample 0/4/0: it ended its process"),
        ("quits", r"failed for sample 0/4/0: SystemExit"),
        ("eats", r"failed for sample 0/4/0: MemoryError"),
        ("words", r"failed for sample 0/4/0: ValueError"),
    ],
)
def test_a_function_that_fails_is_an_error_with_its_sample_and_leaves_no_process(name, message):
    """FAULTS 15."""
    function, began = nasty(name), time.monotonic()
    with pytest.raises(RewardFunctionError, match=f"{name}' {message}"):
        judge_all(function, [rollout(prompt(4), k) if name != "raises" else unlabelled(k) for k in range(2)])
    assert time.monotonic() - began < 3
    function.close()
    assert not [p for p in psutil.Process().children() if "reward_child" in " ".join(p.cmdline())]


def unlabelled(k):
    return rollout(replace(prompt(4), label=""), k)


def test_a_function_that_prints_a_gigabyte_or_forks_answers_once():
    assert judge_all(nasty("prints", Limits(answer_s=30)), TWO) == [1.0, 1.0]
    function = nasty("forks")
    assert judge_all(function, TWO) == [2.0, 2.0] and judge_all(function, TWO) == [2.0, 2.0]


def test_what_a_function_started_ends_with_it():
    function = nasty("leaves")
    child = int(judge_all(function, TWO[:1])[0])
    started = psutil.Process(child).children()
    assert len(started) == 1
    function.close()
    _, alive = psutil.wait_procs(started, timeout=5)
    assert alive == [] and not psutil.pid_exists(child)


def test_a_function_without_an_answer_says_so_and_one_that_is_missing_is_refused_at_once():
    assert judge_all(nasty("none"), TWO) == [None, None]
    with pytest.raises(ValueError, match=r"'tests\.nasty_rewards:absent' cannot be loaded"):
        nasty("absent")
    with pytest.raises(ValueError, match="unknown reward 'exact_mach', did you mean 'exact_match'"):
        find_reward_function("exact_mach")


def test_a_function_works_again_after_its_process_ended():
    function = nasty("good")
    os.kill(function._child.pid, 9)
    with pytest.raises(RewardFunctionError, match="its process"):
        judge_all(function, TWO)
    assert judge_all(function, TWO) == [0.5, 0.5]


def test_a_function_sees_no_secret(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "canary-1")
    monkeypatch.setenv("HF_TOKEN", "canary-2")
    monkeypatch.setenv("HARMLESS", "canary-3")
    assert judge_all(ChildFunction("tests.nasty_rewards:secrets"), TWO) == [1.0, 1.0]


def test_the_judge_asks_the_child():
    worker = Judge(model=None, functions={"good": "tests.nasty_rewards:good"}, micro_batch_tokens=1)
    worker.start()
    assert worker.score_groups([TWO]) == {"good": [0.5, 0.5]}
