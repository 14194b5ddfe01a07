"""The predicted schedule: the real loop in virtual time, against sums by hand."""

import asyncio
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import yaml

import orchestrator.plan.cast
from launch.cli import main
from orchestrator.config import Optimizer, Run
from orchestrator.plan.calibration import read_calibration
from orchestrator.plan.cast import copies_in
from orchestrator.plan.devices import DEVICES, parse_cluster
from orchestrator.plan.fit import Planned, fits
from orchestrator.plan.memory import Overheads
from orchestrator.plan.predict import idle_shares, predict, simulate
from orchestrator.plan.search import FINALISTS, laid_on, search
from orchestrator.plan.service import Rates, Service, sheet_rates
from orchestrator.plan.shapes import NAMED, shape_of
from orchestrator.plan.simulated import Seats, SimulatedEngine, SimulatedLearner
from orchestrator.plan.stages import Shapes
from orchestrator.plan.virtual import Place, run_virtually
from orchestrator.plan.workload import workload

FREE = Rates(
    flops=1e40, bandwidth=1e40, layer_s=0, call_s=0, row_s=0, update_s=0, iteration_s=0, slot_s=0,
    request_s=0, sync_s=0, sync_bandwidth=1e40, sharing=1, error=0, source="the test",
)  # fmt: skip
TINY = shape_of(
    {"model_type": "llama", "hidden_size": 4, "intermediate_size": 8, "num_hidden_layers": 1,
     "num_attention_heads": 2, "vocab_size": 10},
    where="x",
)  # fmt: skip
GPUS = parse_cluster("1x8xH200")


def small_run(**rl) -> Run:
    """Responses of one token: one step of the engine is all of the generation."""
    return Run(
        model={"path": "qwen2.5-0.5b", "max_length": 9},
        rl={
            "algorithm": {"name": "grpo"}, "prompts_per_step": 4, "samples_per_prompt": 2, "steps": 5,
            "sampling": {"max_new_tokens": 1}, **rl,
        },
        roles={"actor": {"gpus": 1}, "reward": {"function": "exact_match"}},
        engine={"replicas": 1, "gpus": 1},
    )  # fmt: skip


def planned(run: Run, cluster=GPUS, model: str = "qwen2.5-0.5b", **lengths) -> Planned:
    flow = workload(run, run.rl, prompt=lengths.get("prompt", 4), response=lengths.get("response", 1))
    shapes = Shapes(base=NAMED[model], by_role={})
    return Planned(run=run, shapes=shapes, cluster=cluster, workload=flow, overheads=Overheads())


def long_answers(staleness: int) -> Planned:
    """Nearly every response has the limit of 1000 tokens."""
    run = Run(
        model={"path": "qwen2.5-0.5b", "max_length": 1009},
        rl={"algorithm": {"name": "grpo"}, "prompts_per_step": 4, "samples_per_prompt": 8, "steps": 5,
            "sampling": {"max_new_tokens": 1000}, "staleness": staleness},
        roles={"actor": {"gpus": 1}, "reward": {"function": "exact_match"}},
        engine={"replicas": 1, "gpus": 1},
    )  # fmt: skip
    return planned(run, response=999.9)


def test_work_at_one_place_shares_it():
    """Capacity 1: A of 2 s from 0, B of 1 s from 1. A has 1 s left when B comes; both end at 3."""

    async def both() -> list[float]:
        place, loop = Place("x"), asyncio.get_running_loop()

        async def one(start: float, seconds: float) -> float:
            await asyncio.sleep(start)
            await place.work(seconds, "score")
            return loop.time()

        return await asyncio.gather(one(0, 2), one(1, 1))

    assert run_virtually(both()) == pytest.approx([3.0, 3.0])


def test_a_learner_takes_one_call_at_a_time_however_many_cores_are_free():
    """Two updates of 2 s each on two cores, asked for at once, and a score of 3 s after them: 2, 4, 7 s."""

    class Timed(Service):
        def update(self, *_):
            return 2.0

        def forward(self, *_):
            return 3.0

    service = Timed(
        shape=NAMED["smollm2-135m"], rates=FREE, cluster=parse_cluster("1x2xcpu"), dtype="float32"
    )
    seats = Seats(places=(Place("host", capacity=2.0),), demand=1.0)
    minibatch = SimpleNamespace(records=SimpleNamespace(tokens=torch.ones(1, 2)), rows=[0])

    async def ends() -> list[float]:
        learner, loop = SimulatedLearner(seats, service, Optimizer(), copies=1), asyncio.get_running_loop()

        async def at_end(call) -> float:
            await call
            return loop.time()

        calls = [learner.update(minibatch), learner.update(minibatch), learner.score(minibatch.records)]
        return await asyncio.gather(*map(at_end, calls))

    assert run_virtually(ends()) == pytest.approx([2.0, 4.0, 7.0])


