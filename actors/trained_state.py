"""What a checkpoint keeps of a model: the tensors that are trained. The frozen ones are in the
model's folder."""

from typing import Any

from torch import Tensor, nn


def trained_state(
    module: nn.Module,
    destination: dict[str, Any] | None = None,
    prefix: str = "",
    keep_vars: bool = False,
    exclude_frozen_parameters: bool = False,
) -> dict[str, Tensor]:
    """DeepSpeed's ``module_state_dict``, which forgets that a frozen weight may have a second name."""
    state = module.state_dict(destination=destination, prefix=prefix, keep_vars=keep_vars)
    if exclude_frozen_parameters:
        for name, parameter in module.named_parameters(remove_duplicate=False):
            if not parameter.requires_grad:
                own = prefix + name  # a 4-bit weight has its scales under names that go on from its own
                for key in [key for key in state if key == own or key.startswith(f"{own}.")]:
                    del state[key]
    return state


def load_trained(*, src: dict[str, Tensor], dst: nn.Module) -> None:
    """Into the trained tensors; frozen ones are in no checkpoint. ValueError when the two differ."""
    trained = {name for name, parameter in dst.named_parameters() if parameter.requires_grad}
    found = dst.load_state_dict(src, strict=False)
    missing = sorted(trained.intersection(found.missing_keys))
    if missing or found.unexpected_keys:
        raise ValueError(
            f"the checkpoint holds other trained tensors than this run has: missing {missing[:3]}, extra "
            f"{found.unexpected_keys[:3]}; resume with the adapter and freeze that it was written with"
        )
