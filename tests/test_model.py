"""What a model says of a token, compared with plain Transformers, whatever the padding, blocks or dropout."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
)

from actors import heads
from actors import model as models
from actors.model import LanguageModel, PolicyModel, ScoreModel, ValueModel
from orchestrator.config import Model
from tests import tiny

SEQUENCE = [3, 9, 4, 12, 7]


def source(folder: Path, config: object, **settings: object) -> Model:
    return Model(path=tiny.save(folder, config), dtype="float32", **settings)


def padded(left: int, right: int) -> tuple[Tensor, Tensor]:
    """SEQUENCE with so many padding tokens (5, a token that would matter if it were seen) on each side."""
    tokens = torch.tensor([[5] * left + SEQUENCE + [5] * right])
    mask = torch.tensor([[False] * left + [True] * len(SEQUENCE) + [False] * right])
    return tokens, mask


@pytest.mark.parametrize("config", [tiny.llama(), tiny.llama(tied=False), tiny.gpt2()])
def test_index_t_speaks_about_the_token_at_t(tmp_path: Path, config: object) -> None:
    policy = PolicyModel.load(source(tmp_path, config))
    tokens = torch.tensor([[3, 9, 4]])
    ones = torch.ones_like(tokens, dtype=torch.bool)
    logprobs, entropy, distribution = policy(tokens, ones, ones, 0.5, True, True)
    logits = AutoModelForCausalLM.from_pretrained(tmp_path)(input_ids=tokens).logits[0] / 0.5
    after_3, after_3_9 = logits[0].log_softmax(-1), logits[1].log_softmax(-1)
    torch.testing.assert_close(
        logprobs[0], torch.stack([torch.tensor(0.0), after_3[9], after_3_9[4]]), atol=1e-5, rtol=0
    )
    by_hand = -(after_3_9.exp() * after_3_9).sum()
    torch.testing.assert_close(entropy[0, 2], by_hand, atol=1e-5, rtol=0)
    whole = torch.stack([torch.zeros(tiny.VOCAB), after_3, after_3_9])
    torch.testing.assert_close(distribution[0], whole, atol=1e-5, rtol=0)


def test_logprobs_are_zero_off_the_mask_and_unchanged_on_it(tmp_path: Path) -> None:
    policy = PolicyModel.load(source(tmp_path, tiny.llama()))
    tokens, attended = padded(0, 2)
    mask = torch.tensor([[False, False, True, False, True, False, False]])
    everywhere = policy(tokens, attended, attended, 1.0)[0]
    asked = policy(tokens, attended, mask, 1.0)[0]
    torch.testing.assert_close(asked, torch.where(mask, everywhere, 0.0))
    assert asked.count_nonzero() == 2


@pytest.mark.parametrize("wrapper", [PolicyModel, ValueModel, ScoreModel])
@pytest.mark.parametrize("config", [tiny.gpt2(), tiny.llama()])
def test_padding_changes_nothing_with_absolute_positions(
    tmp_path: Path, config: object, wrapper: type[LanguageModel]
) -> None:
    """BUGS A1, A5: alone, or with 0..7 padding tokens on either side or both."""
    model = wrapper.load(source(tmp_path, config), head_seed=1)

    def says(left: int, right: int) -> Tensor:
        tokens, mask = padded(left, right)
        if isinstance(model, ScoreModel):
            return model(tokens, mask)
        response = mask.clone()
        response[0, : left + 2] = False  # the first token's answer would need a state before it
        answer = (
            model(tokens, mask, response, 1.0)[0] if wrapper is PolicyModel else model(tokens, mask, response)
        )
        return answer[0, left : left + len(SEQUENCE)]

    alone = says(0, 0)
    assert alone.abs().max() > 0.01
    for left, right in [(n, 0) for n in range(1, 8)] + [(0, n) for n in range(1, 8)] + [(3, 2)]:
        torch.testing.assert_close(says(left, right), alone, atol=1e-5, rtol=0)


def test_score_is_the_head_on_the_last_attended_token(tmp_path: Path) -> None:
    scorer = ScoreModel.load(source(tmp_path, tiny.llama()), head_seed=1)
    tokens, mask = padded(0, 3)
    states = scorer.model.base_model(input_ids=tokens[:, :5]).last_hidden_state
    torch.testing.assert_close(
        scorer(tokens, mask), states[:, 4] @ scorer.model.score.weight[0], atol=1e-5, rtol=0
    )


def test_value_is_of_the_state_before_the_token(tmp_path: Path) -> None:
    """BUGS A3: three tokens; the value at t comes from the hidden state at t-1, gradients only from the
    mask."""
    critic = ValueModel.load(source(tmp_path, tiny.llama()), head_seed=1)
    tokens = torch.tensor([[3, 9, 4]])
    ones = torch.ones_like(tokens, dtype=torch.bool)
    mask = torch.tensor([[False, False, True]])
    states = critic.model.base_model(input_ids=tokens).last_hidden_state[0]
    by_hand = states @ critic.model.score.weight[0]
    torch.testing.assert_close(critic(tokens, ones, ones)[0], F.pad(by_hand[:2], (1, 0)), atol=1e-5, rtol=0)
    values = critic(tokens, ones, mask)
    assert values[0, :2].tolist() == [0.0, 0.0]
    values.backward(torch.tensor([[float("nan"), float("nan"), 1.0]]))
    torch.testing.assert_close(critic.model.score.weight.grad[0], states[1].detach(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("config", [tiny.gpt2(dropout=0.1), tiny.llama()])
def test_dropout_is_off_while_training(tmp_path: Path, config: object) -> None:
    """BUGS A13: two looks at the same tokens agree bit for bit, so the first ratio is 1."""
    policy = PolicyModel.load(source(tmp_path, config)).train()
    tokens, mask = padded(0, 0)
    assert torch.equal(policy(tokens, mask, mask, 1.0)[0], policy(tokens, mask, mask, 1.0)[0])


def test_blocks_of_logits_change_neither_logprobs_nor_gradients(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = torch.arange(40).view(4, 10) % tiny.VOCAB
    mask = torch.ones_like(tokens, dtype=torch.bool)
    answers = []
    monkeypatch.setattr(heads, "LOGITS_PER_BLOCK", 5 * tiny.VOCAB)
    for kept in (2**25, 0):  # whole; blocks of five rows, the last of one
        monkeypatch.setattr(heads, "LOGITS_KEPT", kept)
        policy = PolicyModel.load(source(tmp_path, tiny.llama()))
        logprobs, entropy, _ = policy(tokens, mask, mask, 0.7, True)
        ((logprobs.sum() + entropy.square().sum()) / tokens.numel()).backward()  # of a mean: below 2
        answers.append([logprobs, entropy, *(p.grad for p in policy.parameters())])
    for whole, blocks in zip(*answers, strict=True):
        torch.testing.assert_close(whole, blocks, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("in_forward", [False, True])
@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_blocks_follow_the_formulas_in_float64(
    softcap: float | None, entropy: bool, in_forward: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Log-prob, entropy and every gradient, with all that heads do to logits: bias, scale, cap, heat. The
    loss's slopes come with the backward pass, or are asked for in the forward pass."""
    monkeypatch.setattr(heads, "LOGITS_KEPT", 0)
    monkeypatch.setattr(heads, "LOGITS_PER_BLOCK", 3 * 11)
    torch.manual_seed(1)
    plain = nn.Linear(6, 11)
    config = LlamaConfig(final_logit_softcapping=softcap, logit_scale=1.7)
    states, targets, upstream = torch.randn(7, 6), torch.randint(0, 11, (7,)), torch.randn(2, 7)

    exact = [x.detach().double().requires_grad_() for x in (states, plain.weight, plain.bias)]
    z = 1.7 * (exact[0] @ exact[1].T + exact[2])
    z = softcap * (z / softcap).tanh() if softcap else z
    every = (z / 0.6).log_softmax(-1)
    expected = [every[torch.arange(7), targets], -(every.exp() * every).sum(-1)]
    (expected[0] @ upstream[0].double() + entropy * expected[1] @ upstream[1].double()).backward()

    head, given = heads.TokenHead(plain, config), states.requires_grad_()

    def slopes(known: Tensor, of_them: Tensor, block: slice) -> tuple[Tensor, Tensor]:
        torch.testing.assert_close(known.double(), expected[0][block], atol=1e-5, rtol=0)
        assert entropy or (of_them == 0).all()
        return upstream[0, block] / 3, upstream[1, block] / 3

    asked = (slopes,) if in_forward else ()
    logprobs, entropies, _, *carrier = head(given, targets, 0.6, entropy, False, *asked)
    total = logprobs @ upstream[0]
    if entropy:
        total = total + entropies @ upstream[1]
        torch.testing.assert_close(entropies.double(), expected[1], atol=1e-5, rtol=0)
    if in_forward:
        assert not total.requires_grad and carrier[0] == 0
        total = (total / 3 + carrier[0]) * 3  # what multiplies the loss multiplies the gradient
    total.backward()
    torch.testing.assert_close(logprobs.double(), expected[0], atol=1e-5, rtol=0)
    for ours, theirs in zip((given, plain.weight, plain.bias), exact, strict=True):
        torch.testing.assert_close(ours.grad.double(), theirs.grad, atol=1e-5, rtol=0)


