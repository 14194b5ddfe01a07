"""Slow formulas, each written from its paper: Python floats, one sequence, group or batch at a time.

Nothing of orchestrator/ is used but the names of settings. A sequence is the list of its action tokens, so
masks, padding and gaps do not exist here. ``at`` is where a quantity without a gradient was computed: the
same tokens, held still while a finite difference moves ``logp``.
"""

from collections import defaultdict
from dataclasses import dataclass
from math import exp, fsum, sqrt
from statistics import fmean, stdev


@dataclass
class Sequence:
    """One response; every list has one entry per action token."""

    group: int
    reward: float
    baseline: float
    logp: list[float]
    old: list[float]
    rollout: list[float]
    ref: list[float]
    values: list[float]
    entropy: list[float]


def gae(rewards, values, gamma, lam):
    """arXiv:1506.02438 eq. 11, 16: A_t = sum over l of (gamma lam)^l delta_{t+l}."""
    n, after = len(rewards), [*values[1:], 0.0]
    deltas = [rewards[t] + gamma * after[t] - values[t] for t in range(n)]
    return [fsum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, n)) for t in range(n)]


def returns_to_go(rewards, gamma):
    n = len(rewards)
    return [fsum(gamma ** (k - t) * rewards[k] for k in range(t, n)) for t in range(n)]


def token_rewards(reward, penalties):
    return [-p + (reward if t == len(penalties) - 1 else 0.0) for t, p in enumerate(penalties)]


def whiten(rows, eps=1e-8):
    """Mean 0, biased variance 1 over the tokens of all rows."""
    tokens = [x for row in rows for x in row]
    if not tokens or min(tokens) == max(tokens):
        return [[0.0] * len(row) for row in rows]
    mean = fsum(tokens) / len(tokens)
    variance = fsum((x - mean) ** 2 for x in tokens) / len(tokens)
    return [[(x - mean) / sqrt(variance + eps) for x in row] for row in rows]


def centred(rewards):
    if min(rewards) == max(rewards):
        return [0.0] * len(rewards)
    return [r - fmean(rewards) for r in rewards]


def leave_one_out(rewards):
    """arXiv:2402.14740 eq. 9; a sample without siblings gets nothing."""
    if len(rewards) == 1 or min(rewards) == max(rewards):
        return [0.0] * len(rewards)
    return [r - fmean(rewards[:i] + rewards[i + 1 :]) for i, r in enumerate(rewards)]


def normalised(rewards, eps):
    """arXiv:2402.03300 section 4.1.2, with the unbiased deviation."""
    if len(rewards) == 1 or min(rewards) == max(rewards):
        return [0.0] * len(rewards)
    return [(r - fmean(rewards)) / (stdev(rewards) + eps) for r in rewards]


def kl_estimate(p, q, estimator):
    """joschu.net/blog/kl-approx.html, with r = q / p."""
    log_r = q - p
    return {"k1": -log_r, "k2": log_r**2 / 2, "k3": (exp(log_r) - 1) - log_r}[estimator]


def full_kl(p, q):
    return fsum(exp(a) * (a - b) for a, b in zip(p, q, strict=True))


def proportional(coef, measured, n, target, horizon):
    """arXiv:1909.08593 section 2.2, with K = n / horizon."""
    error = measured / target - 1
    error = 0.2 if error > 0.2 else -0.2 if error < -0.2 else error
    return coef * (1 + error * n / horizon)


def doubling(coef, measured, target):
    """arXiv:1707.06347 section 4."""
    if measured < target / 1.5:
        coef = coef / 2
    if measured > target * 1.5:
        coef = coef * 2
    return coef


def correction(seq, rule, low, high):
    """The rules of corrections.py, one token after the other."""
    weights = [exp(a - b) for a, b in zip(seq.old, seq.rollout, strict=True)]
    if not weights:
        return []
    geometric = exp(fmean(a - b for a, b in zip(seq.old, seq.rollout, strict=True)))
    return {
        "none": lambda: [1.0] * len(weights),
        "token": lambda: [min(w, high) for w in weights],
        "token_both": lambda: [max(low, min(w, high)) for w in weights],
        "sequence": lambda: [min(geometric, high)] * len(weights),
        "icepop": lambda: [w if low <= w <= high else 0.0 for w in weights],
        "sequence_mask": lambda: [w if low <= geometric <= high else 0.0 for w in weights],
    }[rule]()


def by_group(seqs, compare, rewards):
    """[B] what ``compare`` makes of each group's rewards; 0 for a response without tokens, left out."""
    groups = defaultdict(list)
    for i, seq in enumerate(seqs):
        if seq.logp:
            groups[seq.group].append(i)
    out = [0.0] * len(seqs)
    for rows in groups.values():
        for i, value in zip(rows, compare([rewards[i] for i in rows]), strict=True):
            out[i] = value
    return out


