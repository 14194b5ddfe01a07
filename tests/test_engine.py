"""A real vLLM on the CPU against plain Transformers: what it samples, what it says of tokens, and how it
takes new weights."""

import asyncio
import os
from collections.abc import Coroutine, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from actors.engine import EngineWorker
from actors.weights.gloo import GlooSender
from actors.weights.wire import metas
from orchestrator.batch import Prompt, Rollout, StopReason
from orchestrator.config import EngineConfig
from orchestrator.roles import Sampling, WeightReceipt
from tests.models import byte_tokenizer, tiny_model

pytestmark = pytest.mark.e2e
T = TypeVar("T")
MAX_LENGTH = 256
EOS = 2
PROBE = torch.randint(3, 259, (150,), generator=torch.Generator().manual_seed(1)).tolist()


@dataclass
class Rig:
    """An engine, the sender beside it, and the model whose weights they should share."""

    loop: asyncio.AbstractEventLoop
    engine: EngineWorker
    sender: GlooSender
    actor: PreTrainedModel
    version: int = 0

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self.loop.run_until_complete(asyncio.wait_for(work, 60))

    async def sync(self) -> tuple[WeightReceipt, list[WeightReceipt]]:
        self.version += 1
        send = asyncio.to_thread(self.sender.send, self.actor.named_parameters(), self.version)
        receive = self.engine.receive_weights(self.version)
        sent, received = await asyncio.gather(send, receive, return_exceptions=True)
        for outcome in (received, sent):  # the sender only learns that somebody is gone
            if isinstance(outcome, BaseException):
                raise outcome
        assert self.engine.pulse().held  # until the commit it need not get on
        await self.engine.commit_weights(self.version)
        assert not self.engine.pulse().held
        return sent, received

    def generate(self, *, samples: int = 4, **sampling: float) -> list[Rollout]:
        seeds = list(range(100, 100 + samples))
        return self.run(self.engine.generate(prompt(), samples, draw(**sampling), seeds))

    @torch.no_grad()
    def step(self, scale: float = 0.02) -> None:
        """What a training step does to the weights."""
        for parameter in self.actor.parameters():
            parameter.add_(torch.randn(parameter.shape) * scale)

    @torch.no_grad()
    def truth(self, tokens: tuple[int, ...] | list[int], temperature: float = 1.0) -> torch.Tensor:
        """[T - 1] log p(tokens[t] | tokens[:t]) for t = 1, 2, ... by Transformers."""
        logits = self.actor(torch.tensor([tokens])).logits[0, :-1] / temperature
        return logits.log_softmax(-1).gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]


def prompt(length: int = 30) -> Prompt:
    return Prompt(uid="0/3", row=3, tokens=tuple(PROBE[:length]), text="", label=None)


def draw(*, temperature: float = 1.0, top_p: float = 1.0, max_new_tokens: int = 24) -> Sampling:
    return Sampling(temperature=temperature, top_p=top_p, max_new_tokens=max_new_tokens)


def start(folder: Path, *, tied: bool, tensor_parallel: int = 1) -> Iterator[Rig]:
    os.environ["HF_HUB_OFFLINE"] = "1"
    model = tiny_model(folder, tied=tied)
    loop = asyncio.new_event_loop()
    engine = EngineWorker(
        config=EngineConfig(tensor_parallel=tensor_parallel, kv_cache_mb=64),
        model=model,
        revision=None,
        dtype="float32",
        max_length=MAX_LENGTH,
        index=0,
        device="cpu",
        transport="gloo",
    )
    loop.run_until_complete(engine.start())
    actor = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    sender = GlooSender(rank=0, host="127.0.0.1", dtype=torch.float32, bucket_mb=1, timeout_s=20)
    rig = Rig(loop, engine, sender, actor)
    address = sender.open(metas(actor.named_parameters()), world_size=1 + tensor_parallel)
    rig.run(engine.join_weights(address, 1))
    pids = rig.run(engine.pids())
    yield rig
    rig.run(engine.close())
    assert pids and not any(psutil.pid_exists(pid) for pid in pids)
    loop.close()


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    yield from start(tmp_path_factory.mktemp("tied"), tied=True)


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    yield from start(tmp_path_factory.mktemp("untied"), tied=False)


@pytest.fixture(scope="module", params=["tied", "untied"])
def rig(request: pytest.FixtureRequest) -> Rig:
    return request.getfixturevalue(request.param)


