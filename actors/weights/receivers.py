"""The engine's end: vLLM's weight-transfer engines, tapped.

vLLM imports the module of ``worker_extension_cls`` in each worker before the model loads; importing this one
registers the three transports. A tap stands between the transport and ``model.load_weights`` and takes the
checksum of every tensor as it arrived. vLLM's own life cycle stays: layers are re-created on ``meta`` at the
start, loaded one by one, and put back at the end; but see ``in_place.py`` for CPUs.
"""

import multiprocessing
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributed import ProcessGroupGloo
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from actors.engine_sampler import RolloutSampler
from actors.vital_signs import die_with_parent
from actors.weights import gloo
from actors.weights.checksum import digest, resolve
from actors.weights.in_place import InPlace, Place, places
from actors.weights.served_adapter import serve_adapter
from actors.weights.wire import ServedAdapter, TensorMeta, num_bytes, plan


@dataclass(kw_only=True)  # vLLM's base is not frozen, so this cannot be
class ReceiverInit(WeightTransferInitInfo):
    """``wire.Address.plain``: names and shapes come once, at the opening."""

    host: str
    port: int
    rank_offset: int
    world_size: int
    dtype: str
    bucket_bytes: int
    timeout_s: float
    names: list[str]
    shapes: list[list[int]]
    adapter: dict[str, Any] | None  # ``wire.ServedAdapter``

    def tensors(self) -> list[TensorMeta]:
        pairs = zip(self.names, self.shapes, strict=True)
        return [TensorMeta(name=name, shape=tuple(shape)) for name, shape in pairs]


@dataclass(kw_only=True)  # vLLM's base is not frozen, so this cannot be
class ReceiverUpdate(WeightTransferUpdateInfo):
    version: int


class Loader(Protocol):
    """vLLM's model, or ``InPlace``."""

    def load_weights(self, pairs: Iterable[tuple[str, Tensor]], /) -> set[str] | None: ...


class Tap:
    """Has the one method that transports call on a model, and remembers what went through."""

    def __init__(self, model: Loader, missing: set[str]) -> None:
        self._model, self.missing = model, missing
        self.digests: dict[str, Tensor] = {}

    def load_weights(self, pairs: Iterable[tuple[str, Tensor]]) -> set[str] | None:
        loaded = self._model.load_weights(self._watch(pairs))
        self.missing -= self.missing if loaded is None else loaded  # some models do not say
        return loaded

    def _watch(self, pairs: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in pairs:
            self.digests[name] = digest(tensor)
            yield name, tensor


class Catch(Tap):
    """Keeps what went through: transports reuse their buffers."""

    def __init__(self) -> None:
        self.missing: set[str] = set()
        self.digests: dict[str, Tensor] = {}
        self.tensors: dict[str, Tensor] = {}

    def load_weights(self, pairs: Iterable[tuple[str, Tensor]]) -> set[str]:
        for name, tensor in self._watch(pairs):
            self.tensors[name] = tensor.clone()
        return set(self.tensors)


class TappedReceiver(WeightTransferEngine[ReceiverInit, ReceiverUpdate]):
    """What the transports share; each says how it joins and how an update arrives.

    Joining waits until the first update: so the sender's ``open`` and ``join_weights`` wait for nobody.
    """

    init_info_cls = ReceiverInit
    update_info_cls = ReceiverUpdate

    def init_transfer_engine(self, init_info: ReceiverInit) -> None:
        self.shutdown()
        self.address, self.joined = init_info, False

    def places(self) -> Sequence[Place] | None:
        """Where an update is written without taking the model apart."""
        return None

    def start_weight_update(self) -> None:
        # vLLM's names (q, k and v are one), before the model goes to meta, where tied tensors come apart.
        self.missing = {name for name, _ in self.model.named_parameters()}
        found = self.places()
        self.in_place = None if found is None else InPlace(found)
        if self.in_place is None:
            initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: ReceiverUpdate) -> None:
        self._receive(Tap(self.in_place or self.model, self.missing), update_info.version)
        if self.tap.missing:
            raise ValueError(
                f"the sender left out {sorted(self.tap.missing)[:5]}: vLLM would keep their old values"
            )

    def receive_adapter(self, version: int, manager: LRUCacheWorkerLoRAManager) -> None:
        """The tensors are A and B of the one adapter this engine serves; the model itself stays."""
        assert self.address.adapter is not None
        catch = Catch()
        self._receive(catch, version)
        serve_adapter(manager, catch.tensors, ServedAdapter(**self.address.adapter))

    def _receive(self, tap: Tap, version: int) -> None:
        if not self.joined:
            self.join()
            self.joined = True
        model, self.tap = self.model, tap
        self.model = tap  # type: ignore[assignment]
        try:
            with torch.no_grad():
                self.version = self.arrive(version)
        finally:
            self.model = model

    def finish_weight_update(self) -> None:
        if self.in_place is None:
            finalize_layerwise_reload(self.model, self.model_config)
        refresh_embeddings(self.model)

    def receipt(self) -> dict[str, Any]:
        total = num_bytes(self.address.tensors(), getattr(torch, self.address.dtype))
        return {"version": self.version, "checksums": resolve(self.tap.digests), "num_bytes": total}

    def join(self) -> None:
        """Blocks until the sender and all workers have come."""
        raise NotImplementedError

    def arrive(self, version: int) -> int:
        """Passes every tensor to ``self.model.load_weights``; returns the version that the sender sent."""
        raise NotImplementedError

    def let_go(self) -> None:
        """After a failure: whoever still waits for this end learns of it, where the transport can say so."""

    def rank(self) -> int:
        parallel = self.parallel_config
        return self.address.rank_offset + parallel.data_parallel_index * parallel.world_size + parallel.rank


