"""DeepSpeed: shard a model over ranks, add up gradients, step, save, and gather what was sharded.

The only importer of deepspeed. It keeps three promises that the rest of Quartet builds on:

- gradients are SUMMED over micro-batches and ranks. DeepSpeed averages over ranks; ``accumulate`` multiplies
  the loss by the number of ranks, once, here;
- under bfloat16 the optimizer works on float32 master weights, and sums are float32, at every ZeRO stage
  (BUGS C7);
- a gradient norm that is not finite skips the step on every rank and is reported, and training goes on.

Every method is collective: all ranks call it, the same number of times and in the same order.
"""

import importlib
import logging
import math
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from actors.adapter import Plain, Value, peft_tensors, plain_tensors, rank_schedule
from actors.average import Average, average_of
from actors.model import LanguageModel
from actors.muon import Muon, build_optimizer
from actors.residence import Residence
from actors.shards import shards_of
from actors.training_state import NonFiniteStateError, Owned, Snapshot, all_finite, restore, snapshot
from orchestrator.config import Optimizer

if not torch.cuda.is_available():
    # Read on import; without it DeepSpeed warns that it found no GPU.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed

# DeepSpeed 0.19 calls it on every step under torch 2.13.
warnings.filterwarnings("ignore", message=".*reduce_scatter_tensor.*", category=FutureWarning)

GATHER_ELEMENTS = 2**25  # parameters gathered at once: 128 MiB in float32
REDUCE_ELEMENTS = 2**25  # gradients reduced at once; ZeRO allocates a buffer of this size every step
PERSISTENT_ELEMENTS = 10**5  # ZeRO-3 keeps smaller parameters whole on every rank


