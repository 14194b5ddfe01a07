"""A learner's training state in files that do not know how many ranks or which ZeRO stage wrote them.

    rank-00000.safetensors   the pieces of the float32 weights that rank 0's optimizer owns, its moments of
                             them, their moving average, and the random number generators of the rank
    rank-00001.safetensors   ...

Each tensor is named "kind:first element:parameter", e.g. "exp_avg:4096:model.layers.0.mlp.up_proj.weight":
a run of elements of the flattened parameter. A reader takes from all files the elements it owns, so a save
of two ranks at stage 3 loads on one rank at stage 0, bit for bit. No collective on either way: a rank writes
what it has and reads what it needs, and ``snapshot`` is apart from ``write`` so that training goes on beside
the writing. Safetensors hold numbers only: nothing in a checkpoint can run code.
"""

import json
import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from actors.shards import Piece, Shard

WEIGHT, AVERAGE = "weight", "average"
MOMENTS = ("exp_avg", "exp_avg_sq", "momentum")  # of AdamW, and Muon's for matrices


class NonFiniteStateError(ValueError):
    """NaN or infinity in what would be saved or sent."""


def all_finite(tensors: Sequence[Tensor]) -> Tensor:
    """One bool. The smallest and the largest element are NaN where any is; one pass that takes no memory, and
    on CPUs a sixth of the time of a norm."""
    ends = [torch.stack(torch.aminmax(t.detach())).float() for t in tensors if t.numel()]
    return torch.stack(ends).isfinite().all() if ends else torch.tensor(True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """One rank's share, copied out of the way of the next step."""

    tensors: dict[str, Tensor]  # on the CPU
    header: dict[str, Any]  # counts, world_size, steps by parameter

    def write(self, folder: Path) -> None:
        """Raises OSError on a full disk. Whoever gathers the ranks puts it on disk and names it valid."""
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"rank-{self.header['rank']:05d}.safetensors"
        try:
            save_file(self.tensors, file, metadata={"state": json.dumps(self.header)})
        except SafetensorError as error:  # what the disk said, in an error type of their own
            raise OSError(f"{file} could not be written: {error}") from error


@dataclass(frozen=True, slots=True, kw_only=True)
class Owned:
    """What one rank trains: its shards, what its optimizer keeps of them, their average, and their names."""

    shards: Sequence[Shard]
    averages: Sequence[Tensor] | None  # as the shards; None: none is kept
    optimizer: torch.optim.Optimizer
    names: dict[int, str]  # id of a parameter -> its name

    def kinds(self) -> Iterator[tuple[Shard, str, Tensor]]:
        """Every tensor laid out as a shard."""
        for number, shard in enumerate(self.shards):
            yield shard, WEIGHT, shard.owned.detach()
            if self.averages is not None:
                yield shard, AVERAGE, self.averages[number]
            for kind, tensor in self.optimizer.state.get(shard.owned, {}).items():
                if kind in MOMENTS:
                    yield shard, kind, tensor

    def name(self, parameter: nn.Parameter) -> str:
        return self.names[id(parameter)]


def snapshot(owned: Owned, counts: dict[str, int]) -> Snapshot:
    """A copy of this rank's share; raises NonFiniteStateError instead of one that must not be saved."""
    rank, tensors = dist.get_rank(), {}
    steps: dict[str, float] = {}
    for shard, kind, tensor in owned.kinds():
        if shard.replicated and rank > 0:
            continue
        flat = tensor.reshape(-1)
        for piece in shard.pieces:
            if piece.here.stop > piece.here.start:
                name = owned.name(piece.parameter)
                part = flat[piece.here].to("cpu", copy=True).contiguous()
                if not all_finite([part]):
                    raise NonFiniteStateError(f"{kind} of {name} is not finite: it is not saved")
                tensors[f"{kind}:{piece.there.start}:{name}"] = part
        if kind in MOMENTS:
            step = float(owned.optimizer.state[shard.owned]["step"])
            steps |= {owned.name(piece.parameter): step for piece in shard.pieces}
    header = {**counts, "rank": rank, "world_size": dist.get_world_size(), "steps": steps}
    return Snapshot(tensors=tensors | _generators(), header=header)


def restore(owned: Owned, folder: Path) -> dict[str, Any]:
    """Fills the shards, the moments and the average, and answers the header of a rank.

    The 16-bit or gathered copies of the weights are the caller's to refresh. Raises ValueError when the
    folder holds no training state, or of another model, optimizer or without the average.
    """
    with ExitStack() as stack:
        saved = Saved(folder, stack)
        for number, shard in enumerate(owned.shards):
            names = [owned.name(piece.parameter) for piece in shard.pieces]
            saved.fill(shard.owned, WEIGHT, shard.pieces, names)
            if owned.averages is not None:
                saved.fill(owned.averages[number], AVERAGE, shard.pieces, names)
            if moments := saved.moments(names):
                state = owned.optimizer.state[shard.owned]
                state.clear()
                # AdamW's fused kernel reads the step on the device; Muon counts on the CPU.
                where = "cpu" if "momentum" in moments else shard.owned.device
                state["step"] = torch.tensor(saved.steps[names[0]], device=where)
                for kind in moments:
                    state[kind] = torch.zeros_like(shard.owned)
                    saved.fill(state[kind], kind, shard.pieces, names)
        saved.set_generators()
        return saved.header


class Saved:
    """The files of all ranks of one save, read piece by piece."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.folder = folder
        self._runs: dict[tuple[str, str], list[tuple[int, int, Any, str]]] = defaultdict(list)
        self.steps: dict[str, float] = {}
        self._files = [
            stack.enter_context(safe_open(path, "pt")) for path in sorted(folder.glob("rank-*.safetensors"))
        ]
        for file in self._files:
            self.header = json.loads(file.metadata()["state"])
            self.steps |= self.header["steps"]
            for key in file.keys():  # noqa: SIM118 - a file of safetensors is no dict
                kind, begin, name = key.split(":", 2)
                size = file.get_slice(key).get_shape()[0]
                self._runs[kind, name].append((int(begin), int(begin) + size, file, key))
        if not self._files or len(self._files) != self.header["world_size"]:
            raise ValueError(
                f"{folder} holds no training state, or not of all its ranks; give the folder that save wrote"
            )

    def moments(self, names: Sequence[str]) -> list[str]:
        """The kinds that were kept of these parameters: none before the first step."""
        return [kind for kind in MOMENTS if any((kind, name) in self._runs for name in names)]

    def fill(self, target: Tensor, kind: str, pieces: Sequence[Piece], names: Sequence[str]) -> None:
        flat = target.detach().view(-1)
        for piece, name in zip(pieces, names, strict=True):
            first, last = piece.there.start, piece.there.stop
            missing = last - first
            for begin, end, file, key in self._runs.get((kind, name), ()):
                low, high = max(first, begin), min(last, end)
                if low < high:
                    at = piece.here.start + low - first
                    flat[at : at + high - low] = file.get_slice(key)[low - begin : high - begin].to(flat)
                    missing -= high - low
            if missing:
                raise ValueError(self._complaint(kind, name, missing))

    def _complaint(self, kind: str, name: str, missing: int) -> str:
        if kind == AVERAGE:
            return (
                f"{self.folder} holds no moving average: the checkpoint was written without rl.ema_decay; "
                "resume without it, or start over"
            )
        return (
            f"{self.folder}: {missing} elements of {kind} of {name} are missing; the checkpoint is of other "
            "models or optimizers: resume with those it was written with"
        )

    def set_generators(self) -> None:
        """Only with the number of ranks of the save: other ranks draw other numbers anyway."""
        rank, size = dist.get_rank(), dist.get_world_size()
        if size != self.header["world_size"] or rank >= len(self._files):
            return
        file, stored = self._files[rank], set(self._files[rank].keys())
        torch.set_rng_state(file.get_tensor("generator:0:torch"))
        random.setstate((3, tuple(file.get_tensor("generator:0:python").tolist()), None))
        if torch.cuda.is_available() and "generator:0:cuda" in stored:
            torch.cuda.set_rng_state(file.get_tensor("generator:0:cuda"))


def _generators() -> dict[str, Tensor]:
    states = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor(random.getstate()[1], dtype=torch.int64),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return {f"generator:0:{name}": state for name, state in states.items()}
