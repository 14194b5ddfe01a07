"""Each phase alone on a real model: generation beside raw vLLM, prefix reuse, scoring, training; with floors.

The engine, the learner and the reference are the workers of a run, built in this process. Raw vLLM is the
same ``AsyncLLM`` asked directly, with prompts, seeds and lengths of the same kind: both sides in turn, so
that a busy machine slows both. Every response is forced to its full length.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig

from actors.actor import Actor
from actors.engine import CPU_BLOCK_TOKENS, EngineWorker
from actors.engine_params import drawing
from actors.reference import Reference
from launch.bench.result import Figure
from launch.bench.roofline import Ceilings, Shape, ceilings
from orchestrator.algorithms import grpo
from orchestrator.balance import plan
from orchestrator.batch import Experience, Minibatch, Prompt
from orchestrator.config import EngineConfig, Model, Optimizer
from orchestrator.roles import Sampling

LATENCY_TOKENS = 1  # of a response that measures the prompt alone


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What is measured on."""

    model: str
    dtype: str
    num_prompts: int = 16
    samples: int = 4
    prompt_tokens: int = 128
    response_tokens: int = 128
    rounds: int = 3
    threads: int = 1
    micro_batch_tokens: int = 4096

    @property
    def num_sequences(self) -> int:
        return self.num_prompts * self.samples

    @property
    def length(self) -> int:
        return self.prompt_tokens + self.response_tokens


def measure(work: Workload) -> list[Figure]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(work.threads)
    shape = Shape.of(AutoConfig.from_pretrained(work.model))
    bounds = ceilings(getattr(torch, work.dtype), device)
    figures = asyncio.run(_generation(work, shape, bounds, device))
    return figures + _training(work, shape, bounds)


def prompts(work: Workload, vocab: int, *, round_: int) -> list[Prompt]:
    """Random tokens, other ones in every round: no prefix is known from before."""
    generator = torch.Generator().manual_seed(round_)
    rows = torch.randint(0, vocab, (work.num_prompts, work.prompt_tokens), generator=generator)
    return [
        Prompt(uid=f"{round_}/{row}", row=row, tokens=tuple(tokens), text="", label=None)
        for row, tokens in enumerate(rows.tolist())
    ]


async def _generation(work: Workload, shape: Shape, bounds: Ceilings, device: torch.device) -> list[Figure]:
    on_gpu = device.type == "cuda"
    config = EngineConfig(gpus=int(on_gpu), threads=work.threads, kv_cache_mb=None if on_gpu else 1024)
    engine = EngineWorker(
        config=config, model=work.model, revision=None, dtype=work.dtype, max_length=work.length, index=0,
        device=device.type, transport="ipc" if on_gpu else "gloo",
    )  # fmt: skip
    await engine.start()
    engine._stop_ids = []  # nothing ends a response before its length
    ours, raw, groups, singles, paid = [], [], [], [], []
    try:
        await _ours(engine, work, prompts(work, shape.vocab, round_=0), work.samples, work.response_tokens)
        for round_ in range(1, 1 + work.rounds):
            fresh = [prompts(work, shape.vocab, round_=4 * round_ + k) for k in range(4)]
            ours.append((await _timed(_ours, engine, work, fresh[0], work.samples, work.response_tokens))[0])
            raw.append((await _timed(_raw, engine, work, fresh[1], work.samples, work.response_tokens))[0])
            seconds, computed = await _timed(_raw, engine, work, fresh[2], work.samples, LATENCY_TOKENS)
            groups.append(seconds)
            paid.append(computed / work.num_prompts / work.prompt_tokens)
            singles.append((await _timed(_raw, engine, work, fresh[3], 1, LATENCY_TOKENS))[0])
    finally:
        await engine.close()
    made = work.num_sequences * work.response_tokens
    context = work.prompt_tokens + work.response_tokens // 2
    item = getattr(torch, work.dtype).itemsize
    floor = bounds.decode_tokens_per_s(shape, batch=work.num_sequences, context=context, item=item)
    rates = [made / seconds for seconds in ours]
    return [
        Figure(name="generate/tokens_per_s", unit="1/s", better="higher", samples=rates),
        Figure(
            name="generate/of_raw_vllm", unit="of raw", better="higher",
            samples=[theirs / mine for mine, theirs in zip(ours, raw, strict=True)], target=">= 0.9",
        ),
        Figure(
            name="generate/of_roofline", unit="of the bound", better="higher",
            samples=[rate / floor for rate in rates],
            target=f"decoding cannot exceed {floor:.4g} tokens/s here",
        ),
        Figure(
            name="generate/prompts_of_a_group", unit="prompts", better="lower", samples=paid,
            target="" if on_gpu else f"{_paid(work):.3g}: once, and by each sibling what is behind the last "
            f"whole block of {CPU_BLOCK_TOKENS} tokens",
        ),
        Figure(
            name="generate/first_token_of_a_group", unit="of a single's", better="lower",
            samples=[group / single for group, single in zip(groups, singles, strict=True)],
            target=f"1; {work.samples} if nothing were shared. Each sibling is a request of its own to "
            "schedule and sample",
        ),
    ]  # fmt: skip


