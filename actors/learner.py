"""A role under training: one optimizer step from this rank's part of a minibatch.

The weights of a minibatch sum to 1 over all ranks, each rank's loss is ``(weights * values).sum()`` over its
own rows, and gradients are summed: so the step cannot depend on the number of ranks or micro-batches, or on
padding.

Every rank runs the same number of micro-batches (each forward pass is a collective under ZeRO-3). A rank
without rows for one of them gets an empty list and runs the first rows that belong together with weights of
zero.
"""

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoTokenizer

from actors.adapter import PROMPT, adapt, freeze, write_peft
from actors.backend import Backend
from actors.model import LanguageModel
from actors.worker import Worker
from orchestrator.batch import Batch, Examples, Experience, Loss, Minibatch, PolicyOutput
from orchestrator.collate import take
from orchestrator.config import Model, Optimizer
from orchestrator.roles import Residency
from orchestrator.work import Work

MicroBatches = Sequence[Sequence[int]]  # each a list of positions into the rows of a minibatch or batch
LossFunction = Callable[[Any, Any], Loss]  # (what the model says, the records it says it of) -> Loss
ADAPTER = "adapter"  # the PEFT folder in a checkpoint, and the ending of its name beside an export
R = TypeVar("R", Batch, Experience, Examples)


class Learner(Worker):
    """Wraps a model and its loss. Subclasses say which model, and what it is asked."""

    verbs: ClassVar[dict[str, Work]] = {
        "update_rows": Work.UPDATE,
        "score": Work.SCORE,
        "save": Work.SAVE,
        "load": Work.LOAD,
        "export": Work.SAVE,
    }
    ema_decay: float | None = None  # of an average of the weights; None: none is kept

    def __init__(self, *, model: Model, optimizer: Optimizer, total_steps: int, loss: LossFunction) -> None:
        self.model, self.optimizer, self.total_steps, self.loss = model, optimizer, total_steps, loss
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None  # a save in the background

    @abstractmethod
    def load_model(self) -> LanguageModel:
        """Equal on every rank."""

    @abstractmethod
    def figures(self, part: Any) -> Tensor:
        """What ``score`` answers of some rows, [b, T] or [b]."""

    def output(self, part: Any, weights: Tensor) -> Any:
        """What the loss function gets of some rows, which weigh so in the loss."""
        return self.figures(part)

    def start(self) -> None:
        model = self.load_model()
        if self.model.adapter is not None:
            adapt(model, self.model.adapter, total_steps=self.total_steps)
        freeze(model, self.model.freeze)
        self.backend = Backend(model, self.optimizer, total_steps=self.total_steps, ema_decay=self.ema_decay)

    def update(self, minibatch: Minibatch, micro_batches: MicroBatches) -> dict[str, float]:
        """Exactly one optimizer step over all ranks; the same figures on every rank.

        ``loss`` and ``num_tokens`` are sums over the minibatch, the loss's own metrics are means by weight.
        """
        if not micro_batches:
            raise ValueError(
                f"{self.role} rank {self.rank} got no micro-batch; give it [[]] to take part without rows"
            )
        sums: dict[str, Tensor] = {}
        figures: dict[str, float] = {}
        for number, positions in enumerate(micro_batches, start=1):
            part, weights = self._cut(minibatch, positions)
            output = self.output(part, weights)
            loss = self.loss(output, part)
            if loss.values.shape != weights.shape:
                raise ValueError(
                    f"{self.role}: the loss has shape {tuple(loss.values.shape)} but its weights "
                    f"{tuple(weights.shape)}"
                )
            total, last = weigh(loss.values, weights), number == len(micro_batches)
            if isinstance(output, PolicyOutput) and output.carrier is not None:
                total = total + output.carrier
            num_tokens = part.action_mask.sum() * bool(positions)
            measured = {"loss": total.detach(), "num_tokens": num_tokens, "weight": weights.sum()}
            measured |= {f"metrics/{name}": weigh(metric, weights) for name, metric in loss.metrics.items()}
            for name, figure in measured.items():  # on the device: reading a figure here would wait for it
                sums[name] = sums.get(name, 0.0) + figure.double()
            if last:
                figures = _means(self._add_over_ranks(sums))
                if not math.isfinite(figures["loss"]):
                    # Its gradient may be finite all the same (NaN + 0 x weights): none of it may be stepped.
                    total = total * math.nan
            self.backend.accumulate(total, last=last)
        return figures | self.backend.step()

    def update_rows(
        self, records: Experience | Examples, rows: NDArray, weights: NDArray, micro_batches: MicroBatches
    ) -> dict[str, float]:
        """``update`` as Ray calls it: records as an argument of their own travel by reference, arrays faster
        than tensors."""
        minibatch = Minibatch(records=records, rows=torch.tensor(rows), weights=torch.tensor(weights))
        return self.update(minibatch, micro_batches)

    def score(self, batch: Batch | Examples, micro_batches: MicroBatches) -> Tensor:
        """[n, T] (or [n]) float32 of this rank's rows, in the order of the concatenated micro-batches."""
        return self.each(batch, micro_batches, self.figures)

    @torch.no_grad()
    def each(
        self, batch: Batch | Examples, micro_batches: MicroBatches, figures: Callable[[Any], Tensor]
    ) -> Tensor:
        """What ``figures`` says of each micro-batch, row after row, as wide as the batch."""
        answers = []
        for rows in micro_batches:
            answer = figures(to_device(take(batch, rows or [0]), self.device)).float().cpu()
            answers.append(widen(answer, batch.tokens.shape[1])[: len(rows)])
        return torch.cat(answers)

    def reside(self, level: Residency) -> None:
        self.backend.residence.move(level)

    def save(self, folder: Path, background: bool = False) -> None:
        """The training state as it is now, and beside it the adapter as PEFT and ``quartet export`` read it;
        each rank writes its part, in ``background`` while it trains on. OSError on a full disk,
        NonFiniteStateError for a state that must not be saved."""
        self.saved(wait=True)
        state = self.backend.snapshot()
        if self.backend.ranks is not None and self.rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            self.backend.ranks.save(folder)
        if self.model.adapter is not None:
            self._write_adapter(folder / ADAPTER)
        if background:
            self._writing = self._writer.submit(state.write, folder)
        else:
            state.write(folder)

    def saved(self, wait: bool = False) -> bool:
        """Whether the last save is in its file; raises what went wrong with it."""
        if self._writing is not None and (wait or self._writing.done()):
            writing, self._writing = self._writing, None
            writing.result()
        return self._writing is None

    def load(self, folder: Path) -> None:
        self.backend.load(folder)

    def export(self, folder: Path, averaged: bool = False) -> None:
        """A plain ``from_pretrained`` folder, with the tokenizer of the model it came from; the adapter alone
        beside it. What cannot be merged is the PEFT folder itself."""
        adapter = self.model.adapter
        if adapter is not None:
            self._write_adapter(folder.with_name(f"{folder.name}_{ADAPTER}") if adapter.merges else folder)
        if adapter is None or adapter.merges:
            self.backend.export(folder, averaged=averaged)
        if self.rank == 0 and _has_tokenizer(self.model.path):
            tokenizer = AutoTokenizer.from_pretrained(self.model.path, revision=self.model.revision)
            tokenizer.save_pretrained(folder)

    def _write_adapter(self, folder: Path) -> None:
        """Collective; rank 0 writes."""
        assert self.model.adapter is not None
        model = self.backend.engine.module
        tensors = {name: tensor.to("cpu", copy=True) for name, tensor in self.backend.adapter_tensors()}
        if model.virtual is not None:
            tensors = {PROMPT: model.virtual.values().detach().cpu()} | tensors
        if self.rank == 0:
            write_peft(folder, model, self.model.adapter, self.model.path, tensors)

    def close(self) -> None:
        self.backend.close()
        super().close()

    def _cut(self, minibatch: Minibatch, positions: Sequence[int]) -> tuple[Any, Tensor]:
        """The rows at these positions and their weights, without the columns only other rows needed."""
        index = torch.tensor(list(positions or _first_unit(minibatch)))
        part = to_device(take(minibatch.records, minibatch.rows[index]), self.device)
        weights = minibatch.weights[index].to(self.device)
        if weights.dim() == 2:
            weights = weights[:, : part.tokens.shape[1]]
        return part, weights if positions else torch.zeros_like(weights)

    def _add_over_ranks(self, sums: dict[str, Tensor]) -> dict[str, float]:
        """In one call. The keys come from the loss function: the same, in the same order, on every rank."""
        flat = torch.stack(list(sums.values()))
        if self.world_size > 1:
            dist.all_reduce(flat)
        return dict(zip(sums, flat.tolist(), strict=True))


