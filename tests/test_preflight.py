"""A run that has no place on this machine is refused before anything starts."""

import resource

import pytest

from launch.budgets import refuse_small_budgets
from launch.preflight import refuse_what_has_no_place
from orchestrator.batch import Prompt
from orchestrator.examples import Unit
from orchestrator.placement import stage_roles
from tests.test_config import RL, load, refusal


def test_every_stage_is_asked_with_the_roles_it_starts():
    run = load(*RL, "sft={}", "reward_model={}", "preference={objective: {name: dpo}}",
               "rl.algorithm={name: grpo, kl_coef: 0.1}")  # fmt: skip
    assert dict(stage_roles(run)) == {
        "sft": ["actor"],
        "reward_model": ["reward"],
        "preference": ["actor", "reference"],
        "rl": ["actor", "engine", "reward", "reference"],
    }
    first = load(*RL, "rl=null", "preference={objective: {name: dpo}, precompute_reference: true}")
    shared = load(*RL, "placement.backbone=shared", "model.adapter={}")
    assert dict(stage_roles(shared)) == {"rl": ["actor", "engine"]}
    assert list(stage_roles(first)) == [("preference", ["reference"]), ("preference", ["actor"])]


@pytest.mark.parametrize(
    ("override", "gpus", "message"),
    [
        ("roles.actor.workers=40", 0, r"the rl stage .*wants \d+ CPU; the cluster has 8"),
        ("roles.actor.gpus=2", 1, r"the rl stage .*wants 2 GPU.*has 1"),
        ("engine={gpus: 2, tensor_parallel: 2}", 1, r"2 GPU"),
    ],
)
def test_a_run_without_a_place_is_refused_with_the_number_to_change(monkeypatch, override, gpus, message):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    run = load(*RL, override)
    with pytest.raises(ValueError, match="(?s)" + message) as error:
        refuse_what_has_no_place(run, num_gpus=gpus, num_cpus=8)
    assert "lower " in str(error.value)
    refuse_what_has_no_place(run, num_gpus=4, num_cpus=64)
    refuse_what_has_no_place(load(*RL, override, "ray_address=auto"), num_gpus=0, num_cpus=1)


def test_a_process_that_may_open_no_files_to_speak_of_is_refused(monkeypatch):
    """FAULTS 30."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, before[1]))
    try:
        with pytest.raises(ValueError, match=r"may have 64 files open, and Ray needs 256; .*ulimit -n 4096"):
            refuse_what_has_no_place(load(*RL), num_gpus=0, num_cpus=64)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    refuse_what_has_no_place(load(*RL), num_gpus=0, num_cpus=64)


def unit(*lengths, mismatched=0):
    rows = tuple(((5,) * length, (True,) * length) for length in lengths)
    return Unit(rows=rows, mismatched=((5,) * mismatched, (True,) * mismatched) if mismatched else None)


def budgets(**tokens):
    return [f"roles.{role}.micro_batch_tokens={number}" for role, number in tokens.items()]


@pytest.mark.parametrize(
    ("overrides", "stage", "units", "role", "tokens"),
    [
        # Pairs of 3 and 9 tokens and of 6 and 7: as wide as the longer row, 2 x 9 and 2 x 7.
        (["preference={objective: {name: dpo}}"], "preference", [unit(3, 9), unit(6, 7)], "reference", 18),
        (["preference={objective: {name: dpo}}"], "preference", [unit(3, 9), unit(6, 7)], "actor", 18),
        (["preference={objective: {name: kto}}"], "preference", [unit(6, mismatched=8)], "reference", 8),
        (["reward_model={objective: {name: ranking}}"], "reward_model", [unit(2, 4, 3)], "reward", 12),
        (["sft={}"], "sft", [unit(5), unit(7)], "actor", 7),
        (["sft={packing: true}"], "sft", [unit(5, 4), unit(7)], "actor", 9),  # one after the other
    ],
)
def test_a_budget_that_cannot_hold_what_one_loss_compares_is_refused(overrides, stage, units, role, tokens):
    roomy = dict.fromkeys(("actor", "reward", "reference"), 1000)
    refuse_small_budgets(load(*overrides, *budgets(**roomy | {role: tokens})), {stage: units}, ())
    run = load(*overrides, *budgets(**roomy | {role: tokens - 1}))
    says = (
        rf"{role}.micro_batch_tokens={tokens - 1} cannot hold .* {stage} keeps together; set it to {tokens}"
    )
    with pytest.raises(ValueError, match=says):
        refuse_small_budgets(run, {stage: units}, ())


@pytest.mark.parametrize(
    ("algorithm", "role", "tokens"),
    [("ppo", "actor", 25), ("ppo", "critic", 25), ("ppo", "reference", 25), ("online_dpo", "actor", 50)],
)
def test_a_budget_that_cannot_hold_the_longest_response_is_refused(algorithm, role, tokens):
    """The longest prompt has 5 tokens, a response at most 20; online DPO compares two."""
    prompts = [Prompt(uid=f"0/{k}", row=k, tokens=(7,) * k, text="", label=None) for k in (2, 5)]
    base = (f"rl.algorithm={{name: {algorithm}, kl_coef: 0.1}}", "rl.sampling.max_new_tokens=20")
    refuse_small_budgets(load(*base, *budgets(**{role: tokens})), {}, prompts)
    with pytest.raises(ValueError, match=rf"roles.{role}.*lower rl.sampling.max_new_tokens"):
        refuse_small_budgets(load(*base, *budgets(**{role: tokens - 1})), {}, prompts)


def test_an_objective_without_its_reference_is_refused():
    base = ("rl.algorithm={name: grpo, kl_coef: 0}", "roles.reference=null")
    says = refusal(*base, "preference={objective: {name: ipo}}")
    assert "roles.reference=null switches off what preference.objective.name=ipo is measured from" in says
    assert load(*base, "preference={objective: {name: orpo}}").roles.reference is None