def _paid(work: Workload) -> float:
    """Prompts that a group computes at least: vLLM shares whole blocks, and always computes the last token.

    Example: 4 siblings of 128 tokens share 96 of them: 1 + 3 x 32 / 128 = 1.75; of 129, 1 + 3 / 129.
    """
    shared = (work.prompt_tokens - 1) // CPU_BLOCK_TOKENS * CPU_BLOCK_TOKENS
    return work.samples - (work.samples - 1) * shared / work.prompt_tokens


async def _timed(call: Callable[..., Awaitable[Any]], *arguments: Any) -> tuple[float, Any]:
    """Seconds, and the answer."""
    start = time.perf_counter()
    answer = await call(*arguments)
    return time.perf_counter() - start, answer


async def _ours(
    engine: EngineWorker, work: Workload, asked: Sequence[Prompt], samples: int, tokens: int
) -> None:
    sampling = Sampling(temperature=1.0, top_p=1.0, max_new_tokens=tokens)
    answers = await asyncio.gather(
        *(engine.generate(prompt, samples, sampling, [7 * k + 1 for k in range(samples)]) for prompt in asked)
    )
    lengths = {sum(rollout.action_mask) for answer in answers for rollout in answer}
    if lengths != {tokens}:
        raise RuntimeError(f"responses of {sorted(lengths)} tokens; {tokens} were asked for")


async def _raw(
    engine: EngineWorker, work: Workload, asked: Sequence[Prompt], samples: int, tokens: int
) -> int:
    """vLLM asked as its documentation does, one request per sample. Answers how many tokens of prompts it
    computed: the others were in its prefix cache."""
    sampling = Sampling(temperature=1.0, top_p=1.0, max_new_tokens=tokens)

    async def one(prompt: Prompt, k: int) -> int:
        params = drawing(sampling, 7 * k + 1, tokens, [])
        uid = f"raw/{prompt.uid}/{k}/{time.perf_counter_ns()}"
        computed = len(prompt.tokens)
        async for output in engine._llm.generate({"prompt_token_ids": list(prompt.tokens)}, params, uid):
            computed = len(prompt.tokens) - (output.num_cached_tokens or 0)
        return computed

    return sum(await asyncio.gather(*(one(prompt, k) for prompt in asked for k in range(samples))))


def experience(work: Workload, vocab: int) -> Experience:
    """Random sequences of full length, advantages of both signs."""
    generator = torch.Generator().manual_seed(0)
    rows, length = work.num_sequences, work.length
    mask = torch.ones(rows, length, dtype=torch.bool)
    action_mask = (torch.arange(length) >= work.prompt_tokens).expand(rows, length).clone()
    return Experience(
        tokens=torch.randint(0, vocab, (rows, length), generator=generator),
        attention_mask=mask,
        action_mask=action_mask,
        rollout_logprobs=torch.zeros(rows, length),
        old_logprobs=None,
        advantages=torch.randn(rows, 1, generator=generator) * action_mask,
        old_values=None,
        returns=None,
        ref_logprobs=None,
    )


def _training(work: Workload, shape: Shape, bounds: Ceilings) -> list[Figure]:
    records = experience(work, shape.vocab)
    shares = plan([work.length] * work.num_sequences, num_ranks=1, token_budget=work.micro_batch_tokens)[0]
    model = Model(path=work.model, dtype=work.dtype, max_length=work.length)  # type: ignore[arg-type]
    score = _score_seconds(model, records, shares, work)
    algorithm = grpo.CONFIG(kl_coef=0.0)
    actor = Actor(
        model=model, optimizer=Optimizer(learning_rate=1e-6), total_steps=1 + work.rounds,
        loss=algorithm.policy_loss, token_wise=algorithm.loss_is_token_wise,
    )  # fmt: skip
    _setup(actor, work)
    weights = records.action_mask / records.action_mask.sum()
    minibatch = Minibatch(records=records, rows=torch.arange(work.num_sequences), weights=weights)
    update = _seconds(lambda: actor.update(minibatch, shares), work.rounds)
    tokens = work.num_sequences * work.length
    done = {
        "score": tokens * shape.forward_flops(work.length),
        "train": tokens * shape.train_flops(work.length),
    }
    figures = []
    for name, seconds in (("score", score), ("train", update)):
        figures += [
            Figure(
                name=f"{name}/tokens_per_s", unit="1/s", better="higher",
                samples=[tokens / second for second in seconds],
            ),
            Figure(
                name=f"{name}/mfu", unit="of the matrix product", better="higher",
                samples=[done[name] / second / bounds.flops for second in seconds],
                target=f"1 is {bounds.flops:.4g} FLOP/s, measured here",
            ),
        ]  # fmt: skip
    return figures


def _score_seconds(
    model: Model, records: Experience, shares: Sequence[Sequence[int]], work: Workload
) -> list[float]:
    reference = Reference(model=model)
    _setup(reference, work)
    return _seconds(lambda: reference.score(records, shares), work.rounds)  # type: ignore[arg-type]


def _setup(worker: Actor | Reference, work: Workload) -> None:
    host, port = worker.rendezvous()
    worker.setup(0, 1, host, port, work.threads, 0, 600.0)


def _seconds(call: Callable[[], object], rounds: int) -> list[float]:
    """Of each call but a first."""
    seconds = []
    for _ in range(1 + rounds):
        start = time.perf_counter()
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return seconds[1:]