@pytest.mark.parametrize(("ranks", "passes"), [(1, 3), (2, 2), (4, 1)])
def test_groups_of_one_call_are_computed_apart(ranks, passes):
    """Three groups of two rows that would fit one micro-batch, dealt over the ranks: launches of 1 s a layer,
    and a call of 100 s."""
    rates = replace(FREE, layer_s=1.0, call_s=100.0)
    shape = NAMED["smollm2-135m"]
    cluster = parse_cluster("1x8xcpu")
    service = Service(shape=shape, rates=rates, cluster=cluster, dtype="float32", ranks=ranks)
    group = ([3, 4], [1, 2])
    assert service.forward_apart([group] * 3) == pytest.approx(passes * shape.layers + 100.0)


def test_waiting_for_nothing_is_an_error_and_not_a_hang():
    async def forever() -> None:
        await asyncio.get_running_loop().create_future()

    with pytest.raises(RuntimeError, match="never comes"):
        run_virtually(forever())


def test_engine_is_a_queue_with_a_batch_limit():
    """Two at once, a second a token: responses of 2, 1 and 2 tokens. The third comes in when the second has
    gone, at 1, and ends at 3; all at once would be done at 2."""

    async def run(limit: int) -> float:
        service = Service(shape=TINY, rates=replace(FREE, iteration_s=1.0), cluster=GPUS, dtype="bfloat16")
        seats = Seats(places=(Place("gpu"),), demand=1.0)
        engine = SimulatedEngine(seats, service, max_num_seqs=limit, cache_tokens=1000)
        await engine.sample(3, [2, 1, 2])
        return asyncio.get_running_loop().time()

    assert run_virtually(run(2)) == pytest.approx(3.0)
    assert run_virtually(run(3)) == pytest.approx(2.0)


def test_cache_limits_the_batch_too():
    """Prompts of 3 and responses of 1 and 1: eight tokens hold both, seven only one at a time."""

    async def run(cache: float) -> float:
        service = Service(shape=TINY, rates=replace(FREE, iteration_s=1.0), cluster=GPUS, dtype="bfloat16")
        engine = SimulatedEngine(
            Seats(places=(Place("gpu"),), demand=1.0), service, max_num_seqs=9, cache_tokens=cache
        )
        await engine.sample(3, [1, 1])
        return asyncio.get_running_loop().time()

    assert run_virtually(run(8)) == pytest.approx(1.0)
    assert run_virtually(run(7)) == pytest.approx(2.0)


def test_operations_of_a_batch_by_hand():
    """One layer: attention 4 x 16, MLP 96, norms 8 = 168 weights; head 40. Two sequences of 3 tokens, 2 of
    them responses: 2 x (6 x 168 + 4 x 40) + 4 x 4 x (2 x 9 / 2) = 2480. An update is three times that."""
    service = Service(
        shape=TINY, rates=replace(FREE, flops=1.0), cluster=GPUS, dtype="bfloat16", micro_batch_tokens=6
    )
    assert service.forward([3, 3], [2, 2]) == pytest.approx(2480)
    optimizer = Run(model={"path": "x"}, rl={}, roles={"reward": {"function": "f"}}).roles.actor.optimizer
    assert service.update([3, 3], [2, 2], optimizer) == pytest.approx(3 * 2480)


def test_decoding_reads_the_weights_and_the_cache_by_hand():
    """208 weights of 2 bytes, 2 sequences of 5 tokens with 16 bytes of keys and values each, logits 160."""
    service = Service(shape=TINY, rates=replace(FREE, bandwidth=1.0), cluster=GPUS, dtype="bfloat16")
    assert service.decode(2, 5) == pytest.approx(208 * 2 + 2 * 5 * 16 + 160)


def test_staleness_hides_generation_behind_the_update():
    """Generation 10 s, update 6 s on devices of their own: 16 s a step in turn. With staleness 1 two batches
    are in the engine at once, which costs it nothing here: two steps take 10 + 6 s, so 8 s each."""
    rates = replace(FREE, iteration_s=0.01, update_s=6.0)
    in_turn = simulate(long_answers(staleness=0), rates)
    assert in_turn.step_s == pytest.approx(16.0, rel=0.01)
    assert in_turn.seconds["generate"] == pytest.approx(10.0, rel=0.01)
    assert in_turn.busy == pytest.approx(0.5, rel=0.01)
    assert in_turn.idle == pytest.approx({"generate": 10 / 32, "update": 6 / 32}, rel=0.01)
    assert simulate(long_answers(staleness=1), rates).step_s == pytest.approx(8.0, rel=0.05)


