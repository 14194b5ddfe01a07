"""Bytes of one worker of each role, counted from what ``actors/`` keeps.

Exact are weights, gradients and optimizer states. Activations follow the layers of Transformers' Llama;
buffers the constants of ``actors/backend.py`` and of DeepSpeed. What nobody can count (a CUDA context, an
allocator's fragments, a Python process) is a figure with an interval, from a calibration where there is one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from orchestrator.config import Adapter, Optimizer, Run
from orchestrator.plan.devices import GIB, MIB, Device
from orchestrator.plan.shapes import Shape
from orchestrator.plan.workload import Workload

BYTES = {"float32": 4, "bfloat16": 2}
LOGITS_ON_CPU, LOGITS_ON_GPU = 2**25, 2**26  # at once: actors/heads.py
REDUCE_ELEMENTS = 2**25  # actors/backend.py; one bucket for gradients, one for weights
LIVE_ELEMENTS = 10**9  # DeepSpeed's stage3_max_live_parameters: whole layers that ZeRO-3 keeps gathered
CPU_KV_CACHE_MIB = 256  # actors/engine.py
BATCHED_TOKENS = 8192  # what vLLM prefills at once on a large GPU


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Some bytes, and by which share they may be off."""

    name: str
    bytes: float
    spread: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Overheads:
    """What a process takes before it has a model, in bytes: measured on CPUs where there is a calibration."""

    process: Mapping[str, float] = field(
        default_factory=lambda: {
            "actor": 0.40 * GIB, "critic": 0.40 * GIB, "reward": 0.35 * GIB, "reference": 0.35 * GIB,
            "engine": 0.95 * GIB, "driver": 1.2 * GIB,
        }
    )  # fmt: skip
    cuda: float = 1.2 * GIB  # context, NCCL's channels, cuBLAS
    graphs: float = 0.8 * GIB  # of vLLM
    fragments: float = 1.10  # what the allocator keeps, over what is alive
    measured: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerMemory:
    """One worker: what lies on its device, and what of its node's memory it takes. On CPUs all is the
    node's."""

    role: str
    device: tuple[Part, ...]
    host: tuple[Part, ...]

    @property
    def low(self) -> float:
        return low(self.device)

    @property
    def high(self) -> float:
        return high(self.device)


def total(parts: Sequence[Part]) -> float:
    return sum(part.bytes for part in parts)


def low(parts: Sequence[Part]) -> float:
    return sum(part.bytes * (1 - part.spread) for part in parts)


