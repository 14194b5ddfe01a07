"""What rows begin with alike is computed once and padding never, and nobody can tell."""

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM, MistralConfig, MistralForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from actors.model import LanguageModel, PolicyModel, ScoreModel
from actors.shared_prefix import fold, saves, takes_rows
from orchestrator.config import Model
from tests import tiny

PROMPT = (5, 9, 4, 7, 3, 11, 6, 8)
RESPONSES = ((12, 13, 2), (14, 2), (15, 3), (15, 3, 16, 2), (15, 1, 2))


def padded(rows: list[tuple[int, ...]]) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, what is attended to and the responses to ``PROMPT``, [B, T] each."""
    tokens = torch.tensor([row + (0,) * (max(map(len, rows)) - len(row)) for row in rows])
    kept = torch.tensor([[place < len(row) for place in range(tokens.shape[1])] for row in rows])
    return tokens, kept, kept & (torch.arange(tokens.shape[1]) >= len(PROMPT))


def small(attention: str = "sdpa") -> LlamaForCausalLM:
    return LlamaForCausalLM._from_config(tiny.llama(hidden=64), attn_implementation=attention)


def test_a_pair_by_hand():
    tokens = torch.tensor([[5, 6, 7, 1, 2, 0], [5, 6, 7, 3, 4, 3]])
    folded = fold(tokens, tokens > 0)
    assert folded.tokens.tolist() == [[5, 6, 7, 1, 2, 3, 4, 3]]
    assert folded.positions.tolist() == [[0, 1, 2, 3, 4, 3, 4, 5]]
    assert folded.places.tolist() == [[0, 1, 2, 3, 4, 0], [0, 1, 2, 5, 6, 7]]
    states = torch.arange(8.0).view(8, 1)
    rows = folded.spread(states)
    assert rows[:, :, 0].tolist() == [[0, 1, 2, 3, 4, 0], [0, 1, 2, 5, 6, 7]]
    assert folded.gather(rows).tolist() == states.tolist()


def test_a_token_belongs_to_the_first_of_the_rows_that_begin_with_it():
    """The second row adds a token that the third has, too; the fourth begins as the first does, which is no
    neighbour, and ends as the third."""
    tokens = torch.tensor([[5, 6, 7, 8], [5, 6, 1, 0], [5, 6, 1, 2], [5, 6, 7, 2]])
    folded = fold(tokens, tokens > 0)
    assert folded.tokens.tolist() == [[5, 6, 7, 8, 1, 2, 7, 2]]
    assert folded.places.tolist() == [[0, 1, 2, 3], [0, 1, 4, 0], [0, 1, 4, 5], [0, 1, 6, 7]]


def test_gradients_of_equal_tokens_are_added_and_only_the_first_has_the_answers():
    tokens = torch.tensor([[5, 6, 7, 1, 2, 0], [5, 6, 7, 3, 4, 3]])
    folded = fold(tokens, tokens > 0)
    states, slopes = torch.zeros(8, 1, requires_grad=True), torch.arange(1.0, 13.0).view(2, 6, 1)
    folded.spread(states).backward(slopes)
    assert states.grad.flatten().tolist() == [1 + 7, 2 + 8, 3 + 9, 4, 5, 10, 11, 12]
    rows = torch.zeros(2, 6, 1, requires_grad=True)
    folded.gather(rows).backward(torch.arange(1.0, 9.0).view(8, 1))
    assert rows.grad[:, :, 0].tolist() == [[1, 2, 3, 4, 5, 0], [0, 0, 0, 6, 7, 8]]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("config", [tiny.llama(hidden=64), tiny.gpt2()], ids=["llama", "gpt2"])
def test_logprobs_scores_and_gradients_are_those_of_each_row_alone(tmp_path, config, checkpointing):
    """Rows of several lengths, of which one begins another. GPT-2's positions are absolute, so a wrong one
    shows."""
    source = Model(path=tiny.save(tmp_path, config), dtype="float32", gradient_checkpointing=checkpointing)
    rows = [PROMPT + response for response in RESPONSES]

    def of(model: LanguageModel, tokens: Tensor, kept: Tensor, asked: Tensor) -> Tensor:
        """One number of each row."""
        if isinstance(model, ScoreModel):
            return model(tokens, kept)
        said = model(tokens, kept, asked, 1.0)[0]
        return (said * torch.linspace(-1, 1, len(PROMPT) + 4)[: tokens.shape[1]]).sum(1)

    for kind in (PolicyModel, ScoreModel):
        model = kind.load(source, head_seed=0)
        alone = torch.cat([of(model, *padded([row])) for row in rows])
        slopes = torch.linspace(-1, 1, len(rows))
        trained = [p for p in model.parameters() if p.requires_grad]
        expected = torch.autograd.grad((alone * slopes).sum(), trained, allow_unused=True)

        seen: list[int] = []
        model.model.base_model.register_forward_pre_hook(
            lambda _, __, given, seen=seen: seen.append(given["input_ids"].numel()), with_kwargs=True
        )
        together = of(model, *padded(rows))
        found = torch.autograd.grad((together * slopes).sum(), trained, allow_unused=True)
        assert seen == [8 + 3 + 2 + 2 + 2 + 2]  # the prompt once, 15 3 of the fourth and 15 of the fifth, too
        torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)
        for ours, own in zip(found, expected, strict=True):
            assert (ours is None) == (own is None)
            if own is not None:
                torch.testing.assert_close(ours, own, atol=1e-5, rtol=1e-4)


def test_a_model_that_does_not_pass_on_what_its_attention_needs_is_given_rows(tmp_path, monkeypatch):
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", sdpa_attention_forward)
    policy = PolicyModel.load(Model(path=tiny.save(tmp_path, tiny.llama(hidden=64)), dtype="float32"))
    shapes: list[tuple[int, ...]] = []
    policy.model.base_model.register_forward_pre_hook(
        lambda _, __, given: shapes.append(tuple(given["input_ids"].shape)), with_kwargs=True
    )
    policy(*padded([PROMPT + response for response in RESPONSES]), 1.0)
    assert shapes == [(5, 12)]


def test_rows_stay_where_the_model_cannot():
    mistral = MistralConfig(**{k: v for k, v in tiny.llama(hidden=64).to_dict().items() if k != "model_type"})
    windows = MistralForCausalLM._from_config(mistral, attn_implementation="sdpa")
    closed = small()
    closed.base_model.forward = lambda input_ids, attention_mask, position_ids: None  # takes nothing more
    assert takes_rows(small())
    assert not takes_rows(small("eager"))
    assert not takes_rows(windows)
    assert not takes_rows(closed)
    tokens, kept, _ = padded([PROMPT + response for response in RESPONSES])
    assert fold(tokens.flip(1), kept.flip(1)) is None  # padding on the left


def test_rows_stay_where_that_is_cheaper():
    """64 wide: 384 operations a token, and 60 for each place of the rows; four of twenty pay for it."""
    model = small()
    for own, worth in ((6, True), (7, False)):  # 10 and 6 tokens for 20 places; 10 and 7
        tokens = torch.tensor([list(range(1, 11)), [1, 2, 3] + [40] * own + [0] * (7 - own)])
        folded = fold(tokens, tokens > 0)
        assert folded is not None
        assert saves(folded, model) is worth