def test_shared_devices_take_turns_also_with_staleness():
    run = small_run(staleness=1)
    shared = run.model_copy(
        update={"placement": run.placement.model_copy(update={"share": (("actor", "engine"),)})}
    )
    rates = replace(FREE, iteration_s=10.0, update_s=6.0)
    assert simulate(planned(shared), rates).step_s == pytest.approx(16.0)


def test_taking_turns_costs_the_moves():
    """Generation 10 s, update 6 s, and 1e9 bytes of the actor's and 0.9e9 of the engine's each way, three
    turns a step: longer than 16 s, by what 494,032,768 parameters take at 25 GB/s."""
    run = small_run()
    placement = {"share": (("actor", "engine"),), "take_turns": True}
    turns = run.model_copy(update={"placement": run.placement.model_copy(update=placement)})
    found = simulate(planned(turns), replace(FREE, iteration_s=10.0, update_s=6.0))
    moved = 494_032_768 * (22 + 2) / 25e9  # all of both sides, at least once
    assert 16.0 + moved / 2 < found.step_s < 28.0


def test_more_updates_of_a_batch_cost_more():
    rates = replace(FREE, update_s=2.0)
    assert simulate(planned(small_run(updates={"minibatches": 4})), rates).step_s == pytest.approx(8.0)


def test_idle_time_is_put_down_to_what_the_others_do():
    """One generates in [0, 6], another updates in [6, 8]: 8 of 16 busy, 6 idle by generate, 2 by update."""

    async def both() -> list[Place]:
        first, second = Place("a"), Place("b")
        await first.work(6, "generate")
        await second.work(2, "update")
        return [first, second]

    busy, idle = idle_shares([(place, 1.0) for place in run_virtually(both())], 0.0, 8.0)
    assert busy == pytest.approx(0.5)
    assert idle == pytest.approx({"generate": 6 / 16, "update": 2 / 16})


def test_interval_is_that_of_the_rates():
    found = predict(planned(small_run()), replace(FREE, iteration_s=10.0, error=0.3))
    assert (found.low_s, found.high_s) == pytest.approx((7.0, 13.0))


def test_every_algorithm_has_a_schedule():
    """The loop asks each for what it reads: whole distributions, greedy baselines, a critic."""
    critic = {"actor": {"gpus": 1}, "critic": {"gpus": 1}, "reward": {"function": "exact_match"}}
    for algorithm in (
        {"name": "ppo"}, {"name": "remax"}, {"name": "grpo", "kl_coef": 0.1, "kl_estimator": "full"},
        {"name": "dapo"},
    ):  # fmt: skip
        run = small_run(algorithm=algorithm)
        run = run.model_copy(update={"roles": type(run.roles)(**critic, reference={"gpus": 1})})
        assert simulate(planned(run), replace(FREE, iteration_s=1.0)).step_s > 0


def wide_run(engines: int, prompts: int) -> Run:
    run = small_run(prompts_per_step=prompts, samples_per_prompt=8)
    return run.model_copy(
        update={"engine": run.engine.model_copy(update={"replicas": engines, "gpus": engines})}
    )


@pytest.mark.parametrize(("engines", "prompts", "minibatches", "copies"), [
    (256, 2048, 1, 32), (256, 2048, 64, 32), (256, 2048, 512, 4), (6, 2048, 1, 2), (7, 2048, 1, 1),
    (64, 64, 1, 1), (64, 128, 1, 2), (64, 128, 3, 1),
])  # fmt: skip
def test_one_prompt_stands_for_as_many_as_divide_engines_and_minibatches(
    engines, prompts, minibatches, copies
):
    run = wide_run(engines, prompts)
    updates = run.rl.updates.model_copy(update={"minibatches": minibatches})
    run = run.model_copy(update={"rl": run.rl.model_copy(update={"updates": updates})})
    assert copies_in(planned(run)) == copies
    assert copies_in(planned(run, parse_cluster("128x8xcpu"))) == 1


def test_a_large_step_by_hand():
    """16,384 rows, 64 for each engine: 10 s for their one token, then a millisecond each by the reference
    (which has no GPU) and by the actor, and one for its probe."""
    run = wide_run(engines=256, prompts=2048)
    actor = run.roles.actor.model_copy(update={"micro_batch_tokens": 640})
    run = run.model_copy(update={"roles": run.roles.model_copy(update={"actor": actor})})
    found = simulate(planned(run), replace(FREE, iteration_s=10.0, row_s=1e-3))
    assert found.step_s == pytest.approx(10 + 2 * 16.384 + 0.001, rel=1e-6)
    assert found.tokens == 16_384 * 5
    assert found.busy == pytest.approx((256 * 10 + 16.384 + 0.001) / 257 / found.step_s, rel=1e-6)


