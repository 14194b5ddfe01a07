"""The last layers that answer our questions of hidden states: log-probs of given tokens, and a scalar."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig

from actors.vocabulary import BlockedLogprobs, BlockedLoss, Shape, Slopes

# In float32 128 and 64 MiB. Up to so many logits are kept for the backward pass; more are computed block by
# block (vocabulary.py). On a GPU of 256 MiB: smaller blocks would be over before the next is launched.
LOGITS_KEPT = 2**25
LOGITS_PER_BLOCK = 2**24
LOGITS_PER_BLOCK_ON_GPU = 2**26


class TokenHead(nn.Module):
    """An ``lm_head`` that answers log-probs of given tokens: [tokens, vocabulary] is never kept whole."""

    def __init__(self, head: nn.Linear, config: PretrainedConfig) -> None:
        super().__init__()
        self.weight, self.bias = head.weight, head.bias  # the same parameters, so a tied embedding stays tied
        self.scale = float(getattr(config, "logit_scale", None) or 1.0)  # Cohere
        self.scale /= float(getattr(config, "logits_scaling", None) or 1.0)  # Granite
        self.softcap: float | None = getattr(config, "final_logit_softcapping", None)  # Gemma 2

    def forward(
        self,
        states: Tensor,
        targets: Tensor,
        temperature: float,
        entropy: bool,
        distribution: bool,
        slopes: Slopes | None = None,
    ) -> tuple[Tensor | None, ...]:
        """[N, d], [N] -> log-prob of each target, [N]; if asked the entropy there, [N], and the log-probs of
        the whole vocabulary, [N, V]. All float32. With ``slopes`` also, where the logits are not kept, the
        carrier of the gradient (``BlockedLoss``); the others are data then."""
        if distribution or len(states) * len(self.weight) <= LOGITS_KEPT:
            whole = self._whole(states, targets, temperature, entropy, distribution)
            return whole if slopes is None else (*whole, None)
        logits = LOGITS_PER_BLOCK_ON_GPU if states.is_cuda else LOGITS_PER_BLOCK
        rows = max(1, logits // len(self.weight))
        shape = Shape(
            scale=self.scale, softcap=self.softcap, temperature=temperature, rows=rows, entropy=entropy
        )
        given = (states, self.weight, self.bias, targets, shape)
        if slopes is None:
            logprobs, entropies = BlockedLogprobs.apply(*given)
            return logprobs, entropies if entropy else None, None
        logprobs, entropies, carrier = BlockedLoss.apply(*given, slopes)
        return logprobs, entropies if entropy else None, None, carrier

    def _whole(
        self, states: Tensor, targets: Tensor, temperature: float, entropy: bool, distribution: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        logits = F.linear(states, self.weight, self.bias)
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        logits = logits.float()
        every = F.log_softmax(logits if temperature == 1.0 else logits / temperature, dim=-1)
        logprobs = every.gather(-1, targets[:, None]).squeeze(-1)
        return (
            logprobs,
            -(every.exp() * every).sum(-1) if entropy else None,
            every if distribution else None,
        )


class ScalarHead(nn.Module):
    """A ``score`` layer whose arithmetic is float32: bfloat16 would leave a value two digits."""

    def __init__(self, head: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = head.weight, head.bias

    def forward(self, states: Tensor) -> Tensor:
        """[..., d] -> [...] float32."""
        bias = None if self.bias is None else self.bias.float()
        return F.linear(states.float(), self.weight.float(), bias).squeeze(-1)
