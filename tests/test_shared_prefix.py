"""What rows begin with alike is computed once, and nobody can tell."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from actors.model import PolicyModel, ScoreModel
from actors.shared_prefix import fold
from orchestrator.batch import Examples
from orchestrator.collate import collate_examples
from orchestrator.config import Model
from orchestrator.examples import Unit
from tests import tiny

PROMPT = (5, 9, 4, 7, 3, 11, 6, 8)


def rows(*units: tuple[tuple[int, ...], ...]) -> Examples:
    """Each unit's responses to the same prompt; trained on the response."""
    masked = [
        tuple((PROMPT + row, (False,) * len(PROMPT) + (True,) * len(row)) for row in unit) for unit in units
    ]
    return collate_examples([Unit(rows=unit) for unit in masked], pad_id=0)


def small(attention: str = "sdpa") -> LlamaForCausalLM:
    return LlamaForCausalLM._from_config(tiny.llama(hidden=64), attn_implementation=attention)


def test_a_pair_is_one_row_by_hand():
    tokens = torch.tensor([[5, 6, 7, 1, 2, 0], [5, 6, 7, 3, 4, 3]])
    folded = fold(small(), tokens, tokens > 0, torch.tensor([4, 4]))
    assert folded.tokens.tolist() == [[5, 6, 7, 1, 2, 3, 4, 3]]
    assert folded.positions.tolist() == [[0, 1, 2, 3, 4, 3, 4, 5]]
    assert folded.mask[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0, 0],
        [1, 1, 1, 1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0, 1, 0, 0],
        [1, 1, 1, 0, 0, 1, 1, 0],
        [1, 1, 1, 0, 0, 1, 1, 1],
    ]
    states = torch.arange(8.0).view(1, 8, 1)
    assert folded.unfold(states)[:, :, 0].tolist() == [[0, 1, 2, 3, 4, 0], [0, 1, 2, 5, 6, 7]]


@pytest.mark.parametrize("config", [tiny.llama(hidden=64), tiny.gpt2()], ids=["llama", "gpt2"])
def test_logprobs_scores_and_gradients_are_those_of_the_rows_alone(tmp_path, config):
    """A pair, a ranking of three of which one begins another, and a row without company. GPT-2's positions
    are absolute, so a wrong one shows."""
    path = tiny.save(tmp_path, config)
    part = rows(((12, 13, 2), (14, 2)), ((15, 3), (15, 3, 16, 2), (1, 1, 2)), ((10, 2),))

    def of(model, groups):
        model.zero_grad()
        if isinstance(model, ScoreModel):
            said = model(part.tokens, part.attention_mask, groups)
        else:
            said = model(part.tokens, part.attention_mask, part.action_mask, 1.0, groups=groups)[0]
        weights = torch.linspace(-1, 1, said.numel()).view(said.shape)
        (said * weights).sum().backward()
        return said.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]

    for kind in (PolicyModel, ScoreModel):
        model = kind.load(Model(path=path, dtype="float32"), head_seed=0)
        assert fold(model.model, part.tokens, part.attention_mask, part.groups).tokens.shape == (3, 15)
        (plainly, gradients), (together, theirs) = of(model, None), of(model, part.groups)
        torch.testing.assert_close(together, plainly, atol=1e-5, rtol=0)
        assert len(theirs) == len(gradients)
        for ours, own in zip(theirs, gradients, strict=True):
            torch.testing.assert_close(ours, own, atol=1e-5, rtol=1e-4)


def test_rows_stay_apart_where_that_is_cheaper_or_the_model_cannot():
    part = rows(((12, 13, 2), (14, 2)))
    mistral = MistralConfig(**{k: v for k, v in tiny.llama(hidden=64).to_dict().items() if k != "model_type"})
    windows = MistralForCausalLM._from_config(mistral, attn_implementation="sdpa")
    for model in (small("eager"), windows):
        assert fold(model, part.tokens, part.attention_mask, part.groups) is None
    assert fold(small(), part.tokens, part.attention_mask, torch.tensor([0, 1])) is None  # of two prompts
    left = part.attention_mask.flip(1)
    assert fold(small(), part.tokens.flip(1), left, part.groups) is None
    long = LlamaConfig(**{**tiny.llama().to_dict(), "hidden_size": 4})  # 8 tokens saved of 2 x 108
    answers = rows(((12,) * 100, (14,) * 100))
    narrow = LlamaForCausalLM._from_config(long, attn_implementation="sdpa")
    assert fold(narrow, answers.tokens, answers.attention_mask, answers.groups) is None