def refresh_embeddings(model: torch.nn.Module) -> None:
    """vLLM's CPU kernels keep a packed copy of ``lm_head`` made at load time, and with tied embeddings the
    layerwise reload does not refresh it: logits would stay those of the first weights, 2.5 nats off, without
    an error. Where there is a head of its own, no other embedding is multiplied with."""
    embeddings = [module for module in model.modules() if isinstance(module, VocabParallelEmbedding)]
    heads = [module for module in embeddings if isinstance(module, ParallelLMHead)]
    for module in heads or embeddings:
        if isinstance(module.quant_method, UnquantizedEmbeddingMethod):
            module.quant_method.process_weights_after_loading(module)


class GlooReceiver(TappedReceiver):
    _group: ProcessGroupGloo | None = None

    def places(self) -> Sequence[Place] | None:
        alone = self.parallel_config.world_size == 1
        return places(self.model, self.address.tensors()) if alone else None

    def join(self) -> None:
        at = self.address
        self._store = gloo.connect(at.host, at.port, at.timeout_s)  # must outlive the group
        self._group = gloo.join(self._store, self.rank(), at.world_size, at.timeout_s)
        self._dtype = getattr(torch, at.dtype)
        self._buckets = plan(at.tensors(), self._dtype, at.bucket_bytes)

    def arrive(self, version: int) -> int:
        sent = gloo.receive_version(self._group)
        pairs = gloo.receive(self._group, self._buckets, self._dtype)
        self.model.load_weights((name, tensor.to(self.device)) for name, tensor in pairs)
        return sent

    def let_go(self) -> None:
        if self._group is not None:
            self._group.abort()
        self.shutdown()

    def shutdown(self) -> None:
        self._group = self._store = None


class WorkerExtension:
    """Methods that vLLM adds to its worker class, for ``collective_rpc``."""

    rank: int
    model_runner: Any
    vllm_config: VllmConfig
    weight_transfer_engine: TappedReceiver
    start_weight_update: Callable[[], None]  # these three are vLLM's
    update_weights: Callable[[dict[str, Any]], None]
    finish_weight_update: Callable[[], None]

    def draw_in_blocks(self) -> None:
        """On CPUs, but not on those where vLLM samples in plain PyTorch."""
        if self.model_runner.sampler.topk_topp_sampler.forward.__name__ == "forward_cpu":
            self.model_runner.sampler = RolloutSampler()

    def apply_weight_update(self, version: int) -> dict[str, Any]:
        """vLLM's three verbs of an update in one call, so that no step can fall between them; or the
        adapter's.

        After a failure the layers are put back too, some with old and some with new weights: nobody may be
        served, but a whole update finds the model as it expects it.
        """
        receiver = self.weight_transfer_engine
        if receiver.address.adapter is not None:
            receiver.receive_adapter(version, self.model_runner.lora_manager)
            return {"worker": self.rank, **receiver.receipt()}
        self.start_weight_update()
        try:
            self.update_weights({"version": version})
        except Exception:
            receiver.let_go()
            with set_current_vllm_config(self.vllm_config):
                receiver.finish_weight_update()  # the worker's own refuses: it has forgotten the update
            raise
        self.finish_weight_update()
        return {"worker": self.rank, **self.weight_transfer_engine.receipt()}


def register() -> None:
    """vLLM refuses a second registration, and a worker that was forked from one has the first."""
    known = WeightTransferEngineFactory._registry
    if "quartet_gloo" not in known:
        WeightTransferEngineFactory.register_engine("quartet_gloo", GlooReceiver)
        WeightTransferEngineFactory.register_engine("quartet_nccl", "actors.weights.nccl", "NcclReceiver")
        WeightTransferEngineFactory.register_engine("quartet_ipc", "actors.weights.ipc", "IpcReceiver")


register()
if multiprocessing.parent_process() is not None:  # one of vLLM's processes, which outlive a killed engine
    die_with_parent()
