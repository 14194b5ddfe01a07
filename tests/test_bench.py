"""What the benchmarks count and say: floors by hand, changes beyond the noise, and the simulated loop."""

import json
from dataclasses import replace
from importlib import metadata

import pytest
import torch

from launch.bench import driver, main, phases, result
from launch.bench.result import Figure, compare
from launch.bench.roofline import Ceilings, Shape
from launch.bench.scaling import ideal_s
from launch.bench.simulated import Service, SimulatedEngine, prompts, serving
from launch.cli import main as quartet
from orchestrator.collate import pad
from orchestrator.roles import Sampling

SMALL = Shape(hidden=4, inner=6, layers=2, query=4, key=2, vocab=10)


def test_operations_and_bytes_of_a_small_model_by_hand():
    # a layer: 4 x (4 + 2 + 2) + 4 x 4 attention, 3 x 4 x 6 MLP = 120; two of them and a head of 4 x 10
    assert SMALL.multiplied == 280
    assert SMALL.forward_flops(5) == 2 * 280 + 2 * 2 * 4 * 5
    assert SMALL.train_flops(5) == 3 * 640
    # weights in 2 bytes, and 2 x 2 layers x 2 numbers x 2 bytes of each of 3 x (7 + 1) cached tokens
    assert SMALL.decode_bytes(batch=3, context=7, item=2) == 560 + 24 * 16


def test_decoding_is_bound_by_the_slower_of_memory_and_compute():
    fast, slow = 1e12, 944.0
    by_memory = Ceilings(flops=fast, bytes_per_s=slow)  # 944 bytes: one step a second
    assert by_memory.decode_tokens_per_s(SMALL, batch=3, context=7, item=2) == pytest.approx(3)
    by_compute = Ceilings(flops=3 * (560 + 4 * 2 * 4 * 7), bytes_per_s=fast)
    assert by_compute.decode_tokens_per_s(SMALL, batch=3, context=7, item=2) == pytest.approx(3)


def test_the_shape_of_qwen_has_its_published_number_of_parameters():
    qwen = driver.QWEN_05B
    biases_and_norms = qwen.layers * (qwen.query + 2 * qwen.key + 2 * qwen.hidden) + qwen.hidden
    assert qwen.multiplied + biases_and_norms == 494_032_768  # tied: the head is the embedding


def test_prompts_that_a_group_pays_by_hand():
    """Blocks of 32: of 128 tokens 96 are shared and 3 of 4 siblings compute 32 each; of 129, one token."""
    work = phases.Workload(model="m", dtype="float32", samples=4, prompt_tokens=128)
    assert phases._paid(work) == pytest.approx((128 + 3 * 32) / 128)
    assert phases._paid(replace(work, prompt_tokens=129)) == pytest.approx((129 + 3) / 129)
    assert phases._paid(replace(work, prompt_tokens=20)) == 4  # no whole block


def figure(name, samples, better="higher"):
    return Figure(name=name, unit="1/s", better=better, samples=samples)


@pytest.mark.parametrize(
    ("before", "after", "better", "verdict"),
    [
        ([10, 11, 12], [13, 14, 15], "higher", "better"),
        ([10, 11, 12], [13, 14, 15], "lower", "worse"),
        ([10, 11, 12], [13, 14, 15], "neither", "changed"),
        ([10, 11, 12], [12, 14, 15], "higher", "same"),  # they touch
        ([10.0, 10.1], [10.2, 10.3], "higher", "same"),  # apart, but by 2 %
        ([10], [20], "higher", "same"),  # one sample has no noise to be beyond
    ],
)
def test_a_change_is_one_when_it_is_more_than_the_noise(before, after, better, verdict):
    (change,) = compare([figure("a", before, better)], [figure("a", after, better), figure("b", [1, 2])])
    assert change.verdict == verdict


def test_result_files_keep_other_figures_and_are_compared_by_the_command(tmp_path, capsys):
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    small, here = {"prompts": (1, 2)}, {"cpu": "c", "load_before": 0.1}
    result.write(old, "x", [figure("a", [1.0, 1.1]), figure("b", [5.0])], config=small, machine=here)
    result.write(new, "x", [figure("a", [2.0, 2.2])], config=small, machine=here | {"load_before": 2.0})
    point = Figure(name="p", unit="s", better="lower", samples=[3.0], at=("t", 1))
    result.write(new, "y", [point], config={}, machine={"cpu": "d"})
    assert set(json.loads(new.read_text())["figures"]) == {"a", "p"}
    suites = result.conditions(new)
    assert {name: suite["machine"]["cpu"] for name, suite in suites.items()} == {"x": "c", "y": "d"}
    assert suites["x"]["versions"]["torch"] == metadata.version("torch")
    assert main.main(["compare", str(old), str(new)]) == 0
    said = capsys.readouterr().out
    assert "| a | 1.05 | 2.1 | 2.000 | better |" in said and "Not measured alike" not in said
    result.write(new, "x", [figure("a", [2.0, 2.2])], config={"prompts": (1, 3)}, machine={"cpu": "d"})
    assert main.main(["compare", str(old), str(new)]) == 0
    said = capsys.readouterr().out
    assert "- x: machine.cpu c, then d\n- x: config.prompts [1, 2], then [1, 3]\n" in said
    assert main.main(["table", str(new)]) == 0
    assert "| p | 3 | 3 – 3 | s |  |" in new.with_suffix(".md").read_text()
    assert "<polyline" in new.with_suffix(".svg").read_text()
    (tmp_path / "no.json").write_text("{}")
    assert quartet(["bench", "compare", str(tmp_path / "no.json"), str(new)]) == 2
    assert "is no result of `quartet bench`" in capsys.readouterr().err
    assert quartet(["bench", "drive"]) == 2
    assert "unknown suite 'drive'" in capsys.readouterr().err


def test_the_driver_is_measured_over_the_real_loop(monkeypatch):
    monkeypatch.setattr(driver, "STEPS", 2)
    seconds = driver.driver_seconds(num_prompts=8, num_engines=3, response_tokens=16)
    assert len(seconds) == 1 and 0 < seconds[0] < 5


async def test_a_simulated_engine_takes_its_time_slot_by_slot():
    engine = serving(SimulatedEngine, Service(response_tokens=3, slots=2))(index=0)
    sampling = Sampling(temperature=1.0, top_p=1.0, max_new_tokens=3)
    await engine.receive_weights(4)
    first, second = await engine.generate(prompts(1)[0], 2, sampling, [1, 2])
    assert first.tokens[-3:] == (1, 2, 3) and second.tokens[-3:] == (2, 3, 4)
    assert sum(first.action_mask) == 3 and set(first.versions[-3:]) == {4}
    assert ideal_s(17, 1) == 5 * 0.25 + 0.05  # four groups at a time


def test_padding_keeps_every_number_and_rounds_as_torch_does():
    rows = [(0.1, -2.5), (), (1e-40, 3.4e38, 7.0)]
    expected = torch.tensor([[0.1, -2.5, 9.0], [9.0] * 3, [1e-40, 3.4e38, 7.0]], dtype=torch.float32)
    assert torch.equal(pad(rows, 9.0, torch.float32), expected)
    assert pad([[2**40, -1], [3]], 5, torch.int64).tolist() == [[2**40, -1], [3, 5]]
    assert pad([[True], [False, True]], False, torch.bool).tolist() == [[True, False], [False, True]]