def assert_close(said: list[float] | tuple[float, ...], truth: torch.Tensor) -> None:
    diff = (torch.tensor(said) - truth).abs()
    assert diff.mean() < 1e-4 and diff.max() < 1e-3, (diff.mean(), diff.max())


def test_after_a_sync_engine_and_actor_are_one_model(rig: Rig) -> None:
    """The last line fails for a tied model when ``receivers.refresh_embeddings`` is taken out: 0.2 nats off
    in the mean."""
    for _ in range(2):
        rig.step()
        sent, received = rig.run(rig.sync())
        assert [(r.version, r.who, r.num_bytes) for r in received] == [
            (rig.version, "engine 0 worker 0", sum(p.nbytes for p in rig.actor.parameters()))
        ]
        assert received[0].checksums == sent.checksums
        assert set(sent.checksums) == {name for name, _ in rig.actor.named_parameters()}
        assert_close(rig.run(rig.engine.logprobs(PROBE)), rig.truth(PROBE))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampled_log_probs_are_those_of_the_tempered_policy(rig: Rig, temperature: float) -> None:
    rig.step()
    rig.run(rig.sync())
    rollouts = rig.generate(temperature=temperature)
    assert [r.uid for r in rollouts] == ["0/3/0", "0/3/1", "0/3/2", "0/3/3"]
    for rollout in rollouts:
        assert set(rollout.versions[30:]) == {rig.version}
        assert rollout.tokens[:30] == prompt().tokens
        assert rollout.action_mask == (False,) * 30 + (True,) * (len(rollout.tokens) - 30)
        assert rollout.logprobs[:30] == (0.0,) * 30
        assert_close(rollout.logprobs[30:], rig.truth(rollout.tokens, temperature)[29:])


def test_a_seed_decides_the_sample(tied: Rig) -> None:
    first, again = tied.generate(), tied.generate()
    assert [r.tokens for r in first] == [r.tokens for r in again]
    assert len({r.tokens for r in first}) == 4


def test_temperature_zero_takes_the_likeliest_token(tied: Rig) -> None:
    rollout = tied.generate(samples=1, temperature=0, max_new_tokens=8)[0]
    with torch.no_grad():
        likeliest = tied.actor(torch.tensor([rollout.tokens])).logits[0].argmax(-1)
    assert rollout.tokens[30:] == tuple(likeliest[29:-1].tolist())


def test_the_end_of_sequence_token_is_kept_and_ends_the_rollout(tied: Rig) -> None:
    rollouts = tied.generate(samples=32, temperature=2.0, max_new_tokens=100)
    ended = [r for r in rollouts if r.stop is StopReason.EOS]
    assert ended
    for rollout in rollouts:
        response = rollout.tokens[30:]
        assert (EOS in response[:-1], response[-1] == EOS) == (False, rollout.stop is StopReason.EOS)
        assert (len(response) == 100) == (rollout.stop is StopReason.LENGTH) or rollout.stop is StopReason.EOS
        assert rollout.text == byte_tokenizer().decode([t for t in response if t > 2])


def test_a_prompt_leaves_room_or_is_refused(tied: Rig) -> None:
    long = Prompt(uid="0/9", row=9, tokens=(5,) * (MAX_LENGTH - 2), text="", label=None)
    rollout = tied.run(tied.engine.generate(long, 1, draw(temperature=0), [0]))[0]
    assert len(rollout.tokens) <= MAX_LENGTH
    full = Prompt(uid="0/9", row=9, tokens=(5,) * MAX_LENGTH, text="", label=None)
    with pytest.raises(ValueError, match="prompt 0/9 \\(row 9\\) has 256 tokens"):
        tied.run(tied.engine.generate(full, 1, draw(), [0]))


def test_prompts_that_do_not_fit_in_one_step_of_the_engine_are_sampled_as_alone(tied: Rig) -> None:
    """A prompt computed in parts would have vLLM rewind its seeded sampler, and kill a CPU engine."""
    rows = torch.randint(3, 259, (80, 200), generator=torch.Generator().manual_seed(2)).tolist()
    prompts = [
        Prompt(uid=f"0/{k}", row=k, tokens=tuple(row), text="", label=None) for k, row in enumerate(rows)
    ]

    async def ask(some: list[Prompt]) -> list[list[Rollout]]:
        return await asyncio.gather(
            *(tied.engine.generate(p, 1, draw(max_new_tokens=4), [p.row]) for p in some)
        )

    together = [group[0] for group in tied.run(ask(prompts))]
    assert len(together) == 80
    for rollout in together[-2:]:  # the last to be computed
        assert rollout.tokens == tied.run(ask([rollout.prompt]))[0][0].tokens
        assert_close(rollout.logprobs[200:], tied.truth(rollout.tokens)[199:])


