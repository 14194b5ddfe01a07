"""The lines a user reads."""

import io
import json

from launch.progress import Progress, step_line, summary_block, write_samples
from orchestrator.batch import ScoredRollout
from tests.fakes import prompt as make_prompt
from tests.fakes import rollout

METRICS = {
    "reward": 0.834,
    "kl": 0.0121,
    "response_tokens": 6.12,
    "tokens_per_s": 2310.4,
    "seconds/update": 0.32,
    "seconds/generate": 0.41,
    "driver_s": 0.02,
    "actor/loss": 3.0,
}


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self):
        return True


def test_step_line_shows_what_the_step_has_in_a_fixed_order():
    assert step_line("rl", 12, 60, METRICS) == (
        "step 12/60  reward 0.83  kl 0.012  len 6.1  tok/s 2310  | generate 0.41 update 0.32 driver 0.02 s"
    )
    assert step_line("sft", 40, 120, {"loss": 0.8312, "tokens_per_s": 5120.0}) == (
        "sft step 40/120  loss 0.831  tok/s 5120"
    )


def test_a_file_gets_a_line_per_step():
    stream = io.StringIO()
    progress = Progress(stream)
    progress.header("rl: ppo, 2 steps")
    progress.step("rl", 1, 2, {"reward": 0.0})
    progress.step("rl", 2, 2, {"reward": 1.0})
    progress.note("saved")
    assert stream.getvalue() == "\n== rl: ppo, 2 steps\nstep 1/2  reward 0.00\nstep 2/2  reward 1.00\nsaved\n"


def test_a_terminal_rewrites_the_step_line_and_ends_it_before_other_text():
    stream = Terminal()
    progress = Progress(stream)
    progress.step("rl", 1, 2, {"reward": 0.0})
    progress.step("rl", 2, 2, {"reward": 1.0})
    progress.summary("done", [("reward", "1.00"), ("in", "runs/x")])
    assert stream.getvalue() == (
        "\rstep 1/2  reward 0.00\x1b[K\rstep 2/2  reward 1.00\x1b[K\n"
        "\n== done\n   reward  1.00\n   in      runs/x\n"
    )


def test_an_empty_summary_is_empty():
    assert summary_block([]) == ""


def test_samples_are_appended_with_prompt_response_label_and_reward(tmp_path):
    file = tmp_path / "run" / "samples.jsonl"
    sample = ScoredRollout(rollout=rollout(make_prompt(row=3), k=1), reward=0.5)
    write_samples(file, 7, [sample])
    write_samples(file, 8, [sample])
    first, second = [json.loads(line) for line in file.read_text().splitlines()]
    assert first == {"step": 7, "uid": "0/3/1", "prompt": "a", "response": "b", "label": "b", "reward": 0.5}
    assert second["step"] == 8