def high(parts: Sequence[Part]) -> float:
    return sum(part.bytes * (1 + part.spread) for part in parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What the memory of a role depends on beside its own settings."""

    run: Run
    workload: Workload
    device: Device
    overheads: Overheads
    serves: bool  # whether the stage has engines that the actor sends its weights to

    @property
    def dtype(self) -> int:
        return BYTES[self.run.model.dtype]


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What a role does in a stage."""

    role: str
    shape: Shape | None  # None: a reward that is a function and no model
    optimizer: Optimizer | None  # None: frozen
    adapter: Adapter | None = None  # what is trained; None: all the weights
    rows: int  # sequences that one worker has in hand at most


def worker_memory(setting: Setting, job: Job) -> WorkerMemory:
    if job.role == "engine":
        assert job.shape is not None
        return _engine(setting, job.shape)
    if job.shape is None:
        return WorkerMemory(role=job.role, device=(), host=_process(setting, job.role))
    own = getattr(setting.run.roles, job.role)
    tokens = min(own.micro_batch_tokens, job.rows * setting.workload.longest)
    if job.optimizer is None:
        parts = [Part(name="parameters", bytes=job.shape.params * setting.dtype)]
    else:
        parts = _trained(setting, job, own.num_workers)
    trained = job.optimizer is not None
    parts += _activations(setting, job.shape, tokens, trained=trained)
    if job.role == "actor" and setting.serves:
        parts.append(_transfer(setting, job.shape))
    # DeepSpeed shards what first lies whole on the device (its engine.py:_configure_distributed_model).
    whole = job.shape.params * setting.dtype - total(parts)
    if trained and whole > 0:
        parts.append(Part(name="at the start, before it is sharded", bytes=whole))
    return _placed(setting, job.role, parts, job.shape)


def _placed(setting: Setting, role: str, parts: list[Part], shape: Shape) -> WorkerMemory:
    """On a GPU the parts and the context; its process on the host, where the weights pass through at the
    start."""
    base = _process(setting, role)
    if setting.device.is_cpu:
        return WorkerMemory(role=role, device=(), host=(*base, *parts))
    loading = Part(name="loading", bytes=shape.params * setting.dtype, spread=0.1)
    cuda = Part(name="CUDA context", bytes=setting.overheads.cuda, spread=0.5)
    return WorkerMemory(role=role, device=(*parts, cuda), host=(*base, loading))


def _process(setting: Setting, role: str) -> tuple[Part, ...]:
    spread = 0.1 if setting.overheads.measured else 0.4
    return (Part(name="process", bytes=setting.overheads.process[role], spread=spread),)


def zero_stage(wanted: int, dtype: int, ranks: int) -> int:
    """The stage that runs (actors/backend.py:_stage): one rank has nothing to shard, bfloat16 needs 2 or
    3."""
    if dtype == BYTES["float32"]:
        return 0 if ranks == 1 else wanted
    return 2 if ranks == 1 else max(2, wanted)


def trained_params(shape: Shape, adapter: Adapter | None) -> int:
    """All the weights; or of lora A and B of every linear layer, which is more than other kinds have."""
    if adapter is None:
        return shape.params
    rank = adapter.initial_rank if adapter.kind == "adalora" else adapter.rank
    h, q, kv, f = shape.hidden, shape.q, shape.kv, shape.intermediate
    return min(shape.params, shape.layers * rank * (2 * (h + q) + 2 * (h + kv) + 3 * (h + f)))


def _trained(setting: Setting, job: Job, ranks: int) -> list[Part]:
    """Weights, gradients and optimizer under DeepSpeed, and the largest of what comes and goes beside them.

    float32 without sharding steps the weights themselves: 4 + 4 + 8 bytes a parameter. Otherwise each rank
    has its part of float32 masters and of two moments (12), of float32 gradients (4) and, in the step, of a
    flat copy of them (4).
    """
    assert job.shape is not None and job.optimizer is not None
    optimizer, d, P = job.optimizer, setting.dtype, job.shape.params
    T = trained_params(job.shape, job.adapter)
    stage = zero_stage(optimizer.zero_stage, d, ranks)
    moments = 4 if optimizer.name == "muon" else 8
    if stage == 0:
        parts = [
            Part(name="parameters", bytes=P * d), Part(name="gradients", bytes=4 * T),
            Part(name="optimizer", bytes=moments * T, spread=0.05),
        ]  # fmt: skip
    else:
        mine = T / ranks
        gathered = min(P, LIVE_ELEMENTS) * d if stage == 3 and ranks > 1 else 0.0
        gradients = 4 * (T if stage == 1 else mine)
        buckets = 2 * min(REDUCE_ELEMENTS, P) * 4
        parts = [
            Part(name="parameters", bytes=P * d if stage < 3 else P / ranks * d),
            Part(name="gradients", bytes=gradients + 4 * mine, spread=0.1),
            Part(name="optimizer", bytes=(4 + moments) * mine, spread=0.05),
            Part(name="communication", bytes=buckets + gathered, spread=0.3),
        ]
    rl = setting.run.rl
    if job.role == "actor" and setting.serves and rl is not None and rl.ema_decay is not None:
        parts.append(Part(name="average (rl.ema_decay)", bytes=4 * T / (ranks if stage else 1)))
    return parts


def _activations(setting: Setting, shape: Shape, tokens: int, *, trained: bool) -> list[Part]:
    """Of one micro-batch of so many tokens. Kept for the backward pass, per token and layer (Transformers'
    Llama with fused attention): both norms' input, normalised and scaled (6 h), query, keys, values and
    answer (3 q + 2 kv), gate, its activation, up and their product (4 f). In bfloat16 the norms' first two
    are float32, and on CPUs what attention keeps (actors/attention.py)."""
    model, workload = setting.run.model, setting.workload
    d, h = BYTES[model.dtype], shape.hidden
    f = shape.intermediate * max(1, shape.active_experts)
    attended = BYTES["float32"] if setting.device.is_cpu and model.attention == "sdpa" else d
    layer = 2 * (4 + 4 + d) * h + attended * 2 * (shape.q + shape.kv) + d * (shape.q + 4 * f)
    if model.attention == "eager":
        layer += 2 * 4 * shape.heads * workload.longest
    if not trained:
        kept, spread = 2 * d * h + d * (shape.q + 2 * shape.kv + 3 * f), 0.4
    elif model.gradient_checkpointing:
        kept, spread = shape.layers * d * h + layer, 0.25
    else:
        kept, spread = shape.layers * layer, 0.2
    parts = [Part(name="activations", bytes=tokens * kept, spread=spread)]
    if not shape.scalar:
        asked = tokens * workload.limit / workload.longest  # only positions of responses meet the vocabulary
        most = LOGITS_ON_CPU if setting.device.is_cpu else LOGITS_ON_GPU
        block = min(asked * shape.vocab, most) * 4
        parts.append(Part(name="logits", bytes=block * (3 if trained else 2), spread=0.3))
    return parts


def _transfer(setting: Setting, shape: Shape) -> Part:
    """Buckets under way to the engines, one being filled while one travels, and the largest tensor, cast."""
    engine = setting.run.engine
    dtype = BYTES[engine.dtype or setting.run.model.dtype]
    return Part(
        name="transfer", bytes=2 * engine.bucket_mb * MIB + shape.vocab * shape.hidden * dtype, spread=0.5
    )


def _engine(setting: Setting, shape: Shape) -> WorkerMemory:
    """One replica on CPUs; on GPUs one of its devices, of which vLLM takes what it is allowed whatever it
    needs."""
    engine, tp = setting.run.engine, setting.run.engine.tensor_parallel
    dtype = BYTES[engine.dtype or setting.run.model.dtype]
    weights = shape.params * dtype / tp
    if setting.device.is_cpu:
        kv = float((engine.kv_cache_mb or CPU_KV_CACHE_MIB) * MIB * tp)
        packed = (
            shape.active_params * dtype
        )  # oneDNN's copy beside the weights of tied heads and of the loader
        parts = [
            Part(name="parameters", bytes=weights * tp),
            Part(name="packed weights", bytes=packed if shape.tied else 0.0, spread=0.5),
            Part(name="KV cache", bytes=kv),
            _transfer(setting, shape),
        ]
        return WorkerMemory(role="engine", device=(), host=(*_process(setting, "engine"), *parts))
    working = vllm_working_bytes(setting, shape)
    if engine.kv_cache_mb:
        kv = float(engine.kv_cache_mb * MIB)
    else:
        kv = max(0.0, engine.gpu_memory_fraction * setting.device.memory - weights - working)
    graphs = 0.0 if engine.eager else setting.overheads.graphs
    parts = [
        Part(name="parameters", bytes=weights), Part(name="activations", bytes=working, spread=0.3),
        Part(name="KV cache", bytes=kv), Part(name="CUDA graphs", bytes=graphs, spread=0.6),
        Part(name="CUDA context", bytes=setting.overheads.cuda, spread=0.5), _transfer(setting, shape),
    ]  # fmt: skip
    loading = Part(name="loading", bytes=weights, spread=0.2)
    return WorkerMemory(role="engine", device=tuple(parts), host=(*_process(setting, "engine"), loading))


def vllm_working_bytes(setting: Setting, shape: Shape) -> float:
    """What vLLM's profiling run finds: the widest layer for a full prefill, and float32 logits of a full
    batch."""
    engine = setting.run.engine
    dtype = BYTES[engine.dtype or setting.run.model.dtype]
    widest = 2 * shape.intermediate / engine.tensor_parallel + 4 * shape.hidden
    return BATCHED_TOKENS * widest * dtype + engine.max_num_seqs * shape.vocab * 4 * 2


def kv_capacity(setting: Setting, shape: Shape) -> float:
    """Tokens whose keys and values one engine holds. With more workers than key heads each has a copy."""
    engine = setting.run.engine
    dtype = BYTES[engine.dtype or setting.run.model.dtype]
    worker = _engine(setting, shape)
    kv = next(part.bytes for part in (*worker.device, *worker.host) if part.name == "KV cache")
    split = min(engine.tensor_parallel, shape.kv_heads)
    if setting.device.is_cpu:
        return kv / engine.tensor_parallel / (shape.kv_bytes(dtype) / split)
    return kv / (shape.kv_bytes(dtype) / split)
