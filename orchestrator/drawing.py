"""From prompts to the groups of one step: responses, their rewards, and groups without signal drawn again.

Dynamic sampling (DAPO, arXiv:2503.14476 section 3.2): a group that the run's filter drops gives its slot
back, and the next prompt takes its place, until the step has its groups. That ends: of one step at most
``(max_draws - 1) * prompts_per_step`` groups are replaced. Groups that are dropped after that stay in the
batch, which so keeps its size, and with it minibatches and schedules; they carry no signal, and are counted.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace

from orchestrator.batch import Prompt, ScoredRollout
from orchestrator.coalesce import portions
from orchestrator.config import RL
from orchestrator.metrics import mean_metrics
from orchestrator.roles import Metrics, Roles, Sampling
from orchestrator.scoring import score_early
from orchestrator.stream import RolloutStream

Group = list[ScoredRollout]


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """The groups of one step."""

    groups: Sequence[Group]  # prompts_per_step of them, in ledger order
    prompts: Sequence[Prompt]  # of these and of the replaced groups: all that the step used up
    metrics: Metrics


def prompts_at_once(rl: RL) -> int:
    """How many prompts that follow one another are sampled as one: their groups are rewarded and scored
    together, when the last is there. As many as stay below ``score_tokens`` and divide the step's.

    Never those that happen to be there: a row's last bits depend on what is computed beside it.
    """
    if rl.filter is not None:  # which prompts a step draws is not known before
        return 1
    most = rl.score_tokens // (rl.samples_per_prompt * rl.sampling.max_new_tokens)
    return max(n for n in range(1, max(most, 1) + 1) if rl.prompts_per_step % n == 0)


async def sample(prompts: Sequence[Prompt], rl: RL, roles: Roles) -> list[Group]:
    """The group of each prompt with its rewards, the scores that can be had already and, for algorithms that
    want one, the reward of a greedy response."""
    sampling = Sampling(**rl.sampling.model_dump())
    asked = [roles.engine.generate(prompt, rl.samples_per_prompt, sampling) for prompt in prompts]
    if rl.algorithm.greedy_baseline:
        mode = replace(sampling, temperature=0.0, top_p=1.0)
        beside = [replace(prompt, uid=f"{prompt.uid}/greedy") for prompt in prompts]  # sample 0 of nothing
        asked += [roles.engine.generate(prompt, 1, mode) for prompt in beside]
    answers = await asyncio.gather(*asked)
    rollouts = [rollout for answer in answers[: len(prompts)] for rollout in answer]
    greedy = [rollout for answer in answers[len(prompts) :] for rollout in answer]
    rewarded, early = await asyncio.gather(
        roles.reward.score([*rollouts, *greedy]), score_early(rollouts, rl, roles)
    )
    scored = [
        replace(one, scores=scores) for one, scores in zip(rewarded[: len(rollouts)], early, strict=True)
    ]
    groups = portions(scored, answers[: len(prompts)])
    for group, best in zip(groups, rewarded[len(rollouts) :], strict=False):  # none without a baseline
        group[:] = [replace(one, baseline=best.reward) for one in group]
    return groups


async def draw(stream: RolloutStream[Sequence[Prompt], list[Group]], rl: RL) -> Drawn:
    """The next ``prompts_per_step`` groups, those without signal replaced as long as the filter's draws last.

    Slots of replaced groups are free again; those of the groups returned are the caller's to release.
    """
    groups: list[Group] = []
    prompts: list[Prompt] = []
    left = 0 if rl.filter is None else (rl.filter.max_draws - 1) * rl.prompts_per_step
    dropped = 0
    while len(groups) < rl.prompts_per_step:
        (taken,) = await stream.take(1)
        for group in taken:
            prompts.append(group[0].rollout.prompt)
            if rl.filter is not None and not rl.filter.keeps([one.reward for one in group]):
                dropped += 1
                if left:
                    left -= 1
                    stream.release(1)
                    continue
            groups.append(group)
    return Drawn(groups=groups, prompts=prompts, metrics=_figures(groups, rl, len(prompts), dropped))


def _figures(groups: Sequence[Group], rl: RL, drawn: int, dropped: int) -> Metrics:
    """What the filter did, where there is one, and the mean of each reward, where there are several."""
    parts = mean_metrics([one.parts for group in groups for one in group])
    figures = {f"reward/{name}": mean for name, mean in parts.items()} if len(parts) > 1 else {}
    if rl.filter is not None:
        replaced = drawn - len(groups)
        figures |= {
            "groups_drawn": drawn,
            "groups_dropped": dropped,
            "groups_not_replaced": dropped - replaced,
        }
    return figures
