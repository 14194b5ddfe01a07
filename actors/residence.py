"""Where the state of a model under training is: on its device, or in the host's memory while others use the
device.

ZeRO 1 and 2 move with DeepSpeed's own ``offload_states``; a model that is not sharded moves here. ZeRO-3
stays: DeepSpeed moves its optimizer states only for an optimizer of DeepSpeed's own, and the configuration
refuses it. On CPUs device and host are one: the same code runs, and nothing moves.
"""

from typing import Any

import torch
from torch import Tensor

from orchestrator.roles import Residency

BEYOND_WEIGHTS = ["hp_params", "optim_states", "lp_grads"]  # DeepSpeed's names: hp float32, lp bfloat16


class Residence:
    """Of one rank. Every rank moves by itself: no collective."""

    def __init__(self, engine: Any, *, stage: int, device: torch.device) -> None:
        self._engine, self._stage, self._device = engine, stage, device
        self._level = Residency.AWAKE

    def move(self, level: Residency) -> None:
        if level is self._level:
            return  # a move of all that failed for somebody else is made again
        if self._stage == 0:
            self._move_unsharded(level)
        else:
            self._move_sharded(level)
        self._level = level
        if self._device.type == "cuda":
            torch.cuda.empty_cache()  # what PyTorch keeps for itself, the engine cannot have

    def _move_sharded(self, level: Residency) -> None:
        if level > self._level:
            self._engine.reload_states()  # all of them: DeepSpeed knows no parts here
        if level < Residency.AWAKE:
            include = BEYOND_WEIGHTS if level is Residency.WEIGHTS else [*BEYOND_WEIGHTS, "lp_params"]
            self._engine.offload_states(include=include, pin_memory=self._device.type == "cuda")

    def _move_unsharded(self, level: Residency) -> None:
        host = torch.device("cpu")
        module, optimizer = self._engine.module, self._engine.optimizer
        for tensor in [*module.parameters(), *module.buffers()]:
            tensor.data = tensor.data.to(host if level is Residency.ASLEEP else self._device)
        for state in optimizer.state.values():
            for name, value in state.items():
                if isinstance(value, Tensor) and value.dim():  # AdamW counts its steps on the CPU by itself
                    state[name] = value.to(self._device if level is Residency.AWAKE else host)
