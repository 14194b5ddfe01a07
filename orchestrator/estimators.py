"""Pure tensor functions that algorithms are made of: returns, advantages, whitening, masked means.

Tensor methods only, no torch import, so that the configuration tree that holds the algorithms loads in a
moment. ``mask`` is always the action mask, [B, T] bool. A value under a False mask never reaches a result,
whatever it is, NaN included (BUGS B1, C5).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

BLOCK = 64  # tokens that the scan takes at once: as wide as a matrix product is still cheap


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Scalar mean over the mask; 0 where nothing is masked in."""
    return values.where(mask, 0.0).sum() / mask.sum().clamp(min=1)


def whiten(values: Tensor, mask: Tensor, *, eps: float = 1e-8) -> Tensor:
    """[B, T] shifted and scaled to mean 0, biased variance 1 over the mask of the whole batch; 0 off the
    mask.

    The variance is the biased one, as in OpenRLHF; verl and SkyRL divide by n - 1. Equal values give exactly
    0, though their mean is rounded.
    """
    count = mask.sum().clamp(min=1)
    row = mask.any(1).int().argmax()
    first = values[row, mask[row].int().argmax()].nan_to_num()  # shifting by it is exact for equals
    centred = values.where(mask, first).sub_(first)
    centred = centred.sub_(centred.sum() / count).where(mask, 0.0)
    squares = (centred[:, None] @ centred[:, :, None]).sum()  # by rows: one pass, and no sum of millions
    return centred.mul_((squares / count + eps).rsqrt())


def token_rewards(rewards: Tensor, token_penalty: Tensor, mask: Tensor) -> Tensor:
    """[B] sequence rewards on the last action token, minus a [B, T] penalty on every action token.

    A sequence without action tokens gets none (FAULTS 23).
    """
    T = mask.shape[1]
    last = T - 1 - mask.flip(1).int().argmax(1)
    here = mask.any(1)
    placed = -token_penalty.where(mask, 0.0)
    return placed.scatter_add(1, last[:, None], rewards.to(placed.dtype).where(here, 0.0)[:, None])


