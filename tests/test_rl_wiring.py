"""What the rl stage starts, from which weights, and what it refuses before anything starts."""

import asyncio
from types import SimpleNamespace

import pytest

from actors.group import RewardGroup
from actors.object_store import ObjectStore
from launch import prepare
from launch.train import rl_models
from orchestrator.config import Model
from orchestrator.placement import stage_roles
from orchestrator.rewards import RewardError
from tests import tiny
from tests.fakes import prompt, rollout
from tests.test_config import load


def test_the_critic_starts_from_the_reward_model_the_actor_or_a_folder_of_its_own():
    def start(*overrides):
        return rl_models(load("reward_model={}", *overrides), "base", "trained-reward")["critic"]

    assert start() == "trained-reward"
    assert start("roles.critic.start_from=reward") == "trained-reward"
    assert start("roles.critic.start_from=actor") == "base"
    assert start("roles.critic.start_from=actor", "roles.actor.model=mine") == "mine"
    assert start("roles.critic.model=own") == "own"
    assert rl_models(load(), "base", None)["critic"] == "base"


def test_a_role_that_is_not_needed_is_not_started():
    def started(*overrides):
        return dict(stage_roles(load(*overrides)))["rl"]

    assert started("rl.algorithm={name: grpo, kl_coef: 0}") == ["actor", "engine", "reward"]
    assert "reference" in started("rl.algorithm={name: grpo, kl_coef: 0.1}")
    models = rl_models(load("rl.algorithm={name: grpo, kl_coef: 0}", "roles.critic=null"), "base", None)
    assert "critic" not in models


def test_distributions_too_large_for_the_driver_are_refused_with_the_number(tmp_path, monkeypatch):
    model = Model(path=tiny.save(tmp_path, tiny.llama()), max_length=50)
    algorithm = SimpleNamespace(wants_distribution=True)
    rl = SimpleNamespace(algorithm=algorithm, prompts_per_step=8, samples_per_prompt=4)
    prepare._check_distributions(rl, model)
    monkeypatch.setattr(prepare, "DISTRIBUTION_BYTES", 4 * 32 * 50 * tiny.VOCAB - 1)
    with pytest.raises(ValueError, match=r"32 sequences x 50 tokens x 17 words x 4 bytes.*kl_estimator=k1"):
        prepare._check_distributions(rl, model)
    algorithm.wants_distribution = False
    prepare._check_distributions(rl, model)


class Worker:
    """Answers for each rollout the number of its sample, and for sample 9 nothing."""

    handle = SimpleNamespace(score_groups=SimpleNamespace(_method_name="score_groups"))
    incarnation = 0

    def __init__(self):
        self.calls = []

    async def call(self, verb, groups):
        rollouts = [rollout for group in groups for rollout in group]
        self.calls.append(len(rollouts))
        await asyncio.sleep(0.001)
        numbers = [int(r.uid.rsplit("/")[-1]) for r in rollouts]
        return {"a": [None if n == 9 else n for n in numbers], "b": [10 * n for n in numbers]}


def test_waiting_groups_share_a_call_and_each_gets_its_own_rewards():
    async def score():
        worker = Worker()
        group = RewardGroup([worker], store=ObjectStore(), token_budget=9, weights={"a": 1.0, "b": 0.5})
        asked = [[rollout(prompt(row), k) for k in (row, row + 1)] for row in range(3)]
        return worker.calls, await asyncio.gather(*(group.score(rollouts) for rollouts in asked))

    calls, answers = asyncio.run(score())
    assert [[s.reward for s in scored] for scored in answers] == [[0, 6], [6, 12], [12, 18]]
    assert answers[2][1].parts == {"a": 3.0, "b": 30.0}
    assert sorted(calls) == [2, 4] or calls == [6]


def test_a_missing_reward_reaches_the_driver_with_its_sample():
    group = RewardGroup([Worker()], store=ObjectStore(), token_budget=9, weights={"a": 1.0})
    with pytest.raises(RewardError, match="reward 'a' gave sample 0/4/9 no reward"):
        asyncio.run(group.score([rollout(prompt(4), 9)]))