def _first_unit(minibatch: Minibatch) -> list[int]:
    """Positions of the first rows that one loss compares; where the records do not say, two, for pairs."""
    groups, rows = minibatch.records.groups, minibatch.rows
    if groups is None:
        return list(range(min(2, len(rows))))
    return (groups[rows] == groups[rows[0]]).nonzero().squeeze(1).tolist()


def to_device(records: R, device: torch.device) -> R:
    if device.type == "cpu":
        return records
    tensors = {f.name: getattr(records, f.name) for f in fields(records)}
    return replace(records, **{n: t.to(device) for n, t in tensors.items() if isinstance(t, Tensor)})


def widen(answer: Tensor, width: int) -> Tensor:
    """[n, t, ...] -> [n, width, ...], zeros on the right; [n] as it is."""
    if answer.dim() == 1:
        return answer
    return F.pad(answer, (0, 0) * (answer.dim() - 2) + (0, width - answer.shape[1]))


def weigh(values: Tensor, weights: Tensor) -> Tensor:
    """Sum of weights x values; a value of weight 0 does not count even when it is NaN (BUGS C5)."""
    return torch.where(weights != 0, weights * values, 0.0).sum()


def _means(sums: dict[str, float]) -> dict[str, float]:
    """Metrics divided by the weight they were summed with, which is not 1 under constant_length."""
    weight = sums["weight"] or 1.0
    metrics = {n.removeprefix("metrics/"): s / weight for n, s in sums.items() if n.startswith("metrics/")}
    return {"loss": sums["loss"], "num_tokens": sums["num_tokens"]} | metrics


def _has_tokenizer(path: str) -> bool:
    """A Hub id is taken to have one; a local folder shows."""
    folder = Path(path)
    return not folder.is_dir() or (folder / "tokenizer_config.json").exists()
