"""Adapters through PEFT: put into a model, and out of it again as plain weights or as a PEFT folder.

The base keeps its bits. Nothing is ever merged in place: ``plain_tensors`` says for each Hugging Face weight
which tensors make it, and merges one weight at a time, for whoever sends, exports or averages.

    lora      W + s B A                                s = alpha / rank
    dora      m (W + s B A) / |W + s B A|              norms of the rows, [out] (arXiv:2402.09353, equation 5)
    adalora   W + s B (E A)                            E the singular values, [rank, 1] (arXiv:2303.10512)
"""

import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from peft import AdaLoraConfig, LoraConfig, PeftConfig, inject_adapter_in_model
from peft.tuners.adalora import SVDLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.integrations import dequantize_module_weight
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from actors.adalora import RankSchedule
from actors.heads import ScalarHead
from actors.model import LanguageModel, PolicyModel
from actors.virtual_tokens import VirtualTokens
from orchestrator.config import Adapter

NAME = "default"  # PEFT's name of an adapter that is alone
WEIGHTS = "adapter_model.safetensors"
PROMPT = "prompt_embeddings"  # PEFT's name of what virtual tokens are, in its files
Value = Callable[[nn.Parameter], Tensor]  # a parameter's tensor: itself, or its average


def adapt(model: LanguageModel, adapter: Adapter, *, total_steps: int, name: str = NAME) -> None:
    """Freezes the model but its scalar heads, and adds the adapter's trained tensors.

    ``total_steps``: adalora's ranks fall over the middle of them. ValueError for layers that are not there.
    """
    dtype = next(model.parameters()).dtype
    model.requires_grad_(False)
    if adapter.merges:
        _inject(model, adapter, total_steps, name)
        _activate(model, name)
    else:
        model.virtual = VirtualTokens(adapter, model.model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    for module in model.modules():
        if isinstance(module, ScalarHead):
            module.requires_grad_(True)


def _inject(model: LanguageModel, adapter: Adapter, total_steps: int, name: str) -> None:
    backbone, targets = model.model.base_model, list(adapter.target_modules)
    if adapter.quantize is not None:
        backbone.is_loaded_in_4bit = True  # Transformers says it of the whole model only; PEFT asks here
    try:
        inject_adapter_in_model(peft_config(adapter, total_steps), backbone, name)
    except ValueError as error:
        linear = sorted({name.rpartition(".")[2] for name in linear_names(backbone)})
        raise ValueError(
            f"adapter.target_modules={targets}: no layer of {type(model.model).__name__} has such a name; "
            f"its linear layers are {', '.join(linear)}"
        ) from error
    for path, layer in layers_of(backbone):
        if not _is_linear(layer.get_base_layer()):
            raise ValueError(
                f"adapter.target_modules={targets} names {path}, which is no linear layer; leave it out"
            )


def _activate(model: LanguageModel, name: str) -> None:
    """Only this adapter is used and trained; PEFT switches on and off as it adds them."""
    for own, parameter in model.model.base_model.named_parameters():
        if ".lora_" in own:
            parameter.requires_grad_(f".{name}" in own)
    for _, layer in layers_of(model.model):
        layer._active_adapter = [name]


def add_trained(model: LanguageModel, folder: Path, name: str) -> None:
    """Another adapter beside what is there, read from a PEFT folder and frozen. ValueError for tensors that
    this model has no place for."""
    backbone = model.model.base_model
    config = PeftConfig.from_pretrained(folder)
    config.inference_mode = True
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # that is what is wanted
        inject_adapter_in_model(config, backbone, name)
    saved = load_file(folder / WEIGHTS)
    for own, parameter in model.model.named_parameters():
        if f".{name}" in own and ".lora_" in own:
            key = f"base_model.model.{_file_name(own, name)}"
            if key not in saved:
                raise ValueError(f"{folder / WEIGHTS} lacks {key}; it was trained on another model")
            parameter.data = saved[key].to(parameter.device, model.model.dtype)
    _activate(model, NAME)


@contextmanager
def using(model: nn.Module, name: str | None) -> Iterator[None]:
    """Forward passes go through this adapter alone, or through the base alone. PEFT's own switches would also
    change what is trained."""
    layers = [layer for _, layer in layers_of(model)]
    before = [(layer._active_adapter, layer._disable_adapters) for layer in layers]
    for layer in layers:
        layer._active_adapter, layer._disable_adapters = [name or NAME], name is None
    try:
        yield
    finally:
        for layer, (active, off) in zip(layers, before, strict=True):
            layer._active_adapter, layer._disable_adapters = active, off


def peft_config(adapter: Adapter, total_steps: int = 1) -> PeftConfig:
    """What PEFT calls the same. Without dropout, always: two looks at one token must agree (BUGS A13)."""
    targets = list(adapter.target_modules) or "all-linear"
    if adapter.kind == "adalora":
        warmup, final = total_steps // 10, total_steps // 2  # the paper's shares of its longer runs
        return AdaLoraConfig(
            init_r=adapter.initial_rank, target_r=adapter.rank, lora_alpha=adapter.alpha, tinit=warmup,
            tfinal=final, deltaT=max(1, total_steps // 100), total_step=max(total_steps, warmup + final + 1),
            target_modules=targets, orth_reg_weight=adapter.orthogonal_weight,
        )  # fmt: skip
    return LoraConfig(
        r=adapter.rank, lora_alpha=adapter.alpha, target_modules=targets, use_dora=adapter.kind == "dora"
    )


def rank_schedule(backbone: nn.Module) -> RankSchedule | None:
    """Of a backbone that adalora was added to."""
    if not any(isinstance(layer, SVDLinear) for _, layer in layers_of(backbone)):
        return None
    return RankSchedule(backbone, backbone.peft_config[NAME], NAME)


def freeze(model: LanguageModel, patterns: tuple[str, ...]) -> None:
    """No training for weights whose names match one. ValueError for a pattern without a match, or if nothing
    is left to train."""
    named = dict(model.model.named_parameters())
    for pattern in patterns:
        matched = [name for name in named if fnmatchcase(name, pattern)]
        if not matched:
            some = ", ".join(list(named)[:3])
            raise ValueError(
                f"model.freeze: {pattern!r} matches no weight of {type(model.model).__name__}; names are "
                f"like {some}"
            )
        for name in matched:
            named[name].requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(f"model.freeze={list(patterns)} leaves nothing to train; freeze less")


@dataclass(frozen=True, slots=True, kw_only=True)
class Plain:
    """One weight of the model as Hugging Face names it, and what it is made of."""

    name: str
    shape: tuple[int, ...]
    parts: tuple[nn.Parameter, ...]  # all that must be whole to make it
    layer: BaseTunerLayer | None  # None: it is parts[0], as it lies there
    adapter: str = NAME

    def whole(self, value: Value) -> Tensor:
        """In the type of the base weight; merged in float32."""
        if self.layer is None:
            return value(self.parts[0])
        return merged(self.layer, value, self.adapter)


def layers_of(model: nn.Module) -> list[tuple[str, BaseTunerLayer]]:
    return [(path, module) for path, module in model.named_modules() if isinstance(module, BaseTunerLayer)]


def plain_tensors(model: PreTrainedModel, adapter: str = NAME) -> list[Plain]:
    """The model's weights without a trace of the adapter, in their order, tied ones once."""
    layers = dict(layers_of(model))
    found: list[Plain] = []
    for name, parameter in model.named_parameters():
        path, inside, rest = name.partition(".base_layer.")
        layer = layers.get(path)
        if layer is not None and inside:
            own = dict(layer.named_parameters())
            trained = tuple(
                p for n, p in own.items() if not n.startswith("base_layer.") and f".{adapter}" in n
            )
            is_weight = rest == "weight" and adapter in layer.r
            base = layer.get_base_layer()
            shape = _whole_shape(parameter) if not hasattr(parameter, "quant_state") else _shape_of(base)
            found.append(
                Plain(
                    name=f"{path}.{rest}", shape=shape, adapter=adapter,
                    parts=(parameter, *trained) if is_weight else (parameter,),
                    layer=layer if is_weight else None,
                )
            )  # fmt: skip
        elif not any(name.startswith(f"{path}.") for path in layers if path in name):
            found.append(Plain(name=name, shape=_whole_shape(parameter), parts=(parameter,), layer=None))
    return found


def merged(layer: BaseTunerLayer, value: Value, adapter: str) -> Tensor:
    """The layer's weight with the adapter in it; the layer stays as it is."""
    base = layer.get_base_layer()
    weight = value(base.weight) if not hasattr(base.weight, "quant_state") else dequantize_module_weight(base)
    dtype, turned = weight.dtype, bool(getattr(layer, "fan_in_fan_out", False))  # Conv1D keeps [in, out]
    rows = (weight.T if turned else weight).float()
    if isinstance(layer, SVDLinear):
        a, b, e = (value(part[adapter]).float() for part in (layer.lora_A, layer.lora_B, layer.lora_E))
        scale = layer.scaling[adapter] / (float(layer.ranknum[adapter]) + 1e-5)  # PEFT's denominator
        rows = rows + b @ (a * e) * scale
    else:
        a, b = (value(part[adapter].weight).float() for part in (layer.lora_A, layer.lora_B))
        rows = rows + b @ a * layer.scaling[adapter]
        if adapter in layer.lora_magnitude_vector:
            magnitude = value(layer.lora_magnitude_vector[adapter].weight).float()
            rows = rows * (magnitude / rows.norm(dim=1))[:, None]
    return (rows.T if turned else rows).to(dtype).contiguous()


def peft_tensors(model: PreTrainedModel, adapter: str = NAME) -> list[tuple[str, nn.Parameter]]:
    """The trained tensors under the names of PEFT's files, e.g.
    base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight."""
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    own = [(n, p) for n, p in trained if ".lora_" not in n or f".{adapter}" in n]
    return [(f"base_model.model.{_file_name(n, adapter)}", p) for n, p in own]


def write_peft(
    folder: Path, model: LanguageModel, adapter: Adapter, base: str, tensors: dict[str, Tensor]
) -> None:
    """A folder that ``PeftModel.from_pretrained`` and ``quartet export`` read."""
    config = model.virtual.config if model.virtual is not None else peft_config(adapter)
    classifier = not isinstance(model, PolicyModel)  # a shared backbone has heads of others as well
    config.task_type = "SEQ_CLS" if classifier else "CAUSAL_LM"
    config.base_model_name_or_path, config.inference_mode = base, True
    if adapter.merges:
        found = {path.rpartition(".")[2] for path, _ in layers_of(model.model)}
        config.target_modules = sorted(adapter.target_modules or found)
        config.modules_to_save = ["score"] if classifier else None
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / WEIGHTS, metadata={"format": "pt"})


def base_of(folder: Path) -> str:
    """The model that a PEFT folder was trained on."""
    return str(json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"])


def _file_name(name: str, adapter: str) -> str:
    if name.endswith(f"lora_magnitude_vector.{adapter}.weight"):
        name = name.removesuffix(".weight")
    return name.replace(f".{adapter}", "")


def linear_names(backbone: nn.Module) -> list[str]:
    """Of the layers that may have an adapter."""
    return [name for name, module in backbone.named_modules() if _is_linear(module)]


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | Conv1D)


def _whole_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """Under ZeRO-3 a parameter is a shard that remembers its shape."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _shape_of(layer: nn.Linear) -> tuple[int, ...]:
    return layer.out_features, layer.in_features