COMPARE = {
    "grpo": lambda c: lambda r: normalised(r, c.std_eps) if c.divide_by_std else centred(r),
    "dapo": lambda c: lambda r: normalised(r, c.std_eps),
    "gspo": lambda c: lambda r: normalised(r, c.std_eps),
    "gmpo": lambda c: lambda r: normalised(r, c.std_eps),
    "cispo": lambda c: lambda r: normalised(r, c.std_eps),
    "sapo": lambda c: lambda r: normalised(r, c.std_eps),
    "dr_grpo": lambda c: centred,
    "rloo": lambda c: leave_one_out,
    "reinforce_pp_baseline": lambda c: centred,
    "best_of_n": lambda c: lambda r: [len(r) / r.count(max(r)) if x == max(r) > min(r) else 0.0 for x in r],
}


def advantages(name, c, seqs, kl_coef):
    """[B] lists: what each action was worth; and the critic's targets, or None."""
    penalties = [[0.0] * len(s.logp) for s in seqs]
    if c.kl_coef > 0 and c.kl_in == "reward":
        penalties = [
            [kl_coef * kl_estimate(p, q, c.kl_estimator) for p, q in zip(s.old, s.ref, strict=True)]
            for s in seqs
        ]
    if name in COMPARE:
        totals = [s.reward - fsum(p) for s, p in zip(seqs, penalties, strict=True)]
        scalars = by_group(seqs, COMPARE[name](c), totals)
        rows = [[x] * len(s.logp) for x, s in zip(scalars, seqs, strict=True)]
        if name == "reinforce_pp_baseline":  # the shift of the batch spares groups without signal
            silent = by_group(seqs, lambda r: [float(min(r) == max(r))] * len(r), totals)
            rows = [[0.0] * len(w) if s else w for w, s in zip(whiten(rows), silent, strict=True)]
        return rows, None
    if name == "online_dpo":
        sides = pair_sides(seqs, [s.reward - fsum(p) for s, p in zip(seqs, penalties, strict=True)])
        return [[x] * len(s.logp) for x, s in zip(sides, seqs, strict=True)], None
    placed = [token_rewards(s.reward, p) for s, p in zip(seqs, penalties, strict=True)]
    if name == "ppo":
        rows = [gae(r, s.values, c.gamma, c.gae_lambda) for r, s in zip(placed, seqs, strict=True)]
        targets = [
            [a + v for a, v in zip(row, s.values, strict=True)] for row, s in zip(rows, seqs, strict=True)
        ]
        return (whiten(rows) if c.whiten_advantages else rows), targets
    if name == "remax":
        placed = [token_rewards(s.reward - s.baseline, p) for s, p in zip(seqs, penalties, strict=True)]
        return [returns_to_go(r, 1.0) for r in placed], None
    rows = [returns_to_go(r, c.gamma) for r in placed]
    if name == "reinforce_pp":
        return whiten(rows), None
    assert name == "reinforce", f"write the oracle of {name}"
    tokens = [x for row in rows for x in row]
    mean = fmean(tokens) if tokens and c.baseline == "batch" else 0.0
    return [[x - mean for x in row] for row in rows], None


def pair_sides(seqs, rewards):
    """1 for the best response of each prompt, -1 for its worst, 0 for others; of equals the likeliest."""
    sides = [0.0] * len(seqs)
    for group in {s.group for s in seqs}:
        rows = [i for i, s in enumerate(seqs) if s.group == group and s.logp]
        if len({rewards[i] for i in rows}) > 1:
            sides[max(rows, key=lambda i: (rewards[i], fsum(seqs[i].rollout)))] = 1.0
            sides[min(rows, key=lambda i: (rewards[i], -fsum(seqs[i].rollout)))] = -1.0
    return sides


def clip(x, low, high):
    return min(max(x, low), high)


def ppo_clip(ratio, a, low, high):
    """arXiv:1707.06347 eq. 7, as a loss."""
    return -min(ratio * a, clip(ratio, 1 - low, 1 + high) * a)


