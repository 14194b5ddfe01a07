"""vLLM's sampler on CPUs, faster for what rollouts ask: one seed per sample, the log-prob of the drawn token.

vLLM asks PyTorch for one number per sequence and token, and ranks each drawn token in the vocabulary: for a
small model as much work as the model itself. Here 64 numbers are asked for at once, which are the same ones,
and nothing is ranked. Tokens are vLLM's, bit by bit (tests/test_engine_sampler.py).
"""

from weakref import WeakKeyDictionary

import torch
from torch import Generator, Tensor
from vllm.config.model import LogprobsMode
from vllm.v1.outputs import LogprobsTensors, SamplerOutput
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.ops.topk_topp_sampler import TopKTopPSampler, apply_top_k_top_p
from vllm.v1.sample.sampler import Sampler

AT_ONCE = 64


class SeededDraws(TopKTopPSampler):
    """Takes each sequence's numbers from its generator in blocks."""

    def __init__(self, logprobs_mode: LogprobsMode) -> None:
        super().__init__(logprobs_mode)
        self._ahead: WeakKeyDictionary[Generator, list[int]] = WeakKeyDictionary()

    def draw(self, logits: Tensor, generators: dict[int, Generator]) -> Tensor:
        """[rows, V] float32 -> [rows] int64, one token from each softmax."""
        seeds = [self._next(generators.get(row)) for row in range(len(logits))]
        return torch.ops._C.fused_gumbel_argmax(logits, torch.tensor(seeds)).long()

    def _next(self, generator: Generator | None) -> int:
        if generator is None:  # of a greedy row, whose draw is thrown away
            return 0
        ahead = self._ahead.get(generator)
        if not ahead:
            ahead = torch.randint(0, 2**31, (AT_ONCE,), generator=generator).tolist()[::-1]
            self._ahead[generator] = ahead
        return ahead.pop()

    def forward_cpu(
        self, logits: Tensor, generators: dict[int, Generator], k: Tensor | None, p: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """vLLM calls this for all but the plainest batches."""
        logits = apply_top_k_top_p(logits, k, p).float()
        return self.draw(logits, generators), logits.log_softmax(-1)


class RolloutSampler(Sampler):
    """For engines with ``logprobs_mode`` processed_logprobs and the requests of engine_params.py."""

    def __init__(self) -> None:
        super().__init__("processed_logprobs")
        self.topk_topp_sampler = SeededDraws("processed_logprobs")

    def forward(
        self,
        logits: Tensor,
        sampling_metadata: SamplingMetadata,
        predict_bonus_token: bool = False,
        logprobs_mode_override: LogprobsMode | None = None,
    ) -> SamplerOutput:
        """Ranks are 0 where all rows are samples of rollouts."""
        asked = sampling_metadata
        plain = asked.all_random and asked.top_p is None and asked.top_k is None
        if not plain or asked.max_num_logprobs != 0 or len(asked.generators) != len(logits):
            return super().forward(logits, asked, predict_bonus_token, logprobs_mode_override)
        assert asked.temperature is not None
        logits = logits.float().div_(asked.temperature[:, None])
        drawn = self.topk_topp_sampler.draw(logits, asked.generators)[:, None]
        logprobs = logits.gather(1, drawn) - logits.logsumexp(1, keepdim=True)
        tokens = drawn.int()
        ranks = torch.zeros(len(tokens), dtype=torch.int64)
        return SamplerOutput(
            sampled_token_ids=tokens, logprobs_tensors=LogprobsTensors(tokens, logprobs, ranks)
        )
