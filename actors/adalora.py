"""AdaLoRA's schedule of ranks (arXiv:2303.10512, algorithm 1): singular values that matter less than the
budget allows become zero.

    each step   gradients -> importance -> optimizer step -> the least important singular values become 0

PEFT's allocator counts and masks; here is when it is asked, and what a checkpoint keeps of it. Needs whole
gradients in ``.grad``: float32 at ZeRO stage 0, where ranks see equal ones.
"""

from pathlib import Path
from typing import Any

import torch
from peft import AdaLoraConfig
from peft.tuners.adalora import RankAllocator
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

FILE = "ranks.safetensors"
SAVED = ("ipt", "exp_avg_ipt", "exp_avg_unc")  # the allocator's running importances
PATTERN = "pattern"


class RankSchedule:
    def __init__(self, backbone: nn.Module, config: AdaLoraConfig, adapter: str) -> None:
        self._backbone, self._config, self._adapter = backbone, config, adapter
        self._allocator = RankAllocator(backbone, config, adapter)
        self._pattern: dict[str, Any] = {}  # which singular values stay, once that is settled

    def penalty(self) -> Tensor:
        """Mean distance of P'P and QQ' from the identity (equation 4), times its weight."""
        distances = []
        for name, parameter in self._backbone.named_parameters():
            if f".lora_A.{self._adapter}" in name or f".lora_B.{self._adapter}" in name:
                square = parameter @ parameter.T if "lora_A" in name else parameter.T @ parameter
                distances.append((square - torch.eye(len(square), device=square.device)).norm())
        return self._config.orth_reg_weight * torch.stack(distances).mean()

    def weigh(self, step: int) -> None:
        """Before the optimizer steps: how important each tensor is, while its gradient is there."""
        if step < self._last():
            self._allocator.update_ipt(self._backbone)

    def mask(self, step: int) -> None:
        """After optimizer step 1, 2, ...: what is beyond the budget is 0."""
        if step > self._last():
            self._allocator.mask_using_rank_pattern(self._backbone, self._pattern)
            return
        budget, due = self._allocator.budget_schedule(step)
        if step == self._last():
            budget, due = self._allocator.target_bgt, True
        if due and budget < self._allocator.init_bgt:
            self._pattern = self._allocator.mask_to_budget(self._backbone, budget)

    def _last(self) -> int:
        """The step after which no rank changes any more."""
        return int(self._config.total_step - self._config.tfinal)

    def save(self, folder: Path) -> None:
        tensors = {
            f"{kind}/{name}": tensor.contiguous()
            for kind in SAVED
            for name, tensor in getattr(self._allocator, kind).items()
        }
        for name, stays in self._pattern.items():
            tensors[f"{PATTERN}/{name}"] = torch.tensor(stays)
        save_file(tensors, folder / FILE)

    def load(self, folder: Path) -> None:
        tables: dict[str, dict[str, Any]] = {kind: {} for kind in (*SAVED, PATTERN)}
        for key, tensor in load_file(folder / FILE).items():
            kind, name = key.split("/", 1)
            tables[kind][name] = tensor.tolist() if kind == PATTERN else tensor
        self._pattern = tables.pop(PATTERN)
        for kind, tensors in tables.items():
            setattr(self._allocator, kind, tensors)
