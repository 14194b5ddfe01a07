"""The exponential moving average of the weights under training: steadier than the last step's, and exported
beside it.

    average = decay * average + (1 - decay) * weights      once per optimizer step that was taken

Float32, and each rank averages what its optimizer owns (``shards.py``): no rank holds more than its share.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from actors.shards import Shard


class Average:
    """Starts as the weights themselves."""

    def __init__(self, shards: list[Shard], decay: float) -> None:
        self._shards, self._decay = shards, decay
        self._averages = [shard.owned.detach().clone().float() for shard in shards]

    @torch.no_grad()
    def update(self) -> None:
        owned = [shard.owned.detach() for shard in self._shards]
        torch._foreach_lerp_(self._averages, owned, 1 - self._decay)

    @property
    def tensors(self) -> list[Tensor]:
        """This rank's share, laid out as the shards."""
        return self._averages

    def whole(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Every trained parameter with its whole average. Collective; a tensor is valid until the next."""
        for shard, average in zip(self._shards, self._averages, strict=True):
            for piece in shard.pieces:
                tensor = shard.whole(average, piece, everywhere=True)
                assert tensor is not None
                yield piece.parameter, tensor


def average_of(averages: dict[int, Tensor], parameter: nn.Parameter) -> Tensor:
    """Of a parameter that is not trained, or on a rank that keeps no averages: itself."""
    average = averages.get(id(parameter))
    return parameter.detach() if average is None else average.to(parameter.device)
