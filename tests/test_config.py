"""The run tree refuses what does not fit, says what would, and answers before torch is imported."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from launch import cli
from launch import help as field_help
from orchestrator import plugins
from orchestrator.config import Run
from orchestrator.configfile import load_run, write_run
from orchestrator.settings import Settings

RL = ["model.path=x", "rl.steps=3", "roles.reward.function=exact_match"]
MAX_KNOBS = 184

every_algorithm = pytest.mark.parametrize("name", plugins.names("orchestrator.algorithms"))


def load(*overrides):
    return load_run([], [*RL, *overrides])


def refusal(*overrides):
    with pytest.raises(ValueError) as refused:
        load(*overrides)
    return str(refused.value)


# unknown names


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sed=1", "unknown field sed, did you mean 'seed'?; known here: deadlines, engine,"),
        ("rl.step=3", "unknown field rl.step, did you mean 'steps'?; known here: algorithm,"),
        ("rl.sampling.temprature=1", "unknown field rl.sampling.temprature, did you mean 'temperature'?"),
        ("roles.actor.gpu=1", "unknown field roles.actor.gpu, did you mean 'gpus'?"),
        ("roles.critc.gpus=1", "unknown field roles.critc, did you mean 'critic'?"),
        (
            "roles.actor.optimizer.lr=1",
            "unknown field roles.actor.optimizer.lr; known here: adam_learning_rate, b",
        ),
        ("rl.algorithm.cliplow=1", "unknown field rl.algorithm.cliplow, did you mean 'clip_low'?"),
    ],
)
def test_an_unknown_field_is_refused_with_its_nearest_neighbour(override, message):
    assert refusal(override).startswith(message)


def test_an_unknown_algorithm_lists_the_known():
    message = refusal("rl.algorithm.name=pop")
    assert message.startswith("rl.algorithm: unknown algorithm 'pop', did you mean 'ppo'?; known: ")
    assert {"ppo", "grpo"} <= set(message.split("known: ")[1].split(", "))


def test_every_complaint_is_listed_at_once():
    assert refusal("seeed=1", "rl.steps=0", "rl.sampling.top_p=2").splitlines() == [
        "rl.steps: Input should be greater than 0; got 0",
        "rl.sampling.top_p: Input should be less than or equal to 1; got 2",
        refusal("seeed=1"),
    ]


# values that do not fit together


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["rl.prompts_per_step=3", "rl.samples_per_prompt=2", "rl.updates.minibatches=4"],
            "rl.updates.minibatches=4 does not divide rl.prompts_per_step=3 x rl.samples_per_prompt=2 = 6; "
            "pick a divisor of 6",
        ),
        (
            ["engine.replicas=2", "engine.tensor_parallel=2", "engine.gpus=3"],
            "engine.gpus=3 but engine.replicas=2 x engine.tensor_parallel=2 = 4; set engine.gpus=4, or 0",
        ),
        (["placement.share=[[actor, critic], [critic]]"], "placement.share names 'critic' twice"),
        (["placement.take_turns=true", "placement.share=[[actor, critic]]"], "no role beside the engine"),
        (
            ["placement.take_turns=true", "placement.share=[[actor, engine]]", "rl.staleness=1"],
            "would have to sample while it sleeps",
        ),
        (
            [
                "placement.take_turns=true",
                "placement.share=[[actor, engine]]",
                "roles.actor.optimizer.zero_stage=3",
            ],
            "set zero_stage to 2",
        ),
        (
            ["placement.share=[[actor, reference]]", "roles.actor.gpus=1"],
            "mixes roles on GPUs and on CPUs {'actor': True, 'reference': False}; give all of them gpus",
        ),
        (
            ["model.max_length=64", "rl.sampling.max_new_tokens=64"],
            "rl.sampling.max_new_tokens=64 leaves no room for a prompt in model.max_length=64",
        ),
        (
            ["roles.reward.model=rm"],
            "roles.reward.model='rm' and roles.reward.function='exact_match' are both set",
        ),
        (
            ["roles.reward.functions={a: {function: exact_match}}"],
            "roles.reward.functions=['a'] and roles.reward.function='exact_match' are both set; keep one, or",
        ),
        (
            ["roles.reward={model: x, functions: {model: {}}}"],
            "functions.model: that name is the reward model's",
        ),
        (
            ["roles.reward={functions: {exact_match: {weight: 0}}}"],
            "every reward has the weight 0 (exact_match): nothing would be learned; set one of",
        ),
        (["roles.reward={functions: {exact_match: {weight: .nan}}}"], "functions.exact_match.weight"),
        (
            ["roles.reward.functions={a: {fnction: b}}"],
            "unknown field roles.reward.functions.a.fnction, did you mean 'function'?; known here: fun",
        ),
        (
            ["roles.critic=null"],
            "roles.critic=null switches off what rl.algorithm.name=ppo needs as configured; leave it out",
        ),
        (
            ["rl.algorithm={name: grpo, kl_coef: 0.1}", "roles.reference=null"],
            "roles.reference=null switches off what rl.algorithm.name=grpo needs as configured",
        ),
        (
            ["rl.algorithm.name=grpo", "rl.critic_warmup=2"],
            "rl.critic_warmup=2 but grpo has no critic to warm up; set it to 0",
        ),
        (
            ["rl.updates.old_logprobs=rollout", "rl.algorithm.correction.rule=token"],
            "rl.updates.old_logprobs=rollout takes the engine's for both; use auto",
        ),
        (["rl.critic_warmup=3"], "rl.critic_warmup=3 leaves the actor none of rl.steps=3 steps; lower it"),
        (
            ["rl.filter={}", "rl.samples_per_prompt=1"],
            "rl.filter.flat drops every group of rl.samples_per_prompt=1; use 2 or more, or rl.filt",
        ),
        (
            ["rl.shaping.overlong_buffer=256"],
            "rl.shaping.overlong_buffer=256 is all of rl.sampling.max_new_tokens=256: every response would",
        ),
        (
            ["rl.algorithm.name=remax", "rl.shaping.normalize=scale"],
            "would put the rewards on another scale than remax's greedy baseline; leave both out",
        ),
        (
            ["roles.critic={model: x, start_from: actor}"],
            "roles.critic.model='x' and roles.critic.start_from=actor are both set; keep one",
        ),
        (
            ["roles.critic.start_from=reward"],
            "roles.critic.start_from=reward but the run has no reward model; use actor, or give",
        ),
        (
            ["roles.actor.optimizer.adam_learning_rate=0.1"],
            "roles.actor.optimizer: adam_learning_rate=0.1 is for name=muon; adamw has one rate",
        ),
        (["roles.reward.function=null"], "nothing gives rewards: set roles.reward.model,"),
        (["rl.algorithm.name=grpo", "rl.samples_per_prompt=1"], "rl.samples_per_prompt=1: "),
        (["rl=null"], "no stage: give at least one of sft, reward_model, preference, rl"),
        (["model.path="], "model.path"),
    ],
)
def test_values_that_do_not_fit_are_refused_with_a_remedy(overrides, message):
    assert message in refusal(*overrides)


def test_a_setting_is_never_assigned_after_load():
    run = load()
    with pytest.raises(ValidationError, match="frozen"):
        run.seed = 1
    with pytest.raises(ValidationError, match="frozen"):
        run.rl.sampling.temperature = 0.5


# files and overrides


def test_an_override_wins_over_the_file_and_the_file_over_the_default(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("model: {path: x}\nsft: {epochs: 2, batch_size: 4}\nseed: 5\n")
    run = load_run(
        [file], ["sft.epochs=0.5", "sft.optimizer.betas=[0.8, 0.9]", "task.name=addition", "task=null"]
    )
    assert (run.sft.epochs, run.sft.batch_size, run.seed, run.name) == (0.5, 4, 5, "run")
    assert (run.sft.optimizer.betas, run.sft.optimizer.learning_rate) == ((0.8, 0.9), 1e-6)
    assert run.task is None


@pytest.mark.parametrize("override", ["seed", "=3", "a..b=1", ".a=1", "seed=[1"])
def test_a_malformed_override_is_refused(override):
    assert repr(override) in refusal(override)


@pytest.mark.parametrize(
    ("text", "message"), [("- a\n- b", "holds list"), ("a: [", "is not YAML"), (None, "No such")]
)
def test_a_bad_file_is_refused_by_name(tmp_path, text, message):
    file = tmp_path / "run.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ValueError, match=message) as refused:
        load_run([file], [])
    assert str(file) in str(refused.value)


@every_algorithm
def test_a_written_run_loads_as_the_same_run(tmp_path, name):
    run = load(f"rl.algorithm.name={name}", "placement.share=[[actor, reference]]", "sft.epochs=1.5")
    write_run(run, tmp_path / "deep" / "run.yaml")
    assert load_run([tmp_path / "deep" / "run.yaml"], []) == run
    assert yaml.safe_load((tmp_path / "deep" / "run.yaml").read_text())["rl"]["algorithm"]["name"] == name


@pytest.mark.parametrize("name", cli.presets())
def test_every_preset_loads(name):
    assert cli.resolve([name]).name


# documentation


def settings_classes(settings: type[Settings] = Run) -> set[type[Settings]]:
    found = {settings}
    for field in settings.model_fields.values():
        inner = field_help.settings_of(field.annotation)
        if inner not in (None, Settings):
            found |= settings_classes(inner)
    return found


def test_every_field_has_a_docstring():
    algorithms = {
        plugins.find("orchestrator.algorithms", n).CONFIG for n in plugins.names("orchestrator.algorithms")
    }
    bare = [
        f"{settings.__name__}.{name}"
        for settings in settings_classes() | algorithms
        for name, field in settings.model_fields.items()
        if not field.description
    ]
    assert bare == []


def test_there_are_few_knobs():
    """A field of a class that is used in five places is one thing to learn."""
    knobs = [
        f"{settings.__name__}.{name}"
        for settings in settings_classes()
        for name, field in settings.model_fields.items()
        if field_help.settings_of(field.annotation) is None
    ]
    assert len(knobs) <= MAX_KNOBS, f"{len(knobs)} knobs; a new one replaces an old one"


def test_help_shows_type_default_and_docstring_of_every_leaf():
    text = cli.train_help(colour=False)
    assert (
        "\n  rl.sampling.temperature  float > 0 = 1.0\n      Sampling temperature; the trainer scores" in text
    )
    assert (
        "\n  sft.optimizer.learning_rate  float >= 0 = 1e-05\n" in text
    )  # the stage's default, not the class's
    assert "\n  sft.max_rows" not in text
    assert "\n  tracking.wandb  online | offline | disabled = disabled\n" in text
    assert "\n  engine.kv_cache_mb  int > 0 | null = null\n" in text
    assert "\nrl.algorithm.name=grpo\n" in text
    assert [line for line in text.splitlines() if len(line) > field_help.WIDTH] == []
    assert "\x1b[" not in text
    assert "\x1b[" in cli.train_help(colour=True)


# the command


def test_a_valid_run_is_refused_or_printed_before_torch_and_ray_are_imported(tmp_path):
    file = tmp_path / "run.yaml"
    write_run(load(), file)
    script = (
        "import sys; from launch import cli\n"
        "commands = ['train', '--help'], ['config', sys.argv[1]], ['train', sys.argv[1], 'sed=1']\n"
        "codes = [cli.main(command) for command in commands]\n"
        "heavy = {'torch', 'ray', 'transformers', 'vllm', 'deepspeed', 'wandb', 'numpy'} & set(sys.modules)\n"
        "print(codes, sorted(heavy), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(file)], capture_output=True, text=True, cwd=cli_root()
    )
    assert done.stderr.splitlines()[-1] == "[0, 0, 2] []"


def cli_root():
    return Path(cli.__file__).parent.parent


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["trian"],
            "quartet: error: unknown verb 'trian', did you mean 'train'?; known: train, evaluate, config",
        ),
        (["train"], "quartet: error: the following arguments are required: RUN"),
        (
            ["train", "rl.steps=3"],
            "quartet: error: 'rl.steps=3' overrides no run; give a YAML file or a preset",
        ),
        (
            ["train", "grpo"],
            "quartet: error: 'grpo' is an algorithm and no whole run; lay it on one: quartet",
        ),
        (
            ["train", "quickstart", "grop"],
            "quartet: error: unknown preset 'grop', did you mean 'grpo'?; known:",
        ),
        (["train", "no-such-preset"], "quartet: error: unknown preset 'no-such-preset'"),
        (["train", "x.yaml", "--resumee"], "quartet: error: unrecognized arguments: --resumee"),
        (["config", "no/such.yaml"], "quartet: error: no/such.yaml: No such file or directory"),
    ],
)
def test_a_refusal_is_one_line_on_stderr_and_status_2(capsys, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments) == 2
    out, err = capsys.readouterr()
    assert err.startswith(message)
    assert (out, err.count("\n"), os.listdir(tmp_path)) == ("", 1, [])


def test_config_prints_a_tree_that_loads_as_the_same_run(capsys, tmp_path):
    write_run(load(), tmp_path / "run.yaml")
    assert cli.main(["config", str(tmp_path / "run.yaml"), "rl.steps=7"]) == 0
    (tmp_path / "printed.yaml").write_text(capsys.readouterr().out)
    assert load_run([tmp_path / "printed.yaml"], []) == load("rl.steps=7")


def test_overrides_may_stand_on_both_sides_of_an_option():
    arguments = cli.train_parser().parse_intermixed_args(["quickstart", "a=1", "--resume", "b=2"])
    assert (arguments.words, arguments.resume) == (["quickstart", "a=1", "b=2"], True)


def test_overview_and_version(capsys):
    assert cli.main(["--help"]) == 0
    assert cli.main(["--version"]) == 0
    out = capsys.readouterr().out
    assert "train RUN... [a.b.c=value ...] [--resume | --fresh]" in out
    assert out.splitlines()[-1] == "quartet 0.1.0"


def test_an_override_changes_one_of_two_fields_that_share_a_yaml_alias(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(
        "model: {path: x}\nroles:\n  reward: {function: exact_match}\n"
        "  actor: &small {cpus_per_worker: 0.5}\n  reference: *small\nrl: {steps: 1}\n"
    )
    run = load_run([file], ["roles.reference.cpus_per_worker=4"])
    assert (run.roles.actor.cpus_per_worker, run.roles.reference.cpus_per_worker) == (0.5, 4)
