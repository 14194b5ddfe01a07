"""The engine's sampler on CPUs against vLLM's own: the same tokens, whatever else is in the batch."""

import torch
from torch import Generator, Tensor
from vllm.v1.sample.logits_processor import LogitsProcessors
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.sampler import Sampler

from actors.engine_sampler import AT_ONCE, RolloutSampler

ROWS, VOCABULARY, STEPS = 5, 37, 2 * AT_ONCE + 10


def asked(generators: dict[int, Generator], temperatures: Tensor, top_p: Tensor | None) -> SamplingMetadata:
    """As vLLM's runner describes a batch; a row of temperature 0 is greedy and has no generator."""
    return SamplingMetadata(
        temperature=temperatures, all_greedy=not temperatures.any(), all_random=bool(temperatures.all()),
        top_p=top_p, top_k=None, generators=generators, max_num_logprobs=0, no_penalties=True,
        prompt_token_ids=None, frequency_penalties=torch.zeros(ROWS), presence_penalties=torch.zeros(ROWS),
        repetition_penalties=torch.ones(ROWS), output_token_ids=[[]] * ROWS, allowed_token_ids_mask=None,
        bad_words_token_ids={}, logitsprocs=LogitsProcessors(),
    )  # fmt: skip


def run(sampler: Sampler) -> tuple[list[Tensor], list[Tensor]]:
    """Tokens and log-probs of every step: plain ones, some beside a greedy row, some with top_p."""
    generators = {row: Generator().manual_seed(100 + row) for row in range(ROWS)}
    noise, tokens, logprobs = Generator().manual_seed(0), [], []
    for step in range(STEPS):
        temperatures = torch.full((ROWS,), 0.7)
        given = dict(generators)
        if step % 5 == 1:  # the probe has come
            temperatures[2] = 0.0
            del given[2]
        top_p = torch.full((ROWS,), 0.8) if step % 7 == 3 else None
        found = sampler(torch.randn(ROWS, VOCABULARY, generator=noise) * 3, asked(given, temperatures, top_p))
        tokens.append(found.sampled_token_ids.flatten().long())
        logprobs.append(found.logprobs_tensors.logprobs[:, 0])
        assert found.logprobs_tensors.logprob_token_ids[:, 0].tolist() == tokens[-1].tolist()
    return tokens, logprobs


def test_tokens_are_vllms_and_logprobs_those_of_the_softmax() -> None:
    ours, our_logprobs = run(RolloutSampler())
    theirs, their_logprobs = run(Sampler("processed_logprobs"))
    assert torch.equal(torch.stack(ours), torch.stack(theirs))
    torch.testing.assert_close(torch.stack(our_logprobs), torch.stack(their_logprobs), atol=1e-5, rtol=0)


def test_a_drawn_tokens_logprob_by_hand() -> None:
    """Two tokens with logits ln 1 and ln 3: probabilities 1/4 and 3/4, each drawn as often as that."""
    generators = {row: Generator().manual_seed(row) for row in range(ROWS)}
    sampler, counts, logprobs = RolloutSampler(), [0, 0], {}
    for _ in range(400):
        logits = torch.tensor([1.0, 3.0]).log().repeat(ROWS, 1)
        found = sampler(logits, asked(generators, torch.ones(ROWS), None))
        for token, logprob in zip(
            found.sampled_token_ids.flatten().tolist(), found.logprobs_tensors.logprobs.flatten(), strict=True
        ):
            counts[token] += 1
            logprobs[token] = float(logprob.exp())
    assert abs(logprobs[0] - 0.25) < 1e-6 and abs(logprobs[1] - 0.75) < 1e-6
    assert abs(counts[1] / 2000 - 0.75) < 5 * (0.75 * 0.25 / 2000) ** 0.5  # five standard errors
