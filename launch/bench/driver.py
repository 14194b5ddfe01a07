"""What the driver itself costs: the real loop over roles that answer at once, so all of a step is the driver.

Curves over prompts and engines, and the case that is held against a target: 1,024 sequences of 2,048 tokens,
as a share of the step they cannot be faster than, that of the smallest model anybody trains (Qwen2.5-0.5B) on
one H200 (ceilings measured there: 790 TFLOP/s, 4.3 TB/s). A larger model or a slower device makes the share
smaller.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

from actors.fleet import EngineFleet
from launch.bench.result import Figure
from launch.bench.roofline import Ceilings, Shape
from launch.bench.simulated import PROMPT_TOKENS, Here, JudgeHere, Service, SimulatedEngine, prompts, serving
from orchestrator.batch import Batch, ScoredRollout
from orchestrator.config import RL
from orchestrator.driver_state import DriverState
from orchestrator.ledger import Ledger
from orchestrator.loop import train
from orchestrator.publish import Probe
from orchestrator.roles import Metrics, Roles
from orchestrator.shaping import RunningStats

SAMPLES_PER_PROMPT = 4
PROMPTS = (64, 256, 1024, 4096)
ENGINES = (1, 16, 256)
RESPONSE_TOKENS = 128
STEPS = 4  # the first warms up
SIZES = {
    "prompts": PROMPTS, "engines": ENGINES, "samples": SAMPLES_PER_PROMPT, "response_tokens": RESPONSE_TOKENS,
    "steps": STEPS,
}  # fmt: skip
PROBE = Probe(tokens=(1, 2, 3), tolerance=1e-3)

QWEN_05B = Shape(hidden=896, inner=4864, layers=24, query=896, key=128, vocab=151936)
H200 = Ceilings(flops=790e12, bytes_per_s=4.3e12)


class Watch:
    """An observer that notes what each step took of this process, in seconds of CPU: others may be busy."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    async def started(self, step: int) -> None:
        self._last = time.process_time()

    async def stepped(
        self, state: DriverState, groups: Sequence[Sequence[ScoredRollout]], batch: Batch, metrics: Metrics
    ) -> None:
        now = time.process_time()
        self.seconds.append(now - self._last)
        self._last = now


def rl_of(num_prompts: int, steps: int, response_tokens: int) -> RL:
    """GRPO with a reference: the most roles that a step without a critic has."""
    return RL(
        algorithm={"name": "grpo", "kl_coef": 0.01},  # type: ignore[arg-type] - as a file says it
        steps=steps,
        prompts_per_step=num_prompts,
        samples_per_prompt=SAMPLES_PER_PROMPT,
        sampling={"max_new_tokens": response_tokens},  # type: ignore[arg-type]
    )


async def run(rl: RL, roles: Roles, watch: Watch) -> None:
    """The real loop."""
    start = DriverState(step=0, kl_coef=rl.algorithm.initial_kl_coef, rewards=RunningStats())
    ledger = Ledger(prompts(max(rl.prompts_per_step, 64)), seed=0)
    await train(rl, roles, ledger, observer=watch, probe=PROBE, start=start, seed=0, pad_id=0)


def driver_seconds(num_prompts: int, num_engines: int, response_tokens: int) -> list[float]:
    """Of each step but the first."""
    service = Service(response_tokens=response_tokens, distinct=False)
    rl, watch = rl_of(num_prompts, STEPS, response_tokens), Watch()

    async def measured() -> None:
        engine = serving(SimulatedEngine, service)
        fleet = EngineFleet([engine(index=index) for index in range(num_engines)], run_seed=0)
        roles = Roles(actor=Here(), engine=fleet, reward=JudgeHere(), reference=Here())
        await run(rl, roles, watch)

    asyncio.run(measured())
    return watch.seconds[1:]


def step_floor_s(num_sequences: int, response_tokens: int) -> float:
    """Decoding, old and reference log-probs, and the update, of Qwen2.5-0.5B on one H200."""
    length = PROMPT_TOKENS + response_tokens
    tokens = num_sequences * length
    context = PROMPT_TOKENS + response_tokens // 2
    decoding = H200.decode_tokens_per_s(QWEN_05B, batch=num_sequences, context=context, item=2)
    operations = tokens * (2 * QWEN_05B.forward_flops(length) + QWEN_05B.train_flops(length))
    return num_sequences * response_tokens / decoding + operations / H200.flops


def measure() -> list[Figure]:
    figures = [
        Figure(
            name=f"driver/step_s/{num_prompts}_prompts",
            unit="s",
            better="lower",
            samples=driver_seconds(num_prompts, 1, RESPONSE_TOKENS),
            at=("driver seconds a step by prompts (4 samples x 128 tokens)", num_prompts),
        )
        for num_prompts in PROMPTS
    ]
    figures += [
        Figure(
            name=f"driver/step_s/{num_engines}_engines",
            unit="s",
            better="lower",
            samples=driver_seconds(1024, num_engines, RESPONSE_TOKENS),
            at=("driver seconds a step by engines (1,024 prompts)", num_engines),
        )
        for num_engines in ENGINES
    ]
    seconds = driver_seconds(256, 1, 2048)
    floor = step_floor_s(1024, 2048)
    return [
        *figures,
        Figure(name="driver/step_s/1024x2048", unit="s", better="lower", samples=seconds),
        Figure(
            name="driver/share/1024x2048",
            unit="of the step",
            better="lower",
            samples=[second / (second + floor) for second in seconds],
            target=f"< 0.02, beside {floor:.1f} s that Qwen2.5-0.5B needs at least on an H200",
        ),
    ]
