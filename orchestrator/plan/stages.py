"""Which roles live at once in each stage of a run, with which model, optimizer and number of rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from orchestrator.config import MODEL, Run
from orchestrator.plan.memory import Job
from orchestrator.plan.shapes import Shape
from orchestrator.plan.workload import Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class Shapes:
    """The models of a run."""

    base: Shape  # model.path
    by_role: Mapping[str, Shape]  # of roles that name a model of their own

    def of(self, role: str) -> Shape:
        """Critics and reward models are the base, or the model they name, with a scalar head; a critic
        starts from the reward model where there is one."""
        start = "reward" if role == "critic" and "critic" not in self.by_role else role
        shape = self.by_role.get(start, self.base)
        return shape.with_score() if role in ("critic", "reward") else shape


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    name: str
    jobs: tuple[Job, ...]
    workload: Workload

    @property
    def roles(self) -> list[str]:
        return [job.role for job in self.jobs]


def stages(run: Run, shapes: Shapes, rl_workload: Workload | None) -> list[Stage]:
    """In their order; ``rl_workload`` None where the run has no rl stage."""
    found = []
    longest = run.model.max_length
    whole = Workload(prompt=0, longest_prompt=0, response=longest, limit=longest)

    def per_worker(role: str, rows: int) -> int:
        workers: int = getattr(run.roles, role).num_workers
        return max(1, -(-rows // workers))

    if run.sft:
        job = Job(
            role="actor", shape=shapes.of("actor"), optimizer=run.sft.optimizer,
            adapter=run.model.training(run.sft.adapter).adapter,
            rows=per_worker("actor", run.sft.batch_size),
        )  # fmt: skip
        found.append(Stage(name="sft", jobs=(job,), workload=whole))
    if run.reward_model:
        job = Job(
            role="reward", shape=shapes.of("reward"), optimizer=run.reward_model.optimizer,
            adapter=run.model.training(run.reward_model.adapter).adapter,
            rows=per_worker("reward", 2 * run.reward_model.batch_size),
        )  # fmt: skip
        found.append(Stage(name="reward_model", jobs=(job,), workload=whole))
    if run.preference:
        rows = per_worker("actor", 2 * run.preference.batch_size)
        jobs = [
            Job(
                role="actor", shape=shapes.of("actor"), optimizer=run.preference.optimizer, rows=rows,
                adapter=run.model.training(run.preference.adapter).adapter,
            )
        ]  # fmt: skip
        if run.preference.objective.needs_reference:
            jobs.append(Job(role="reference", shape=shapes.of("reference"), optimizer=None, rows=rows))
        found.append(Stage(name="preference", jobs=tuple(jobs), workload=whole))
    if run.rl and rl_workload is not None:
        found.append(Stage(name="rl", jobs=_rl_jobs(run, shapes), workload=rl_workload))
    return found


def _rl_jobs(run: Run, shapes: Shapes) -> tuple[Job, ...]:
    rl, table = run.rl, run.roles
    assert rl is not None
    batch = rl.prompts_per_step * rl.samples_per_prompt
    minibatch = batch // rl.updates.minibatches
    judged_by_model = MODEL in table.reward.weights(stage=run.reward_model is not None)
    critic = table.critic if "critic" in rl.algorithm.roles() else None
    reference = table.reference if "reference" in rl.algorithm.roles() else None

    def share(rows: int, workers: int) -> int:
        return max(1, -(-rows // workers))

    jobs = [
        Job(
            role="actor", shape=shapes.of("actor"), optimizer=table.actor.optimizer,
            adapter=run.model.training(table.actor.adapter).adapter,
            rows=share(minibatch, table.actor.num_workers),
        ),
        Job(role="engine", shape=shapes.of("actor"), optimizer=None, rows=share(batch, run.engine.replicas)),
        Job(
            role="reward", shape=shapes.of("reward") if judged_by_model else None, optimizer=None,
            rows=share(batch, table.reward.num_workers),
        ),
    ]  # fmt: skip
    if run.placement.backbone == "shared":  # the other roles are adapters and heads of the actor's model
        return tuple(jobs[:2])
    if critic is not None:
        rows = share(minibatch, critic.num_workers)
        trained = run.model.training(critic.adapter).adapter
        jobs.append(
            Job(
                role="critic",
                shape=shapes.of("critic"),
                optimizer=critic.optimizer,
                rows=rows,
                adapter=trained,
            )
        )
    if reference is not None:
        rows = share(batch, reference.num_workers)
        jobs.append(Job(role="reference", shape=shapes.of("reference"), optimizer=None, rows=rows))
    return tuple(jobs)
