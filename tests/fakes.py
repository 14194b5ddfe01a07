"""Ten-line stand-ins for the roles, so that the loop runs without Ray, torch models or an engine."""

import asyncio
import random
from pathlib import Path

import torch

from orchestrator.batch import Prompt, Rollout, ScoredRollout, StopReason
from orchestrator.roles import WeightReceipt


def prompt(row: int = 0, uid: str | None = None) -> Prompt:
    return Prompt(uid=uid or f"0/{row}", row=row, tokens=(1, 2), text="a", label="b")


def rollout(p: Prompt, k: int = 0, *, version: int = 0, response: tuple[int, ...] = (5, 9)) -> Rollout:
    size = len(response)
    return Rollout(
        uid=f"{p.uid}/{k}", prompt=p, tokens=(*p.tokens, *response), text="b",
        action_mask=(*[False] * len(p.tokens), *[True] * size), stop=StopReason.EOS,
        logprobs=(*[0.0] * len(p.tokens), *[-1.0] * size),
        versions=(*[0] * len(p.tokens), *[version] * size),
    )  # fmt: skip


def length(response: str, prompt: str, label: str | None) -> float:
    """A reward function: a response of n characters earns n."""
    return float(len(response))


class Alive:
    """Health and close of a role that has nothing to check or end."""

    async def health(self):
        pass

    async def close(self):
        pass


class FakeEngine(Alive):
    """Answers after a random moment with the version it serves."""

    def __init__(self, checksum: int = 7):
        self.version, self.checksum, self.seen, self.temperatures = -1, checksum, [], []

    async def generate(self, p, num_samples, sampling):
        version = self.version
        self.seen.append(p.uid)
        self.temperatures.append(sampling.temperature)
        await asyncio.sleep(random.random() * 0.003)
        return [rollout(p, k, version=version) for k in range(num_samples)]

    async def prepare_weights(self, policy, version):
        sent = await policy.send_weights(version)
        return [
            (
                sent,
                WeightReceipt(version=version, checksums={"w": self.checksum}, who="engine 0", num_bytes=4),
            )
        ]

    async def commit_weights(self, version):
        self.version = version

    async def logprobs(self, tokens):
        return [[-1.0] * (len(tokens) - 1)]


class FakeReward(Alive):
    """Sample k of a prompt earns k; a greedy response 5."""

    async def score(self, rollouts):
        earned = [5.0 if "greedy" in r.uid else float(r.uid.rsplit("/")[-1]) for r in rollouts]
        return [ScoredRollout(rollout=r, reward=reward) for r, reward in zip(rollouts, earned, strict=True)]


class FakeLearner(Alive):
    """Counts its updates; its log-probs and values are all -1."""

    def __init__(self):
        self.updates, self.weights, self.scored, self.scored_early = 0, [], 0, 0

    async def score(self, batch):
        self.scored += 1
        return -torch.ones_like(batch.rollout_logprobs)

    async def score_rollouts(self, rollouts):
        self.scored_early += len(rollouts)
        return [-torch.ones(len(r.tokens)) for r in rollouts]

    async def distributions(self, batch):
        """Of a vocabulary of ten; a token t has the log-prob -t."""
        self.scored += 1
        return -torch.arange(10.0).expand(*batch.tokens.shape, 10) * batch.action_mask[..., None]

    async def update(self, minibatch):
        self.updates += 1
        self.weights.append(float(minibatch.weights.sum()))
        return {"loss": float(self.updates)}

    async def send_weights(self, version):
        return WeightReceipt(version=version, checksums={"w": 7}, who="actor rank 0", num_bytes=4)

    async def logprobs(self, tokens):
        return [-1.0] * (len(tokens) - 1)

    async def save(self, folder: Path, background=False):
        folder.mkdir(parents=True)
        (folder / "state").write_text(str(self.updates))

    async def saved(self, wait=False):
        return True

    async def load(self, folder: Path):
        self.updates = int((folder / "state").read_text())
