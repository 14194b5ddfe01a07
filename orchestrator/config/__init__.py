"""The run tree: every knob of Quartet, documented under its field (``quartet train --help`` prints it).

Invariant: this package and all it imports load without torch, so a wrong setting is answered in a fraction
of a second. Load order is in ``configfile.py``: defaults, then one YAML file, then ``a.b.c=value``.
"""

from orchestrator.config.adapter import Adapter
from orchestrator.config.autoscale import Autoscale
from orchestrator.config.data import ChatData, PromptData, Task
from orchestrator.config.evaluate import Evaluate
from orchestrator.config.model import Model, Optimizer
from orchestrator.config.rl import RL, Evaluation, SamplingConfig, Updates, algorithm
from orchestrator.config.roles import (
    MODEL,
    CriticRole,
    Deadlines,
    EngineConfig,
    Placement,
    ReferenceRole,
    RewardFunction,
    RewardRole,
    RoleTable,
    TrainedRole,
    Workers,
)
from orchestrator.config.run import Run, Tracking
from orchestrator.config.stages import Preference, RewardModel, Sft

__all__ = [
    "MODEL",
    "RL",
    "Adapter",
    "Autoscale",
    "ChatData",
    "CriticRole",
    "Deadlines",
    "EngineConfig",
    "Evaluate",
    "Evaluation",
    "Model",
    "Optimizer",
    "Placement",
    "Preference",
    "PromptData",
    "ReferenceRole",
    "RewardFunction",
    "RewardModel",
    "RewardRole",
    "RoleTable",
    "Run",
    "SamplingConfig",
    "Sft",
    "Task",
    "Tracking",
    "TrainedRole",
    "Updates",
    "Workers",
    "algorithm",
]