def surrogate(name, c, logp, old, adv, at):  # noqa: C901, PLR0911 - one branch per paper
    """[n] loss of each token."""
    n = len(logp)
    logr = [p - q for p, q in zip(logp, old, strict=True)]
    ratio = [exp(x) for x in logr]
    still = [exp(p - q) for p, q in zip(at, old, strict=True)]
    if n == 0:
        return []
    if name == "gspo":
        s, s_still = exp(fmean(logr)), exp(fmean(p - q for p, q in zip(at, old, strict=True)))
        tokens = [s] * n
        if c.token_form:  # eq. 13: s_t = sg[s] p / sg[p]
            tokens = [s_still * exp(p - q) for p, q in zip(logp, at, strict=True)]
        return [ppo_clip(x, a, c.clip_low, c.clip_high) for x, a in zip(tokens, adv, strict=True)]
    if name == "gmpo":  # arXiv:2507.20673, algorithm 1
        sign = 1 if adv[0] > 0 else -1
        low, high = (-c.clip_low, c.clip_high) if sign > 0 else (-c.clip_high, c.clip_low)
        signed = [min(sign * x, clip(sign * x, low, high)) for x in logr]
        mean = exp(fmean(sign * x for x in signed))
        return [-mean * a for a in adv]
    if name == "cispo":
        return [
            -clip(w, 1 - c.clip_low, 1 + c.clip_high) * a * p
            for w, a, p in zip(still, adv, logp, strict=True)
        ]
    if name == "best_of_n":  # arXiv:2304.06767: the likelihood of the best
        return [-a * p for a, p in zip(adv, logp, strict=True)]
    if name == "sapo":
        taus = [c.tau_positive if a > 0 else c.tau_negative for a in adv]
        return [-4 / tau / (1 + exp(-tau * (r - 1))) * a for r, a, tau in zip(ratio, adv, taus, strict=True)]
    plain = [-r * a for r, a in zip(ratio, adv, strict=True)]
    if name == "reinforce" or (name == "ppo" and c.objective == "policy_gradient"):
        return plain
    if name == "ppo" and c.objective == "penalty":
        raise ValueError("its coefficient is the controller's: see penalty")
    losses = [ppo_clip(r, a, c.clip_low, c.clip_high) for r, a in zip(ratio, adv, strict=True)]
    if name == "ppo" and c.dual_clip is not None:  # arXiv:1912.09729 eq. 5
        losses = [min(loss, -c.dual_clip * a) if a < 0 else loss for loss, a in zip(losses, adv, strict=True)]
    return losses


def penalty(logp, old, adv, beta):
    """arXiv:1707.06347 eq. 8; KL(old || new) from samples of old, by the k3 of its own direction."""
    return [-exp(p - q) * a + beta * kl_estimate(q, p, "k3") for p, q, a in zip(logp, old, adv, strict=True)]


def policy_loss(name, c, seq, adv, kl_coef, at=None):
    """[n] loss of each token with everything around the surrogate."""
    at = seq.logp if at is None else at
    if name == "ppo" and c.objective == "penalty":
        losses, kl_coef = penalty(seq.logp, seq.old, adv, kl_coef), c.kl_coef
    else:
        losses = surrogate(name, c, seq.logp, seq.old, adv, at)
    weights = correction(seq, c.correction.rule, c.correction.low, c.correction.high)
    losses = [w * x for w, x in zip(weights, losses, strict=True)]
    if c.kl_coef > 0 and c.kl_in == "loss":
        for t in range(len(losses)):
            drift = kl_estimate(seq.logp[t], seq.ref[t], c.kl_estimator)
            if c.kl_weighted:  # k2's weight has no gradient: that of its square is the KL's already
                mover = at if c.kl_estimator == "k2" else seq.logp
                drift *= exp(mover[t] - seq.old[t])
            losses[t] += kl_coef * drift
    if c.entropy_coef:
        losses = [x - c.entropy_coef * h for x, h in zip(losses, seq.entropy, strict=True)]
    return losses


def value_loss(values, old, returns, bound):
    losses = []
    for v, o, target in zip(values, old, returns, strict=True):
        worst = (v - target) ** 2
        if bound is not None:
            worst = max(worst, (o + clip(v - o, -bound, bound) - target) ** 2)
        losses.append(worst / 2)
    return losses


def token_weight(aggregate, lengths, row, constant_length):
    """What one token of a row weighs in the loss of the step."""
    sequences = sum(1 for n in lengths if n)
    return {
        "token_mean": lambda: 1 / sum(lengths),
        "sequence_mean": lambda: 1 / (sequences * lengths[row]),
        "constant_length": lambda: 1 / (sequences * constant_length),
    }[aggregate]()


def running(rewards):
    """Mean and unbiased deviation of all rewards ever seen; 1 where there is nothing to divide by."""
    spread = stdev(rewards) if len(rewards) > 1 else 0.0
    return (fmean(rewards) if rewards else 0.0), (spread or 1.0)


def shaped(reward, length, stopped, c, *, mean, std, max_new_tokens):
    """One response through the order of shaping.py."""
    if c.clip is not None:
        reward = clip(reward, -c.clip, c.clip)
    if c.normalize != "none":
        reward = (reward - (mean if c.normalize == "standard" else 0.0)) / std
    if c.overlong_buffer is not None:  # arXiv:2503.14476 eq. 13
        start = max_new_tokens - c.overlong_buffer
        if length > max_new_tokens:
            reward -= c.overlong_penalty
        elif length > start:
            reward += (start - length) / c.overlong_buffer * c.overlong_penalty
    if not stopped and c.truncation_scale is not None:
        reward *= c.truncation_scale
    return reward - (0.0 if stopped else c.missing_eos_penalty)
