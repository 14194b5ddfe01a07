"""On CPUs an update is written into the model where it stands.

vLLM's own reload takes the model apart, finds out again where every tensor belongs and puts it back: a
millisecond per tensor, however small, for which all requests under way wait. For the families below, whole in
one worker, it is known beforehand: a tensor is a parameter, or some rows of one.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

from actors.weights.wire import TensorMeta

# Those whose loader in vLLM only stacks (packed_modules_mapping), transposes nothing and adds nothing.
FAMILIES = frozenset({"LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A parameter of vLLM's model, and the tensors that are its rows, from the first down."""

    name: str
    module: nn.Module
    leaf: str
    parts: tuple[str, ...]

    def shape(self) -> list[int]:
        """A linear layer's weight lies packed in its kernel, and the parameter is empty."""
        if isinstance(self.module, LinearBase) and self.leaf == "weight":
            return [self.module.output_size, self.module.input_size]
        rows, *rest = getattr(self.module, self.leaf).shape
        if isinstance(self.module, VocabParallelEmbedding):  # the parameter has rows to spare
            rows = self.module.org_vocab_size
        return [rows, *rest]

    def write(self, tensors: Sequence[Tensor]) -> None:
        whole = tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))
        stands = getattr(self.module, self.leaf)
        if stands.numel():
            stands.data[: len(whole)].copy_(whole)
            return
        setattr(self.module, self.leaf, nn.Parameter(whole, requires_grad=False))
        try:
            self.module.quant_method.process_weights_after_loading(self.module)  # packs it
        finally:
            setattr(self.module, self.leaf, stands)


class InPlace:
    """Takes the place of the model for a transport: see ``receivers.Tap``."""

    def __init__(self, places: Sequence[Place]) -> None:
        self._place_of = {part: place for place in places for part in place.parts}

    def load_weights(self, pairs: Iterable[tuple[str, Tensor]]) -> set[str]:
        held: dict[str, Tensor] = {}
        written = set()
        for name, tensor in pairs:
            held[name] = tensor
            place = self._place_of[name]
            if all(part in held for part in place.parts):
                place.write([held.pop(part) for part in place.parts])
                written.add(place.name)
        return written


def places(model: nn.Module, tensors: Sequence[TensorMeta]) -> list[Place] | None:
    """One per parameter; None where vLLM's own reload has to do it."""
    if type(model).__name__ not in FAMILIES:
        return None
    shapes = {meta.name: list(meta.shape) for meta in tensors}
    found = [_place(model, name) for name, _ in model.named_parameters()]
    used = [part for place in found for part in place.parts]
    return found if sorted(used) == sorted(shapes) and all(_fits(p, shapes) for p in found) else None


def _place(model: nn.Module, name: str) -> Place:
    path, leaf = name.rsplit(".", 1)
    parent, _, last = path.rpartition(".")
    stacked = model.packed_modules_mapping.get(last, [last])
    parts = tuple(f"{parent}.{part}.{leaf}".lstrip(".") for part in stacked)
    return Place(name=name, module=model.get_submodule(path), leaf=leaf, parts=parts)


def _fits(place: Place, shapes: dict[str, list[int]]) -> bool:
    method = getattr(place.module, "quant_method", None)
    if isinstance(place.module, LinearBase) and not isinstance(method, UnquantizedLinearMethod):
        return False
    rows = sum(shapes[part][0] for part in place.parts)
    return [rows, *shapes[place.parts[0]][1:]] == place.shape()
