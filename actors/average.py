"""The exponential moving average of the weights under training: steadier than the last step's, and exported
beside it.

    average = decay * average + (1 - decay) * weights      once per optimizer step that was taken

Float32, and each rank averages what its optimizer owns (``shards.py``): no rank holds more than its share.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
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

    def save(self, folder: Path) -> None:
        """Each rank its share, into a file of its own."""
        torch.save([average.cpu() for average in self._averages], self._file(folder))

    def load(self, folder: Path) -> None:
        """Raises ValueError when the folder holds no average of this rank."""
        file = self._file(folder)
        if not file.exists():
            raise ValueError(
                f"{file} is missing: the checkpoint was written without rl.ema_decay; resume without it, or "
                "start over"
            )
        saved = torch.load(file, weights_only=True)
        for average, mine in zip(saved, self._averages, strict=True):
            mine.copy_(average)

    def whole(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Every trained parameter with its whole average. Collective; a tensor is valid until the next."""
        for shard, average in zip(self._shards, self._averages, strict=True):
            for piece in shard.pieces:
                tensor = shard.whole(average, piece, everywhere=True)
                assert tensor is not None
                yield piece.parameter, tensor

    @staticmethod
    def _file(folder: Path) -> Path:
        return folder / f"average-{dist.get_rank()}.pt"


def average_of(averages: dict[int, Tensor], parameter: nn.Parameter) -> Tensor:
    """Of a parameter that is not trained, or on a rank that keeps no averages: itself."""
    average = averages.get(id(parameter))
    return parameter.detach() if average is None else average.to(parameter.device)
