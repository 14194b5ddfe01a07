"""Random ragged batches, and what it means to agree with a slow formula on them.

Responses of any length, none included, with tokens of the environment between actions, and NaN wherever there
is no action. float64 must agree to 1e-9, float32 to 1e-5, relative to the value, or to the inputs (about 1)
where terms cancel.
"""

import numpy as np
import torch

from orchestrator.batch import Batch, Experience
from tests.oracles import Sequence

SHAPES = [(1, 1), (2, 3), (7, 5), (30, 9), (60, 12)] * 10  # (rows, columns): 1,000 rows
LONG = [(4, 64), (4, 65), (4, 127), (4, 200)]  # around the blocks of the scan


class Case:
    """Columns of a random batch: numbers on the mask, NaN off it."""

    def __init__(self, rng, rows, columns, group_size=4, dtype=torch.float64):
        self.dtype = dtype
        density = rng.choice([0.0, 0.4, 0.8, 1.0], size=(rows, 1), p=[0.1, 0.3, 0.3, 0.3])
        self.mask = torch.tensor(rng.random((rows, columns)) < density)
        old = rng.normal(-1.5, 1.0, (rows, columns))
        self.old = self.column(old)
        self.logp = self.column(old + rng.normal(0, 0.3, old.shape))
        self.rollout = self.column(old + rng.normal(0, 0.5, old.shape))
        self.ref = self.column(old + rng.normal(0, 0.5, old.shape))
        self.values, self.new_values, self.adv, self.returns = (
            self.column(rng.normal(0, 1, old.shape)) for _ in range(4)
        )
        self.entropy = self.column(rng.random(old.shape))
        self.rewards = torch.tensor(rng.normal(0, 1, rows).astype("f4"), dtype=dtype)
        if rng.random() < 0.5:  # graded answers: ties and groups without signal
            self.rewards = (self.rewards > 0).to(dtype) * 0.1
        self.baselines = torch.tensor(rng.normal(0, 1, rows).astype("f4"), dtype=dtype)
        self.groups = ragged_groups(rng, rows, group_size)

    def column(self, array):
        exact = torch.tensor(array.astype("f4"), dtype=self.dtype)  # the same number in both types
        return exact.masked_fill(~self.mask, float("nan"))

    def batch(self):
        rewards = self.rewards.masked_fill(~self.mask.any(1), float("nan"))
        return Batch(
            tokens=torch.zeros_like(self.mask, dtype=torch.int64), attention_mask=self.mask | True,
            action_mask=self.mask, rollout_logprobs=self.rollout, rewards=rewards, groups=self.groups,
            versions=self.mask.long(), stopped=self.groups % 2 == 0, baselines=self.baselines,
        )  # fmt: skip

    def scores(self):
        return {"actor": self.old, "reference": self.ref, "critic": self.values}

    def experience(self, kl_coef):
        return Experience(
            tokens=torch.zeros_like(self.mask, dtype=torch.int64), attention_mask=self.mask | True,
            action_mask=self.mask, rollout_logprobs=self.rollout, old_logprobs=self.old,
            advantages=self.adv, old_values=self.values, returns=self.returns, ref_logprobs=self.ref,
            kl_coef=kl_coef,
        )  # fmt: skip

    def per_response(self):
        """The advantage of a response's first action, on all of them."""
        first = self.adv.nan_to_num().gather(1, self.mask.int().argmax(1, keepdim=True))
        self.adv = first.expand_as(self.adv).masked_fill(~self.mask, float("nan"))
        return self

    def sequences(self):
        columns = zip(
            *(rows(x, self.mask) for x in (
                self.logp, self.old, self.rollout, self.ref, self.values, self.entropy
            )), strict=True,
        )  # fmt: skip
        return [
            Sequence(int(group), float(reward), float(base), *lists)
            for group, reward, base, lists in zip(
                self.groups, self.rewards, self.baselines, columns, strict=True
            )
        ]


def ragged_groups(rng, rows, most):
    """[rows] numbers of groups of 1 to ``most``, in any order."""
    sizes = rng.integers(1, most + 1, rows)
    groups = np.repeat(np.arange(rows), sizes)[:rows]
    return torch.tensor(rng.permutation(groups))


def rows(column, mask):
    return [row[m].tolist() for row, m in zip(column.double(), mask, strict=True)]


def cases(shapes, dtype, seed=0, **options):
    rng = np.random.default_rng(seed)
    return [Case(rng, *size, dtype=dtype, **options) for size in shapes]


def agree(ours, mask, expected):
    """``expected`` has a list per row; off the mask there must be exactly 0."""
    ours = ours.detach()
    assert (ours[~mask] == 0).all()
    close(ours[mask], [x for row in expected for x in row])


def close(ours, expected):
    tolerance, floor = (1e-9, 1e-3) if ours.dtype is torch.float64 else (1e-5, 1.0)
    expected = torch.tensor(expected, dtype=torch.float64)
    assert ours.shape == expected.shape
    error = (ours.detach().double() - expected).abs() / expected.abs().clamp(min=floor)
    assert torch.isfinite(ours).all() and (error <= tolerance).all(), error.max()
