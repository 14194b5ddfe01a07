"""Muon: the momentum of a matrix, made orthogonal, is its update; AdamW steps everything that is no matrix.

Keller Jordan et al. 2024 (kellerjordan.github.io/posts/muon); the scale 0.2 * sqrt(max(rows, columns)) is
Moonlight's (arXiv:2502.16982, equation 4), which gives an update the root mean square of AdamW's: one
learning rate suits both. Embeddings, heads, and parameters that are not two-dimensional are AdamW's, with a
learning rate of their own.

DeepSpeed has a Muon too. It makes gradients orthogonal before it clips them, so that ``max_grad_norm`` scales
every update down; it has none at stage 0; and stage 3 needs other settings. Here clipping comes first, and
the update is the same at every stage: ``shards.py`` says where the whole matrices are. Under stages 1 and 2
the ranks share the work (each does the matrices it has); under stage 3 every rank does all of it.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from actors.heads import ScalarHead, TokenHead
from actors.model import LanguageModel
from actors.shards import Shard
from orchestrator.config import Optimizer

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # quintic; five steps bring every singular value into 0.7 .. 1.2
NEWTON_SCHULZ_STEPS = 5


class Muon(torch.optim.AdamW):
    """Param groups with ``muon: True`` get orthogonal updates; the others are AdamW's."""

    def __init__(self, groups: Sequence[dict[str, Any]], settings: Optimizer) -> None:
        super().__init__(groups, betas=settings.betas, eps=settings.eps, fused=True)
        self.momentum = settings.momentum
        self._shards: dict[int, Shard] = {}

    def place(self, shards: Iterable[Shard]) -> None:
        """Where the matrices are, once DeepSpeed has cut them. Before the first step."""
        self._shards = {id(shard.owned): shard for shard in shards}

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """ZeRO calls it with one group at a time, its parameters replaced by the flat tensor of this rank."""
        every = self.param_groups
        for group in every:
            if group["muon"]:
                for owned in group["params"]:
                    self._step_matrices(self._shards[id(owned)], group["lr"], group["weight_decay"])
        self.param_groups = [group for group in every if not group["muon"] and group["params"]]
        try:
            super().step()
        finally:
            self.param_groups = every

    def _step_matrices(self, shard: Shard, learning_rate: float, weight_decay: float) -> None:
        owned, gradient = shard.owned, shard.owned.grad
        if gradient is None:
            return
        state = self.state[owned]
        if "momentum" not in state:
            # AdamW asks for a "step" wherever there is state, when a checkpoint is loaded.
            state["step"], state["momentum"] = torch.zeros(()), torch.zeros_like(owned)
        state["step"] += 1
        momentum = state["momentum"].lerp_(gradient, 1 - self.momentum)
        nesterov = gradient.lerp(momentum, self.momentum)
        owned.mul_(1 - learning_rate * weight_decay)
        for piece in shard.pieces:
            matrix = shard.whole(nesterov, piece, everywhere=False)
            if matrix is not None:
                update = orthogonal(matrix) * (0.2 * max(matrix.shape) ** 0.5)
                owned.view(-1)[piece.here] -= learning_rate * update.flatten()[piece.there]


def orthogonal(matrix: Tensor) -> Tensor:
    """Nearly U V^T of a matrix U S V^T, float32; a zero matrix stays zero.

    The iteration runs in bfloat16 on GPUs, where it was tuned to, and in float32 on CPUs.
    """
    a, b, c = NEWTON_SCHULZ
    x = matrix.bfloat16() if matrix.is_cuda else matrix.float()
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    x = x / (x.norm() + 1e-7)
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.T if tall else x).float()


def build_optimizer(
    model: LanguageModel, settings: Optimizer, head_rate: float | None = None
) -> torch.optim.AdamW:
    """AdamW, or Muon for the matrices and AdamW for the rest. ``head_rate``: the peak of scalar heads.

    Every group has ``peak``, its own learning rate at the top of the schedule. Weight decay on matrices only:
    pulling a norm's gain or a bias towards zero is not regularisation.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices = {id(p) for p in _inner_matrices(model)} if settings.name == "muon" else set()
    heads: list[nn.Parameter] = []
    if head_rate is not None:
        scalar = [module for module in model.modules() if isinstance(module, ScalarHead)]
        heads = [p for module in scalar for p in module.parameters() if p.requires_grad]
        trained = [p for p in trained if not any(p is head for head in heads)]
    adam_rate = settings.learning_rate
    if settings.name == "muon" and settings.adam_learning_rate is not None:
        adam_rate = settings.adam_learning_rate
    groups = [
        {"params": [p for p in trained if id(p) in matrices], "muon": True, "peak": settings.learning_rate},
        {"params": [p for p in trained if p.dim() >= 2 and id(p) not in matrices], "peak": adam_rate},
        {"params": [p for p in trained if p.dim() < 2], "peak": adam_rate, "weight_decay": 0.0},
        {"params": heads, "peak": head_rate},
    ]
    own = {"muon": False, "weight_decay": settings.weight_decay}
    groups = [own | group | {"lr": group["peak"]} for group in groups if group["params"]]
    if settings.name == "muon":
        return Muon(groups, settings)
    return torch.optim.AdamW(groups, betas=settings.betas, eps=settings.eps, fused=True)


def _inner_matrices(model: LanguageModel) -> list[nn.Parameter]:
    """The two-dimensional weights between the embedding and the head."""
    kinds = nn.Embedding | TokenHead | ScalarHead
    outer = [module for module in model.modules() if isinstance(module, kinds)]
    spared = {id(p) for module in outer for p in module.parameters()}
    return [p for p in model.parameters() if p.requires_grad and p.dim() == 2 and id(p) not in spared]
