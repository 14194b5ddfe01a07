"""Runs laid on one another, presets of algorithms, and several rewards."""

import pytest

from launch import cli
from orchestrator import plugins
from tests.test_config import load

every_algorithm = pytest.mark.parametrize("name", plugins.names("orchestrator.algorithms"))


@every_algorithm
def test_every_algorithm_has_a_preset_that_lies_on_a_run(name):
    run = cli.resolve(["quickstart", name, "rl.steps=7"])
    assert (run.rl.algorithm.name, run.rl.steps, run.rl.prompts_per_step) == (name, 7, 64)


def test_runs_lie_on_one_another_and_an_algorithm_of_another_name_replaces_the_one_below(tmp_path):
    low, high = tmp_path / "low.yaml", tmp_path / "a=high.yaml"
    low.write_text(
        "model: {path: x, max_length: 999}\nroles: {reward: {function: exact_match}}\n"
        "rl: {steps: 3, algorithm: {name: ppo, kl_coef: 0.5, value_clip: null}}\n"
    )
    high.write_text("model: {max_length: 888}\nrl: {algorithm: {name: grpo, clip_low: 0.1}}\n")
    run = cli.resolve([str(low), str(high), "rl.algorithm.clip_high=0.3", "rl.prompts.path=/a/b.yaml"])
    assert (run.model.path, run.model.max_length, run.rl.steps) == ("x", 888, 3)
    assert (run.rl.algorithm.name, run.rl.algorithm.kl_coef) == ("grpo", 0.001)  # GRPO's own default
    assert (run.rl.algorithm.clip_low, run.rl.algorithm.clip_high) == (0.1, 0.3)
    assert run.rl.prompts.path == "/a/b.yaml"
    high.write_text("rl: {algorithm: {name: ppo, clip_low: 0.1}}\n")
    same = cli.resolve([str(low), str(high)]).rl.algorithm
    assert (same.kl_coef, same.clip_low, same.value_clip) == (0.5, 0.1, None)


# several rewards


def test_the_old_way_of_naming_one_judge_still_holds():
    assert load().roles.reward.weights(stage=True) == {"exact_match": 1.0}
    assert load("roles.reward={model: rm}").roles.reward.weights(stage=False) == {"model": 1.0}
    assert load("roles.reward={}", "reward_model={}").roles.reward.weights(stage=True) == {"model": 1.0}


def test_several_rewards_have_names_and_weights_beside_the_model():
    reward = load(
        "roles.reward={model: rm, model_weight: 2, functions: "
        "{exact_match: {weight: 0.5}, letters: {function: letter_fraction, weight: -1}}}"
    ).roles.reward
    assert reward.weights(stage=False) == {"model": 2.0, "exact_match": 0.5, "letters": -1.0}
    assert reward.specs() == {"exact_match": "exact_match", "letters": "letter_fraction"}
    alone = load("roles.reward={functions: {exact_match: {}}, model_weight: null}", "reward_model={}")
    assert alone.roles.reward.weights(stage=True) == {"exact_match": 1.0}