def test_blocks_skip_a_frozen_head(monkeypatch: pytest.MonkeyPatch) -> None:
    """As under LoRA: the states get the gradient they get from the whole path, the weight none."""
    head = heads.TokenHead(nn.Linear(6, 11, bias=False).requires_grad_(False), LlamaConfig())
    states, gradients = torch.randn(7, 6), []
    monkeypatch.setattr(heads, "LOGITS_PER_BLOCK", 22)
    for kept in (2**25, 0):
        monkeypatch.setattr(heads, "LOGITS_KEPT", kept)
        given = states.clone().requires_grad_()
        head(given, torch.arange(7), 1.0, False, False)[0].sum().backward()
        gradients.append(given.grad)
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=0)
    assert head.weight.grad is None


def test_gradient_checkpointing_changes_no_gradient(tmp_path: Path) -> None:
    tokens, mask = padded(0, 2)
    gradients = []
    for on in (False, True):
        policy = PolicyModel.load(source(tmp_path, tiny.llama(), gradient_checkpointing=on)).train()
        policy(tokens, mask, mask, 1.0)[0].sum().backward()
        gradients.append([p.grad for p in policy.parameters()])
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("on", [False, True])
def test_gradient_checkpointing_recomputes_each_layer_as_a_learner_has_the_model(
    tmp_path: Path, on: bool
) -> None:
    """Loaded models are in eval mode, in which Transformers would keep every activation all the same."""
    tokens, mask = padded(0, 2)
    policy, calls = PolicyModel.load(source(tmp_path, tiny.llama(), gradient_checkpointing=on)), []
    layers = policy.model.base_model.layers
    for layer in layers:
        layer.mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    policy(tokens, mask, mask, 1.0)[0].sum().backward()
    assert len(calls) == len(layers) * (2 if on else 1)


