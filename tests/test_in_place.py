"""Where an update on CPUs is written without vLLM's reload, and where it is not."""

from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

from actors.weights.in_place import InPlace, places
from actors.weights.wire import TensorMeta


class Qwen2ForCausalLM(nn.Module):
    """Parameters as in vLLM's class of this name: q, k and v are the rows of one."""

    packed_modules_mapping: ClassVar = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.ModuleDict({"qkv_proj": nn.Linear(2, 4)})
        self.norm = nn.LayerNorm(2, bias=False)


class GPT2LMHeadModel(Qwen2ForCausalLM):
    """Its loader transposes."""


def sent() -> dict[str, Tensor]:
    rows = {"q_proj": [[1.0, 2.0], [3.0, 4.0]], "k_proj": [[5.0, 6.0]], "v_proj": [[7.0, 8.0]]}
    bias = {"q_proj": [0.1, 0.2], "k_proj": [0.3], "v_proj": [0.4]}
    return {
        **{f"attn.{part}.weight": torch.tensor(values) for part, values in rows.items()},
        "norm.weight": torch.tensor([9.0, 10.0]),
        **{f"attn.{part}.bias": torch.tensor(values) for part, values in bias.items()},
    }


def metas(tensors: dict[str, Tensor]) -> list[TensorMeta]:
    return [TensorMeta(name=name, shape=tuple(tensor.shape)) for name, tensor in tensors.items()]


def test_each_tensor_is_written_into_its_rows_of_the_parameter_that_stands() -> None:
    model, tensors = Qwen2ForCausalLM(), sent()
    stands = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    found = places(model, metas(tensors))
    assert found is not None
    written = InPlace(found).load_weights(reversed(tensors.items()))
    assert written == set(stands) == {name for name, _ in model.named_parameters()}
    linear = model.attn["qkv_proj"]
    assert linear.weight.tolist() == [[1, 2], [3, 4], [5, 6], [7, 8]]
    assert torch.equal(linear.bias, torch.tensor([0.1, 0.2, 0.3, 0.4]))
    assert model.norm.weight.tolist() == [9, 10]
    assert {name: parameter.data_ptr() for name, parameter in model.named_parameters()} == stands


def test_a_parameter_is_written_only_when_all_its_rows_have_come() -> None:
    model, tensors = Qwen2ForCausalLM(), sent()
    found = places(model, metas(tensors))
    del tensors["attn.k_proj.weight"]
    assert "attn.qkv_proj.weight" not in InPlace(found).load_weights(tensors.items())


@pytest.mark.parametrize("change", ["left out", "one more", "other shape"])
def test_whatever_is_not_exactly_so_is_left_to_vllm(change: str) -> None:
    tensors = sent()
    if change == "left out":
        del tensors["norm.weight"]
    elif change == "one more":
        tensors["attn.rotary"] = torch.ones(2)
    else:
        tensors["attn.q_proj.weight"] = torch.ones(3, 2)
    assert places(Qwen2ForCausalLM(), metas(tensors)) is None


def test_a_family_whose_loader_may_do_more_is_left_to_vllm() -> None:
    assert places(GPT2LMHeadModel(), metas(sent())) is None