def gae(rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (arXiv:1506.02438 eq. 16) -> (advantages, returns), [B, T], 0 off the
    mask.

    delta_t = r_t + gamma V_{t+1} - V_t;  A_t = delta_t + gamma lam A_{t+1};  returns = A + V.
    The step after an action is the next *action*: tokens that the policy did not choose, between two turns,
    are skipped and not counted as steps (BUGS B2; OpenRLHF decays once for each of them). The value after the
    last action is 0: a sequence is an episode, also one that was cut at max_new_tokens.

    lam = 1 is the Monte Carlo return minus the value, lam = 0 the one-step TD error.
    """
    rewards, values = rewards.where(mask, 0.0), values.where(mask, 0.0)
    if _has_gaps(mask):
        packing = Packing(mask)
        packed = _gae(packing.pack(rewards), packing.pack(values), gamma, lam)
        advantages = packing.unpack(packed)
    else:
        advantages = _gae(rewards, values, gamma, lam).where(mask, 0.0)
    return advantages, advantages + values


def returns_to_go(rewards: Tensor, mask: Tensor, *, gamma: float) -> Tensor:
    """[B, T] discounted sum of the rewards from each action on, 0 off the mask; other tokens are skipped and
    not counted as steps."""
    return gae(rewards, rewards.new_zeros(rewards.shape), mask, gamma=gamma, lam=1.0)[0]


def _gae(rewards: Tensor, values: Tensor, gamma: float, lam: float) -> Tensor:
    """Where each action follows the one before it, and all is 0 after the last."""
    deltas = rewards - values
    deltas[:, :-1].add_(values[:, 1:], alpha=gamma)
    return discounted_sums(deltas, gamma * lam)


def discounted_sums(values: Tensor, decay: float) -> Tensor:
    """[B, T]: sum over s >= t of decay^(s - t) values_s.

    By blocks of time: a product with the matrix of powers inside each block, then one step per block that
    carries the sum of what is behind it.
    """
    B, T = values.shape
    num_blocks = -(-T // BLOCK)
    padded = values
    if T % BLOCK:
        padded = values.new_zeros(B, num_blocks * BLOCK)
        padded[:, :T] = values
    place = values.new_ones(BLOCK).cumsum(0) - 1
    distance = place[:, None] - place[None, :]
    powers = (decay ** distance.clamp(min=0)).where(distance >= 0, 0.0)
    within = (padded.reshape(-1, BLOCK) @ powers).view(B, num_blocks, BLOCK)
    behind = values.new_zeros(B, num_blocks)  # the sum from the first token of the next block on
    for block in reversed(range(num_blocks - 1)):
        behind[:, block] = within[:, block + 1, 0] + decay**BLOCK * behind[:, block + 1]
    within.addcmul_(behind[:, :, None], decay ** (BLOCK - place))
    return within.view(B, -1)[:, :T]


def _has_gaps(mask: Tensor) -> bool:
    """Whether in some row a token that is no action lies between two actions."""
    starts = (mask[:, 1:] & ~mask[:, :-1]).sum(1) + mask[:, 0]
    return bool((starts > 1).any())


class Packing:
    """Where each action of [B, T] stands in [B, A] when those of a row are side by side at its front; A the
    most of any row. By flat indices: they are made once and serve both ways."""

    def __init__(self, mask: Tensor) -> None:
        lengths = mask.sum(1, keepdim=True)
        columns = lengths.new_ones(1, max(1, int(lengths.max()))).cumsum(1)
        in_front = columns <= lengths
        self._shape, self._packed_shape = mask.shape, in_front.shape
        self._place, self._packed_place = mask.flatten().nonzero()[:, 0], in_front.flatten().nonzero()[:, 0]

    def pack(self, values: Tensor) -> Tensor:
        """[B, T] -> [B, A]: the actions' values, 0 behind them."""
        return self._move(values, self._place, self._packed_place, self._packed_shape)

    def unpack(self, packed: Tensor) -> Tensor:
        """[B, A] -> [B, T], 0 off the mask."""
        return self._move(packed, self._packed_place, self._place, self._shape)

    @staticmethod
    def _move(values: Tensor, source: Tensor, target: Tensor, shape: tuple[int, ...]) -> Tensor:
        moved = values.new_zeros(shape)
        moved.view(-1).index_copy_(0, target, values.flatten().index_select(0, source))
        return moved


def group_sums(values: Tensor, groups: Tensor) -> Tensor:
    """[B] -> [B]: each row gets the sum over its group."""
    num_groups = int(groups.max()) + 1 if len(groups) else 0
    return values.new_zeros(num_groups).index_add(0, groups, values)[groups]


def flat_groups(rewards: Tensor, groups: Tensor, valid: Tensor) -> Tensor:
    """[B] bool: whether the valid rewards of the row's group are all equal; they carry no signal."""
    num_groups = int(groups.max()) + 1 if len(groups) else 0
    infinite = rewards.new_full((num_groups,), float("inf"))
    low = infinite.scatter_reduce(0, groups, rewards.where(valid, float("inf")), "amin")
    high = (-infinite).scatter_reduce(0, groups, rewards.where(valid, -float("inf")), "amax")
    return (low >= high)[groups]


def group_best(rewards: Tensor, groups: Tensor, valid: Tensor) -> Tensor:
    """[B] bool: whether the row has the highest reward of the valid ones in its group."""
    num_groups = int(groups.max()) + 1 if len(groups) else 0
    lowest = rewards.new_full((num_groups,), -float("inf"))
    high = lowest.scatter_reduce(0, groups, rewards.where(valid, -float("inf")), "amax")
    return valid & (rewards == high[groups])


def group_first(among: Tensor, groups: Tensor) -> Tensor:
    """[B] bool: whether the row is the first of its group that is ``among`` them."""
    B = len(groups)
    if not B:
        return among
    place = groups.new_ones(B).cumsum(0) - 1
    nobody = groups.new_full((int(groups.max()) + 1,), B)
    first = nobody.scatter_reduce(0, groups, place.where(among, B), "amin")
    return among & (place == first[groups])


def group_centred(rewards: Tensor, groups: Tensor, valid: Tensor, *, leave_one_out: bool = False) -> Tensor:
    """[B] reward minus the mean of its group, or of the others in its group (RLOO, arXiv:2402.14740 eq. 9).

    ``valid`` [B] leaves sequences without action tokens out of the statistics (OpenRLHF#1239 lets them shift
    the baseline); they get 0. A group of one, or of equals, gets exactly 0: never NaN (BUGS B8), and not its
    raw reward as in verl.
    """
    size = group_sums(valid.to(rewards.dtype), groups)
    centred = rewards - group_sums(rewards.where(valid, 0.0), groups) / size.clamp(min=1)
    if leave_one_out:  # r - (S - r) / (n - 1) = (r - S / n) * n / (n - 1)
        centred = centred * size / (size - 1).clamp(min=1)
    return centred.where(valid & ~flat_groups(rewards, groups, valid), 0.0)


def group_normalised(rewards: Tensor, groups: Tensor, valid: Tensor, *, eps: float) -> Tensor:
    """[B] ``group_centred`` divided by the group's unbiased standard deviation plus ``eps`` (GRPO,
    arXiv:2402.03300 section 4.1.2)."""
    centred = group_centred(rewards, groups, valid)
    others = (group_sums(valid.to(rewards.dtype), groups) - 1).clamp(min=1)
    return centred / ((group_sums(centred.square(), groups) / others).sqrt() + eps)