class Backend:
    """One model under training, this rank's part."""

    def __init__(
        self,
        model: LanguageModel,
        optimizer: Optimizer,
        *,
        total_steps: int,
        ema_decay: float | None = None,
        head_rate: float | None = None,
    ) -> None:
        """The process group must exist. ``total_steps`` is how often ``step`` will be called, in all runs
        together; ``ema_decay`` None keeps no average of the weights; ``head_rate``: the peak learning rate
        of scalar heads, None for everyone's."""
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.settings, self.total_steps = optimizer, total_steps
        self.num_taken, self.num_skipped = 0, 0  # optimizer steps
        dtype = next(model.parameters()).dtype
        self.stage = _stage(optimizer.zero_stage, dtype, self.world_size)
        self.optimizer = build_optimizer(model, optimizer, head_rate)
        self.tied = _tied(model)
        num_elements = sum(p.numel() for p in model.parameters())
        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        _skip_compiling_shared_memory_op()
        _import_muon_uncompiled()
        self.engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=self.optimizer,
            config=_deepspeed_config(self.stage, dtype, optimizer.max_grad_norm, num_elements),
            dist_init_required=False if deepspeed.comm.is_initialized() else None,
        )
        self.device = self.engine.device
        # DeepSpeed adds up a single rank's gradients too: through one more buffer of their size.
        self.engine.enable_backward_allreduce = self.stage > 0 or self.world_size > 1
        self.shards = shards_of(self.stage, self.engine.optimizer)
        if isinstance(self.optimizer, Muon):
            self.optimizer.place(self.shards)
        self.average = None if ema_decay is None else Average(self.shards, ema_decay)
        self.residence = Residence(self.engine, stage=self.stage, device=self.device)
        self.ranks = rank_schedule(model.model.base_model)

    def forward(self, *inputs: Any) -> Any:
        """Through the engine, so that ZeRO-3 gathers parameters on the way."""
        return self.engine(*inputs)

    def accumulate(self, loss: Tensor, *, last: bool) -> None:
        """Adds the gradients of one micro-batch; ``last`` says that ``step`` follows."""
        if last and self.ranks is not None:
            loss = loss + self.ranks.penalty() / self.world_size
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss * self.world_size, scale_wrt_gas=False)

    def step(self) -> dict[str, float]:
        """One optimizer step with everything accumulated since the last; the same answer on every rank."""
        height = _schedule(self.settings, self.num_taken, self.total_steps - self.num_skipped)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * height
        norm, applied = self._clip_and_step()
        if applied:
            self.num_taken += 1
        else:
            self.num_skipped += 1
        if applied and self.average is not None:
            self.average.update()
        return {
            "grad_norm": norm,
            "learning_rate": self.settings.learning_rate * height,
            "skipped_steps": 0.0 if applied else 1.0,
        }

    def _clip_and_step(self) -> tuple[float, bool]:
        if self.stage > 0:
            self.engine.step()
            return float(self.engine.get_global_grad_norm()), self.engine.was_step_applied()
        # Stage 0 in float32 is AdamW on the model itself; DeepSpeed would step without a look at the norm.
        trained = [p for p in self.engine.module.parameters() if p.requires_grad]
        for parameter in trained:  # what the loss did not reach has a gradient of 0, on any number of ranks
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        total = torch.nn.utils.get_total_norm(p.grad for p in trained)
        if math.isfinite(norm := float(total)):
            if norm > self.settings.max_grad_norm:  # clip_grad_norm_ would multiply by 1 all the same
                torch.nn.utils.clip_grads_with_norm_(trained, self.settings.max_grad_norm, total)
            if self.ranks is not None:
                self.ranks.weigh(self.num_taken + 1)
            self.engine.step()
            if self.ranks is not None:
                self.ranks.mask(self.num_taken + 1)
        else:
            self.engine.zero_grad()
        return norm, math.isfinite(norm)

    def snapshot(self) -> Snapshot:
        """Weights, master weights, moments, schedule, average and generators of this rank, copied."""
        return snapshot(self._owned(), {"num_taken": self.num_taken, "num_skipped": self.num_skipped})

    def load(self, folder: Path) -> None:
        """Continues exactly where ``snapshot`` was; the save may be of other ranks and another ZeRO stage."""
        header = restore(self._owned(), folder)
        if self.ranks is not None:
            self.ranks.load(folder)
        self.num_taken, self.num_skipped = header["num_taken"], header["num_skipped"]
        zero = self.engine.optimizer
        if self.stage in (1, 2):
            zero.update_lp_params()
        elif self.stage == 3:  # as ZeRO-3's own step ends
            zero._partition_all_parameters()
            for number in range(len(zero.fp16_groups)):
                zero._reassign_or_swap_out_partitioned_parameters(number)
            zero.checkpoint_event_epilogue()

    def _owned(self) -> Owned:
        names = {id(p): name for name, p in self.engine.module.named_parameters()}
        averages = None if self.average is None else self.average.tensors
        return Owned(shards=self.shards, averages=averages, optimizer=self.optimizer, names=names)

    def check_finite(self) -> None:
        """NonFiniteStateError on every rank when a trained weight of any is not finite. Collective."""
        trained = [p for p in self.engine.module.parameters() if p.requires_grad]
        broken = all_finite([getattr(p, "ds_tensor", p) for p in trained]).logical_not().float()
        broken = broken.to(self.device)
        if self.world_size > 1:
            dist.all_reduce(broken)
        if broken.item():
            raise NonFiniteStateError("a weight is NaN or infinite: nothing is sent to the engines")

    def named_full_parameters(self, value: Value = Tensor.detach) -> Iterator[tuple[str, Tensor]]:
        """(Hugging Face name, whole tensor) of every weight, tied ones once and adapters merged into them,
        gathered some at a time. ``value``: of a parameter, e.g. its average.

        A tensor is valid until the next one is asked for. All ranks iterate to the end, in step.
        """
        yield from self._gathered([(t.name, t.parts, t.whole) for t in self._plain()], value)

    def parameter_shapes(self) -> list[tuple[str, tuple[int, ...]]]:
        """Name and whole shape of what ``named_full_parameters`` yields, in its order, without gathering."""
        return [(tensor.name, tensor.shape) for tensor in self._plain()]

    def adapter_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(name in PEFT's files, whole tensor) of what is trained, as ``named_full_parameters`` yields."""
        named = peft_tensors(self.engine.module.model)
        yield from self._gathered([(n, (p,), lambda value, p=p: value(p)) for n, p in named], Tensor.detach)

    def adapter_shapes(self) -> list[tuple[str, tuple[int, ...]]]:
        """Name and whole shape of what ``adapter_tensors`` yields."""
        named = peft_tensors(self.engine.module.model)
        return [(n, tuple(getattr(p, "ds_shape", p.shape))) for n, p in named]

    def _plain(self) -> list[Plain]:
        return plain_tensors(self.engine.module.model)

    def _gathered(
        self, tensors: list[tuple[str, tuple[nn.Parameter, ...], Callable[[Value], Tensor]]], value: Value
    ) -> Iterator[tuple[str, Tensor]]:
        """Each tensor made by its function while its parts are whole, in buckets of ``GATHER_ELEMENTS``."""
        sizes = [sum(getattr(p, "ds_numel", p.numel()) for p in parts) for _, parts, _ in tensors]
        start = 0
        while start < len(tensors):
            stop, size = start + 1, sizes[start]
            while stop < len(tensors) and size + sizes[stop] <= GATHER_ELEMENTS:
                size, stop = size + sizes[stop], stop + 1
            whole: AbstractContextManager[Any] = nullcontext()
            if self.stage == 3:
                parts = {id(p): p for _, parts, _ in tensors[start:stop] for p in parts}
                whole = deepspeed.zero.GatheredParameters(list(parts.values()))
            with whole, torch.no_grad():
                for name, _, make in tensors[start:stop]:
                    yield name, make(value)
            start = stop

    def export(self, folder: Path, *, averaged: bool = False) -> None:
        """Rank 0 writes a plain ``from_pretrained`` folder, of the weights or of their average."""
        averages: dict[int, Tensor] = {}
        if averaged:
            if self.average is None:
                raise ValueError("no average is kept; set rl.ema_decay")
            for parameter, tensor in self.average.whole():
                if self.rank == 0:
                    averages[id(parameter)] = tensor.to("cpu", parameter.dtype, copy=True)
        weights: dict[str, Tensor] = {}
        for name, tensor in self.named_full_parameters(partial(average_of, averages)):
            if self.rank == 0:
                weights[name] = tensor.to("cpu", copy=True)
        if self.rank == 0:
            weights |= {alias: weights[name] for alias, name in self.tied.items()}
            self.engine.module.write(folder, weights)
        dist.barrier()

    def close(self) -> None:
        self.engine.destroy()


def _stage(wanted: int, dtype: torch.dtype, world_size: int) -> int:
    """The ZeRO stage that does what was asked for.

    One rank has nothing to shard: float32 runs unsharded, which is plain PyTorch and the fastest. bfloat16
    runs at 2 or 3, whose optimizers keep float32 master weights and add up in float32; DeepSpeed's stage 0
    adds up in bfloat16.
    """
    if dtype == torch.float32:
        return 0 if world_size == 1 else wanted
    return 2 if world_size == 1 else max(2, wanted)


def _deepspeed_config(stage: int, dtype: torch.dtype, max_grad_norm: float, size: int) -> dict[str, Any]:
    reduce_elements = min(REDUCE_ELEMENTS, size + size % 2)  # DeepSpeed wants it even
    return {
        "train_micro_batch_size_per_gpu": 1,  # DeepSpeed only logs it; batches and boundaries are ours
        "gradient_accumulation_steps": 1,
        "bf16": {"enabled": dtype == torch.bfloat16, "check_grad_overflow": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "gradient_clipping": max_grad_norm if stage > 0 else 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {
            "stage": stage,
            "overlap_comm": torch.cuda.is_available() and stage == 3,
            "reduce_bucket_size": reduce_elements,
            "allgather_bucket_size": reduce_elements,
            "stage3_param_persistence_threshold": PERSISTENT_ELEMENTS,
        },
    }


def _skip_compiling_shared_memory_op() -> None:
    """Keeps DeepSpeed on gloo between CPU ranks.

    Its shared-memory op compiles for 29 s, and a killed build leaves a lock on which the next one waits.
    ``deepspeed.ops`` probes the compiler unless this dict is already there.
    """
    if not torch.cuda.is_available():
        vars(deepspeed.ops).setdefault("__compatible_ops__", {})


def _import_muon_uncompiled() -> None:
    """ZeRO imports Muon to ask if we use it; its decorators would load torch's compiler, 4 s a process."""
    compile_ = deepspeed.runtime.compiler.compile
    deepspeed.runtime.compiler.compile = lambda: lambda function: function
    try:
        importlib.import_module("deepspeed.runtime.zero.muon.original_muon")
    finally:
        deepspeed.runtime.compiler.compile = compile_


def _tied(model: LanguageModel) -> dict[str, str]:
    """Second name of a shared parameter -> its first name."""
    first = {id(p): name for name, p in model.model.named_parameters()}
    every = model.model.named_parameters(remove_duplicate=False)
    return {name: first[id(p)] for name, p in every if first[id(p)] != name}


def _schedule(settings: Optimizer, step: int, total_steps: int) -> float:
    """The share of the peak at optimizer step 0, 1, ... of those taken: rises over the first
    ``warmup_steps``, then stays, or falls towards 0, which it would reach one step after the last.

    Example, linear, warm-up 2, 6 steps in all: 0.5, 1, 1, 0.75, 0.5, 0.25.
    """
    warmup = settings.warmup_steps
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
    match settings.schedule:
        case "linear":
            return 1 - progress
        case "cosine":
            return (1 + math.cos(math.pi * progress)) / 2
        case _:
            return 1.0