@pytest.mark.parametrize(
    ("config", "model", "setting"),
    [
        (CohereConfig, CohereForCausalLM, {"logit_scale": 0.3}),
        (Gemma2Config, Gemma2ForCausalLM, {"final_logit_softcapping": 2.0, "head_dim": 8}),
        (GraniteConfig, GraniteForCausalLM, {"logits_scaling": 4.0}),
    ],
)
def test_logits_scaled_after_the_head_are_honoured(
    tmp_path: Path, config: type, model: type, setting: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loading compares with the model's own logits; without the rule it refuses."""
    size = {"vocab_size": 17, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "initializer_range": 1.0}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    torch.manual_seed(0)
    model(config(**size, **heads, **ids, **setting)).save_pretrained(tmp_path)
    PolicyModel.load(Model(path=str(tmp_path), dtype="float32"))

    class Plain(models.TokenHead):
        def __init__(self, head: torch.nn.Linear, config: object) -> None:
            super().__init__(head, config)
            self.scale, self.softcap = 1.0, None

    monkeypatch.setattr(models, "TokenHead", Plain)
    with pytest.raises(ValueError, match="changes its logits after lm_head"):
        PolicyModel.load(Model(path=str(tmp_path), dtype="float32"))


def test_values_of_a_bfloat16_model_are_computed_in_float32() -> None:
    """BUGS C7: near 100 bfloat16 knows only every half."""
    torch.manual_seed(0)
    plain, states = nn.Linear(256, 1).bfloat16(), (10 * torch.randn(5, 256)).bfloat16()
    exact = states.double() @ plain.weight.double()[0] + plain.bias.double()
    said = heads.ScalarHead(plain)(states)
    assert said.dtype == torch.float32
    torch.testing.assert_close(said.double(), exact, atol=1e-4, rtol=0)


def test_a_missing_head_starts_at_zero_or_from_the_seed(tmp_path: Path) -> None:
    base = source(tmp_path, tiny.llama(hidden=64))
    assert ValueModel.load(base).model.score.weight.abs().sum() == 0
    torch.manual_seed(1)
    first = ScoreModel.load(base, head_seed=7).model.score.weight
    torch.manual_seed(2)
    assert torch.equal(first, ScoreModel.load(base, head_seed=7).model.score.weight)
    assert first.std().item() == pytest.approx(65**-0.5, rel=0.3)


def test_a_critic_starts_from_a_reward_models_head(tmp_path: Path) -> None:
    scorer = ScoreModel.load(source(tmp_path / "base", tiny.llama()), head_seed=7)
    scorer.write(tmp_path / "reward", dict(scorer.model.state_dict()))
    critic = ValueModel.load(Model(path=str(tmp_path / "reward"), dtype="float32"))
    assert torch.equal(critic.model.score.weight, scorer.model.score.weight)


def test_a_folder_without_a_language_head_is_no_policy(tmp_path: Path) -> None:
    scorer = ScoreModel.load(source(tmp_path / "base", tiny.llama(tied=False)), head_seed=7)
    scorer.write(tmp_path / "reward", dict(scorer.model.state_dict()))
    with pytest.raises(ValueError, match=r"lacks the weights \['lm_head.weight'\]"):
        PolicyModel.load(Model(path=str(tmp_path / "reward"), dtype="float32"))


def test_a_saved_reward_model_is_what_transformers_reads(tmp_path: Path) -> None:
    scorer = ScoreModel.load(source(tmp_path / "base", tiny.llama()), head_seed=7)
    scorer.write(tmp_path / "reward", dict(scorer.model.state_dict()))
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward")
    tokens = torch.tensor([[3, 9, 4], [5, 6, 7]])
    ours = scorer(tokens, torch.ones_like(tokens, dtype=torch.bool))
    torch.testing.assert_close(theirs(input_ids=tokens).logits[:, 0], ours, atol=1e-5, rtol=0)
