"""A real vLLM that is sent the actor's A and B only, against its merged weights in Transformers."""

import asyncio
import os
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from actors.actor import Actor
from actors.engine import EngineWorker
from actors.weights.wire import ServedAdapter
from orchestrator.config import Adapter, EngineConfig, Model, Optimizer
from orchestrator.publish import check_receipt
from tests.models import tiny_model
from tests.test_engine import MAX_LENGTH, PROBE, draw, prompt
from tests.test_workers import experience, minibatch, policy_gradient, ready

pytestmark = pytest.mark.e2e


def test_an_engine_that_is_sent_only_the_adapter_samples_from_the_actor(tmp_path: Path) -> None:
    """Rank 4 in vLLM's slot of rank 8; q, k and v as one layer there. Twice, over a cached prompt."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    path = tiny_model(tmp_path / "base", tied=True)
    model = Model(path=path, dtype="float32", adapter=Adapter(rank=4, alpha=12))
    actor = ready(
        Actor(model=model, optimizer=Optimizer(learning_rate=3e-2), total_steps=99, loss=policy_gradient)
    )
    layers = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    served = ServedAdapter(rank=4, alpha=12, layers=layers)
    engine = EngineWorker(
        config=EngineConfig(kv_cache_mb=64, receive="adapter"), model=path, revision=None, dtype="float32",
        max_length=MAX_LENGTH, index=0, device="cpu", transport="gloo", adapter=served,
    )  # fmt: skip
    address = actor.open_channel("gloo", "float32", 1, 2, 20, served)
    trained = [p for p in actor.backend.engine.module.parameters() if p.requires_grad]
    assert sum(torch.Size(meta.shape).numel() for meta in address.tensors) == sum(p.numel() for p in trained)

    async def sync(version: int) -> None:
        sent, received = await asyncio.gather(
            asyncio.to_thread(actor.send_weights, version), engine.receive_weights(version)
        )
        assert sent.num_bytes == 4 * sum(p.numel() for p in trained) and len(received) == 1
        check_receipt(sent, received[0])
        await engine.commit_weights(version)

    async def scenario() -> None:
        await engine.start()
        await engine.join_weights(address, 1)
        await sync(0)
        before = torch.tensor(await engine.logprobs(PROBE))
        base = AutoModelForCausalLM.from_pretrained(path)
        torch.testing.assert_close(before, truth(base), atol=1e-3, rtol=0)  # B is 0: the base
        for version in (1, 2):
            actor.update(minibatch(experience(torch.ones(3, 6))), [[0, 1, 2]])
            running = asyncio.create_task(engine.generate(prompt(), 2, draw(max_new_tokens=200), [1, 2]))
            await asyncio.sleep(0.05)
            await sync(version)
            engines = torch.tensor(await engine.logprobs(PROBE))
            torch.testing.assert_close(engines, torch.tensor(actor.logprobs(PROBE)), atol=1e-3, rtol=0)
            assert (engines - before).abs().mean() > 0.05
            actor.export(tmp_path / str(version))
            merged = AutoModelForCausalLM.from_pretrained(tmp_path / str(version))
            torch.testing.assert_close(engines, truth(merged), atol=1e-3, rtol=0)
            drawn_from = {v for rollout in await running for v in rollout.versions[30:]}
            assert drawn_from <= {version - 1, version}
            [rollout] = await engine.generate(prompt(), 1, draw(), [7])
            drawn = torch.tensor(rollout.logprobs[30:])
            torch.testing.assert_close(drawn, truth(merged, rollout.tokens)[29:], atol=1e-3, rtol=0)
            assert set(rollout.versions[30:]) == {version}
        await engine.close()

    asyncio.run(asyncio.wait_for(scenario(), 120))


@torch.no_grad()
def truth(model: torch.nn.Module, tokens: tuple[int, ...] = tuple(PROBE)) -> torch.Tensor:
    """[T - 1] log p(tokens[t] | tokens[:t]) for t = 1, 2, ... by Transformers."""
    logits = model.eval()(torch.tensor([tokens])).logits[0, :-1]
    return logits.log_softmax(-1).gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]