@pytest.mark.parametrize("staleness", [0, 1])
def test_what_is_left_out_of_a_large_step_hardly_changes_it(staleness, monkeypatch):
    """Responses of many lengths: 1,024 sequences whole, and 256 that stand for them."""
    run = long_answers(staleness).run
    engines = run.engine.model_copy(update={"replicas": 16, "gpus": 16})
    run = run.model_copy(
        update={"engine": engines, "rl": run.rl.model_copy(update={"prompts_per_step": 128})}
    )
    plan = planned(run, response=300)
    rates = replace(FREE, iteration_s=0.01, row_s=5e-3, slot_s=1e-5)
    monkeypatch.setattr(orchestrator.plan.cast, "ENOUGH", 256)
    assert copies_in(plan) == 4
    part = simulate(plan, rates)
    monkeypatch.setattr(orchestrator.plan.cast, "ENOUGH", 10**6)
    whole = simulate(plan, rates)
    assert part.step_s == pytest.approx(whole.step_s, rel=0.05)
    assert part.tokens == pytest.approx(whole.tokens, rel=0.1)
    assert part.busy == pytest.approx(whole.busy, rel=0.1)


def big_run(**fields) -> Run:
    return Run(
        model={"path": "Qwen/Qwen2.5-7B", "max_length": 4096},
        rl={"algorithm": {"name": "grpo", "kl_coef": 0.001}, "prompts_per_step": 16, "samples_per_prompt": 8,
            "sampling": {"max_new_tokens": 2048}},
        roles={"reward": {"function": "exact_match"}}, **fields,
    )  # fmt: skip


def test_search_over_a_thousand_devices_looks_at_few_layouts():
    """The number of divisions does not grow with the cluster, and only the finalists are simulated."""
    lengths = {"prompt": 512, "response": 600}
    rates = sheet_rates(DEVICES["H200"], "bfloat16")
    small = search(planned(big_run(), GPUS, "qwen2.5-7b", **lengths), rates, top=1)
    large = search(planned(big_run(), parse_cluster("128x8xH200"), "qwen2.5-7b", **lengths), rates, top=2)
    assert large.num_divisions <= 2 * small.num_divisions <= 150
    assert large.num_simulated <= FINALISTS
    assert large.best[0][1].step_s <= large.best[1][1].step_s


def test_best_layouts_fit_and_are_runs_that_train_takes():
    plan = planned(big_run(), GPUS, "qwen2.5-7b", prompt=512, response=600)
    found = search(plan, sheet_rates(DEVICES["H200"], "bfloat16"), top=3)
    assert len(found.best) == 3
    for candidate, _ in found.best:
        run = laid_on(plan.run, yaml.safe_load(yaml.safe_dump(candidate.tree)))
        assert run == candidate.run
        assert not any(fit.cannot for fit in fits(replace(plan, run=run)))


def test_command_prints_a_plan_and_writes_layouts(tmp_path, capsys):
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(json.loads(big_run().model_dump_json(include={"model", "roles"}))
                    | {"rl": {"algorithm": {"name": "grpo"}, "prompts_per_step": 16,
                              "sampling": {"max_new_tokens": 512}}}))  # fmt: skip
    out = tmp_path / "plans"
    words = ["--cluster", "8xH200", "--top", "1", "--price", "2", "--out", str(out)]
    assert main(["plan", str(file), "engine.gpus=1", "roles.actor.gpus=4", *words]) == 0
    printed = capsys.readouterr().out
    for figure in ("GPU-hours", "per million tokens at $2", "devices busy", "KV cache", "not known, assumed"):
        assert figure in printed
    assert main(["config", str(file), str(out / "plan-1.yaml")]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["engine"]["gpus"] >= 1
    assert main(["plan", str(file), "--top", "-1"]) == 2


def test_calibration_of_another_device_is_refused(tmp_path):
    file = tmp_path / "rates.json"
    file.write_text("{}")
    with pytest.raises(ValueError, match="is no calibration"):
        read_calibration(file, DEVICES["H200"], "bfloat16")
    names = (f for f in Rates.__dataclass_fields__ if f != "source")
    tree = {"device": "cpu", "dtype": "float32", "source": "x", "process_gib": {"actor": 0.5}}
    file.write_text(json.dumps(tree | {"rates": dict.fromkeys(names, 1.0)}))
    with pytest.raises(ValueError, match="measured on cpu in float32, the plan is for H200"):
        read_calibration(file, DEVICES["H200"], "bfloat16")
    rates, overheads = read_calibration(file, DEVICES["cpu"], "float32")
    assert rates.flops == 1.0
    assert overheads.process["actor"] == 2**29
