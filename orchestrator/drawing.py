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


async def sample(prompt: Prompt, rl: RL, roles: Roles) -> Group:
    """One group with its rewards, the scores that can be had already and, for algorithms that want one, the
    reward of a greedy response."""
    sampling = Sampling(**rl.sampling.model_dump())
    asked = [roles.engine.generate(prompt, rl.samples_per_prompt, sampling)]
    if rl.algorithm.greedy_baseline:
        beside = replace(prompt, uid=f"{prompt.uid}/greedy")  # a uid of its own: it is sample 0 of nothing
        asked.append(roles.engine.generate(beside, 1, replace(sampling, temperature=0.0, top_p=1.0)))
    answers = await asyncio.gather(*asked)
    rewarded, early = await asyncio.gather(
        roles.reward.score([rollout for answer in answers for rollout in answer]),
        score_early(answers[0], rl, roles),
    )
    samples, greedy = rewarded[: len(early)], rewarded[len(early) :]
    baseline = greedy[0].reward if greedy else None
    return [
        replace(one, scores=scores, baseline=baseline) for one, scores in zip(samples, early, strict=True)
    ]


async def draw(stream: RolloutStream[Prompt, Group], rl: RL) -> Drawn:
    """The next ``prompts_per_step`` groups, those without signal replaced as long as the filter's draws last.

    Slots of replaced groups are free again; those of the groups returned are the caller's to release.
    """
    groups: list[Group] = []
    prompts: list[Prompt] = []
    left = 0 if rl.filter is None else (rl.filter.max_draws - 1) * rl.prompts_per_step
    dropped = 0
    while len(groups) < rl.prompts_per_step:
        group = (await stream.take(1))[0]
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