def test_rollouts_in_flight_continue_under_the_new_weights_and_each_token_names_its_own(tied: Rig) -> None:
    """Each token's log-prob is that of the old model up to one point and of the new one from there, never a
    mixture: the keys and values of the old weights are gone."""

    async def overtake() -> list[Rollout]:
        flight = asyncio.create_task(
            tied.engine.generate(prompt(), 6, draw(max_new_tokens=220), list(range(6)))
        )
        await asyncio.sleep(0.1)
        tied.step()
        await tied.sync()
        return await flight

    tied.run(tied.sync())
    before, old = tied.version, {name: p.detach().clone() for name, p in tied.actor.named_parameters()}
    rollouts = tied.run(overtake())
    by_new = [tied.truth(r.tokens)[29:] for r in rollouts]
    synced = {name: p.detach().clone() for name, p in tied.actor.named_parameters()}
    tied.actor.load_state_dict(old, strict=False)
    by_old = [tied.truth(r.tokens)[29:] for r in rollouts]
    tied.actor.load_state_dict(synced, strict=False)
    for rollout, old_says, new_says in zip(rollouts, by_old, by_new, strict=True):
        is_old = torch.tensor(rollout.versions[30:]) == before
        said, expected = torch.tensor(rollout.logprobs[30:]), torch.where(is_old, old_says, new_says)
        assert ((said - expected).abs() < 1e-3).all()
        assert rollout.versions == (0,) * 30 + (before,) * int(is_old.sum()) + (before + 1,) * int(
            (~is_old).sum()
        )
    assert any(r.versions[30] == before and r.versions[-1] == before + 1 for r in rollouts)


def test_a_new_sender_takes_over_after_opening_again(tied: Rig) -> None:
    address = tied.sender.open(metas(tied.actor.named_parameters()), world_size=2)
    tied.run(tied.engine.join_weights(address, 1))
    tied.step()
    sent, received = tied.run(tied.sync())
    assert received[0].checksums == sent.checksums


@pytest.mark.slow
def test_a_failed_update_stops_the_engine_with_the_reason(tmp_path: Path) -> None:
    for rig in start(tmp_path, tied=False):
        most = [(name, p) for name, p in rig.actor.named_parameters() if name != "model.norm.weight"]
        address = rig.sender.open(metas(most), world_size=2)
        rig.run(rig.engine.join_weights(address, 1))
        rig.actor.named_parameters = partial(iter, most)
        with pytest.raises(Exception, match=r"left out .'model.norm.weight'"):
            rig.run(rig.sync())
        for work in (rig.engine.health(), rig.engine.logprobs(PROBE)):
            with pytest.raises(
                RuntimeError, match="engine 0 has no usable weights: update to version 1 failed"
            ):
                rig.run(work)

        del rig.actor.named_parameters  # a whole update makes it whole again
        rig.step()
        address = rig.sender.open(metas(rig.actor.named_parameters()), world_size=2)
        rig.run(rig.engine.join_weights(address, 1))
        rig.run(rig.sync())
        assert_close(rig.run(rig.engine.logprobs(PROBE)), rig.truth(PROBE))


@pytest.mark.slow
@pytest.mark.parametrize("is_tied", [True, False])
def test_two_workers_share_a_layer_and_both_receive(tmp_path: Path, is_tied: bool) -> None:
    for rig in start(tmp_path, tied=is_tied, tensor_parallel=2):
        assert len(rig.run(rig.engine.pids())) >= 3
        rig.step()
        sent, received = rig.run(rig.sync())
        assert [r.who for r in received] == ["engine 0 worker 0", "engine 0 worker 1"]
        assert all(r.checksums == sent.checksums for r in received)
        assert_close(rig.run(rig.engine.logprobs(PROBE)), rig.truth(PROBE))
        for rollout in rig.generate(temperature=0.7):
            assert_close(rollout.logprobs[30:], rig.truth(rollout.tokens, 0.7)[29:])
