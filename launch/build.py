"""From a configuration to role handles: which class in which seat, with which weights. Nothing else knows the
classes."""

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

from ray.util.placement_group import PlacementGroup

from actors.actor import Actor
from actors.backbone import Backbone
from actors.backbone_group import BackboneGroup, BackboneReference, BackboneReward
from actors.critic import Critic
from actors.elastic_fleet import ElasticFleet
from actors.engine_sockets import remove_dead_folders
from actors.fleet import EngineFleet
from actors.group import (
    ActorGroup,
    LearnerGroup,
    RewardGroup,
    RewardLearnerGroup,
    ScorerGroup,
    WorkerGroup,
)
from actors.learner import LossFunction
from actors.object_store import ObjectStore
from actors.reference import Reference
from actors.remote_worker import spawn
from actors.reward import Judge, RewardLearner
from actors.threads import openmp
from actors.ward import Ward
from actors.weights.wire import ServedAdapter
from launch.cluster import Cluster
from launch.engine_count import EngineCount
from launch.engines import channel, served_adapter, spawn_engine, turn_takers
from launch.environment import MODEL_ENV, WORKER_ENV
from launch.incidents import IncidentLog
from launch.trainable import reward_adapter
from orchestrator.balance import FEWEST, ON_CPU
from orchestrator.config import MODEL, Adapter, Model, Optimizer, Run, Workers
from orchestrator.objectives._base import Objective
from orchestrator.placement import Layout
from orchestrator.roles import Role, Roles
from orchestrator.turns import Turn, Turns, at_any_time, taking_turns

G = TypeVar("G", bound=WorkerGroup)


