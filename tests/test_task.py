"""The built-in task: disjoint splits, mistakes that are mistakes, files that the rest of Quartet reads."""

import json
import random
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from actors.rewards import exact_match, letter_fraction
from launch import tasks
from launch.tasks import addition
from orchestrator.config import Task
from orchestrator.data import read_prompts
from orchestrator.examples import read_units

TASK = Task(seed=3, num_train=400, num_heldout=50, wrong_fraction=0.25)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return tasks.prepare(TASK, tmp_path_factory.mktemp("task"))


def rows(file: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in Path(file).read_text().splitlines()]


def total(prompt: str) -> int:
    first, second = prompt.removesuffix("=").split("+")
    return int(first) + int(second)


def test_no_heldout_problem_is_in_a_training_file(files):
    training = {row["prompt"] for data in (files.sft, files.pairs, files.prompts) for row in rows(data.path)}
    heldout = {
        row["prompt"] for data in (files.heldout_pairs, files.heldout_prompts) for row in rows(data.path)
    }
    assert (len(training), len(heldout), len(training & heldout)) == (400, 50, 0)


def test_a_quarter_of_the_demonstrations_forgets_a_carry_that_was_there(files):
    wrong = [r for r in rows(files.sft.path) if int(r["response"]) != total(r["prompt"])]
    assert len(wrong) == 100
    assert {total(r["prompt"]) - int(r["response"]) for r in wrong} == {10}
    assert all(int(r["prompt"][2]) + int(r["prompt"][4]) >= 10 for r in wrong)


def test_chosen_is_right_and_rejected_is_wrong_in_every_pair(files):
    for data in (files.pairs, files.heldout_pairs):
        for row in rows(data.path):
            assert row["chosen"] == str(total(row["prompt"])) != row["rejected"]


def test_mistakes_go_both_ways():
    """If every wrong carry were too low, "the higher answer" would win all pairs without adding anything."""
    chance = random.Random(0)
    distances = [int(addition.mistake((437, 8), chance)) - 445 for _ in range(400)]
    assert 120 < distances.count(-10) < 200 and 30 < distances.count(10) < 90  # 40 and 15 % of 400


def test_the_same_settings_write_the_same_bytes(files, tmp_path):
    tasks.prepare(TASK, tmp_path)
    names = sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*") if p.is_file())
    folder = files.model.parent
    assert len(names) >= 8
    assert [(folder / name).read_bytes() for name in names] == [
        (tmp_path / name).read_bytes() for name in names
    ]


def test_quartet_reads_what_the_task_wrote(files):
    tokenizer = AutoTokenizer.from_pretrained(files.model)
    model = AutoModelForCausalLM.from_pretrained(files.model)
    prompts = read_prompts(files.prompts, tokenizer, room=6, field="rl.prompts").prompts
    assert all(len(p.tokens) == 6 and p.label == str(total(p.text)) for p in prompts)
    assert len(read_units(files.sft, tokenizer, layout="examples", max_length=11, field="sft.data")) == 400
    pairs = read_units(
        files.heldout_pairs, tokenizer, layout="pairs", max_length=11, field="reward_model.heldout"
    )
    (tokens, mask), _ = pairs[0].rows
    assert tokens[-1] == tokenizer.eos_token_id == model.config.eos_token_id != tokenizer.pad_token_id
    assert tokenizer.decode(tokens[6:], skip_special_tokens=True) == str(total(tokenizer.decode(tokens[:6])))
    assert mask == (False,) * 6 + (True,) * (len(tokens) - 6)


def test_impossible_settings_say_what_to_change(tmp_path):
    with pytest.raises(ValueError, match=r"num_train=4400 .* = 4900 problems, but there are only 4500"):
        tasks.prepare(Task(num_train=4400), tmp_path)
    with pytest.raises(ValueError, match=r"wrong_fraction=0\.9 spoils 360 of 400 rows.*use at most 0\.[45]"):
        tasks.prepare(TASK.model_copy(update={"wrong_fraction": 0.9}), tmp_path)
    with pytest.raises(ValueError, match="unknown task 'adition', did you mean 'addition'"):
        tasks.prepare(Task(name="adition"), tmp_path)


def test_exact_match_ignores_only_white_space_around_the_answer():
    found = [exact_match.score(response, "437+8=", "445") for response in ("445", " 445\n", "4 45", "45", "")]
    assert found == [1.0, 1.0, 0.0, 0.0, 0.0]


def test_exact_match_without_a_label_names_the_setting():
    with pytest.raises(ValueError, match="no label for the prompt 'hi'; set label_key"):
        exact_match.score("a", "hi", None)


def test_letter_fraction_is_the_share_of_letters():
    assert [letter_fraction.score(text, "", None) for text in ("ab1!", "abc", "12", "")] == [
        0.5,
        1.0,
        0.0,
        0.0,
    ]