class Crew:
    """The workers of one stage, started together and ended together."""

    def __init__(self, run: Run, cluster: Cluster, roles: list[str]) -> None:
        """Reserves the devices; raises PlacementError when the cluster does not grant them."""
        self.run, self.cluster = run, cluster
        self.layout: Layout
        self.groups: list[PlacementGroup]
        self.layout, self.groups = cluster.place(roles)
        self.store = ObjectStore()
        self.incidents = IncidentLog(run.run_dir / "incidents.jsonl")
        self.ward = Ward(run.run_dir / "stacks", self.incidents, cluster.record, cluster.trace.book)
        self._started: list[Role] = []
        self.trainers: list[LearnerGroup] = []  # of the rl stage
        self.engine_count: EngineCount | None = None  # None: no engine was started
        self.turns = Turns() if turn_takers(run) else None  # None: everybody has devices of its own
        self.turn = self.turns.turn if self.turns else at_any_time

    async def group(self, cls: type, group_cls: Callable[..., G], role: str, **settings: Any) -> G:
        """Starts a role's workers and waits until each has its model."""
        place: Workers = getattr(self.run.roles, role)
        env = {**WORKER_ENV, **MODEL_ENV, **openmp(place.threads)}
        workers = [
            spawn(cls, who=f"{role} rank {rank}", seat=seat, group=self.groups[seat.group], env=env,
                  deadlines=self.run.deadlines, ward=self.ward, **settings)
            for rank, seat in enumerate(self.layout.seats[role])
        ]  # fmt: skip
        group = group_cls(
            workers,
            store=self.store,
            token_budget=place.micro_batch_tokens,
            restarts=self.run.recovery.restarts,
        )
        self.keep(group)
        await group.start(
            threads=place.threads,
            seed=self.run.seed,
            timeout_s=self.run.deadlines.stall_s,
            overhead=ON_CPU if place.gpus == 0 else FEWEST,
        )
        return group

    def keep(self, handle: Role) -> None:
        """To be closed with the crew, also when it never finishes starting."""
        self._started.append(handle)

    async def close(self) -> None:
        """Ends every process of the stage and gives the devices back."""
        await asyncio.gather(*(handle.close() for handle in self._started), return_exceptions=True)
        self.cluster.release()
        self.cluster.forget()
        self.cluster.trace.write_rest()
        remove_dead_folders()

    async def policy(
        self, model: Model, optimizer: Optimizer, *, steps: int, objective: Objective
    ) -> ActorGroup:
        """The actor's workers in the sft and preference stages."""
        return await self.group(
            Actor, ActorGroup, "actor", model=model, optimizer=optimizer, total_steps=steps,
            loss=objective.loss, token_wise=objective.token_wise,
        )  # fmt: skip

    async def reward_learner(
        self, model: Model, optimizer: Optimizer, *, steps: int, loss: LossFunction
    ) -> RewardLearnerGroup:
        settings = {"model": model, "optimizer": optimizer, "total_steps": steps, "loss": loss}
        return await self.group(RewardLearner, RewardLearnerGroup, "reward", **settings)

    async def reference(self, model: Model) -> ScorerGroup:
        """The frozen policy of the preference stage."""
        return await self.group(Reference, ScorerGroup, "reference", model=model.frozen())

    async def rl(self, models: dict[str, str]) -> Roles:
        """All roles at once; ``models`` says where each one's weights are."""
        rl = self.run.rl
        assert rl is not None
        table, temperature = self.run.roles, rl.sampling.temperature
        per_step = rl.updates.epochs * rl.updates.minibatches

        def model(role: str, adapter: Adapter | None) -> Model:
            return self.run.model.training(adapter).model_copy(update={"path": models[role]})

        policy = {
            "model": model("actor", table.actor.adapter), "optimizer": table.actor.optimizer,
            "total_steps": (rl.steps - rl.critic_warmup) * per_step, "loss": rl.algorithm.policy_loss,
            "temperature": temperature, "entropy": rl.algorithm.wants_entropy,
            "distribution": rl.algorithm.wants_distribution, "ema_decay": rl.ema_decay,
        }  # fmt: skip
        served = served_adapter(self.run, models["actor"])
        if self.run.placement.backbone == "shared":
            return await self._shared(policy, models, served)
        actors = partial(ActorGroup, channel=channel(self.run, served))
        starts: dict[str, Any] = {
            "actor": self.group(
                Actor, actors, "actor", **policy, token_wise=rl.algorithm.loss_is_token_wise
            ),
            "engine": self.engines(models["actor"], adapter=served),
            "reward": self.reward(models.get("reward")),
        }  # fmt: skip
        if "critic" in rl.algorithm.roles():
            assert table.critic is not None  # config refuses it
            starts["critic"] = self.group(
                Critic, LearnerGroup, "critic", model=model("critic", table.critic.adapter),
                optimizer=table.critic.optimizer,
                total_steps=rl.steps * per_step, loss=rl.algorithm.value_loss,
            )  # fmt: skip
        if "reference" in rl.algorithm.roles():
            starts["reference"] = self.group(
                Reference,
                ScorerGroup,
                "reference",
                model=model("reference", None).frozen(),
                temperature=temperature,
            )
        handles = await asyncio.gather(*starts.values())
        started = dict(zip(starts, handles, strict=True))
        self.trainers = [started[name] for name in ("actor", "critic") if name in started]
        return taking_turns(Roles(**started), turn_takers(self.run), self.turns)

    async def _shared(
        self, policy: dict[str, Any], models: dict[str, str], served: ServedAdapter | None
    ) -> Roles:
        """All roles but the engine in the actor's workers."""
        rl, table = self.run.rl, self.run.roles
        assert rl is not None
        judged = models.get("reward")
        weights = table.reward.weights(stage=judged is not None)
        judge = reward_adapter(judged, models["actor"]) if judged and MODEL in weights else None
        critic = table.critic if "critic" in rl.algorithm.roles() else None
        host, engine = await asyncio.gather(
            self.group(
                Backbone, partial(BackboneGroup, channel=channel(self.run, served)), "actor", **policy,
                value_loss=None if critic is None else rl.algorithm.value_loss,
                value_coef=self.run.placement.value_coef,
                head_rate=None if critic is None else critic.optimizer.learning_rate,
                reward_adapter=judge, reward_model=judged if table.reward.normalize else None,
                functions=table.reward.specs(),
            ),
            self.engines(models["actor"], adapter=served),
        )  # fmt: skip
        roles = Roles(
            actor=host,
            engine=engine,
            reward=BackboneReward(host, weights, list(table.reward.specs())),
            critic=None if critic is None else host.with_critic(),
            reference=BackboneReference(host) if "reference" in rl.algorithm.roles() else None,
        )
        self.trainers = [host]
        return roles

    async def rebuild_trainers(self, *, all_of_them: bool) -> None:
        """The groups that lost a rank, or all; with the weights they started from. RestartsSpent."""
        async with self.turn(Turn.TRAIN):
            await asyncio.gather(*(group.rebuild() for group in self.trainers if all_of_them or group.lost))

    async def engines(self, model: str, *, adapter: ServedAdapter | None = None) -> EngineFleet:
        run = self.run
        places = [(seat, self.groups[seat.group]) for seat in self.layout.seats["engine"]]
        spawn_one = partial(spawn_engine, run, model, ward=self.ward, adapter=adapter)
        engines = [spawn_one(*place, index=index) for index, place in enumerate(places)]
        fleet = ElasticFleet(
            engines,
            run_seed=run.seed,
            workers=run.engine.tensor_parallel,
            restarts=run.recovery.restarts,
            report=self.incidents,
            turn=self.turn,
        )
        self.keep(fleet)
        started = dict(zip(engines, places, strict=True))
        self.engine_count = EngineCount(run, self.cluster, fleet, spawn_one, started)
        await asyncio.gather(*(engine.start() for engine in engines))
        return fleet

    async def reward(self, path: str | None) -> RewardGroup:
        place = self.run.roles.reward
        weights = place.weights(stage=path is not None)
        model = self.run.model.frozen().model_copy(update={"path": path}) if MODEL in weights else None
        return await self.group(
            Judge, partial(RewardGroup, weights=weights), "reward",
            model=model, functions=place.specs(), micro_batch_tokens=place.micro_batch_tokens,
            normalize=place.normalize,
        )  # fmt: skip
