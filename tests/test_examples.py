"""Chats, texts, mixtures and packs, and the rows that are refused."""

import json
import tempfile
from pathlib import Path

import pytest
import torch

from actors.model import PolicyModel
from orchestrator.balance import plan
from orchestrator.collate import collate_examples, collate_packed
from orchestrator.config import ChatData, Model
from orchestrator.examples import Unit, mix, pack, read_units
from tests import tiny
from tests.test_data import EOS, char_tokenizer, ids, jsonl

CHATML = "{% for m in messages %}[{{ m.role[0] }}{{ m.content }}</s>]{% endfor %}" + (
    "{% if add_generation_prompt %}[a{% endif %}"
)
CHAT = [
    {"role": "user", "content": "U"},
    {"role": "assistant", "content": "X"},
    {"role": "user", "content": "V"},
    {"role": "assistant", "content": "YZ"},
]

TWICE = "\n\nHuman: U\n\nHuman: V\n\nAssistant:"
SILENT = "\n\nHuman: U\n\nAssistant:\n\nHuman: V\n\nAssistant:"
PAIR = {"response": "a", "rejected": "b"}


def read(path, layout, *, tokenizer=None, max_length=100, **settings):
    data = ChatData(path=path, **settings)
    return read_units(data, tokenizer or char_tokenizer(), layout=layout, max_length=max_length, field="x")


def chat_units(tokenizer, messages):
    with tempfile.TemporaryDirectory() as folder:
        path = jsonl(Path(folder), {"m": messages})
        return read(path, "examples", messages_key="m", tokenizer=tokenizer)


def test_every_assistant_turn_is_trained_and_its_end_of_turn_token():
    (unit,) = chat_units(char_tokenizer(template=CHATML), CHAT)
    tokens, mask = unit.rows[0]
    assert tokens == (*ids("[uU"), EOS, *ids("][aX"), EOS, *ids("][uV"), EOS, *ids("][aYZ"), EOS)
    trained = [t for t, m in zip(tokens, mask, strict=True) if m]
    assert trained == [*ids("X"), EOS, *ids("YZ"), EOS]


def test_a_template_that_ends_turns_otherwise_trains_eos_at_the_end_only():
    (unit,) = chat_units(char_tokenizer(), CHAT)
    assert unit.rows[0] == ((*ids("uU;aX;uV;aYZ"), EOS), (*(c in "XYZ" for c in "uU;aX;uV;aYZ"), True))


def test_a_chat_that_ends_with_the_user_is_trained_up_to_its_last_answer():
    (unit,) = chat_units(char_tokenizer(), CHAT[:3])
    assert unit.rows[0] == ((*ids("uU;aX"), EOS), (False,) * 4 + (True, True))


def test_a_template_that_rewrites_earlier_turns_is_refused():
    forgets = (
        "{% for m in messages %}{% if m.role == 'user' or loop.last %}{{ m.content }}{% endif %}{% endfor %}"
    )
    with pytest.raises(ValueError, match="row 0: the chat template rewrites earlier turns"):
        chat_units(char_tokenizer(template=forgets), CHAT)


def test_plain_text_trains_every_token_but_the_first_and_is_cut(tmp_path):
    units = read(jsonl(tmp_path, {"t": "abcde"}), "examples", text_key="t", max_length=4)
    assert [unit.rows[0] for unit in units] == [
        (ids("abcd"), (False, True, True, True)),
        ((*ids("e"), EOS), (False, True)),
    ]


def test_rankings_ratings_labels_and_margins_carry_their_numbers(tmp_path):
    path = jsonl(tmp_path, {"prompt": "p", "responses": ["a", "b", "c"], "ranks": [2, 1, 2]}, name="k.jsonl")
    (unit,) = read(path, "rankings", ranks_key="ranks")
    assert unit.targets == (-2, -1, -2) and [row[0] for row in unit.rows] == [
        (*ids("p" + response), EOS) for response in "abc"
    ]
    path = jsonl(tmp_path, {"prompt": "p", "response": "a", "rating": 3.5}, name="r.jsonl")
    assert read(path, "ratings")[0].targets == (3.5,)
    path = jsonl(tmp_path, {"prompt": "p", "response": "a", "rejected": "b", "by": 2}, name="m.jsonl")
    assert read(path, "pairs", margin_key="by")[0].targets == (2.0, 0.0)
    rows = [
        {"prompt": "p", "response": "a", "label": True},
        {"prompt": "q", "response": "bc", "label": False},
    ]
    first, second = read(jsonl(tmp_path, *rows, name="l.jsonl"), "labels")
    assert (first.targets, second.targets) == ((1.0,), (0.0,))
    assert first.mismatched == ((*ids("pbc"), EOS), (False, True, True, True))
    assert second.mismatched == ((*ids("qa"), EOS), (False, True, True))
    (tmp_path / "l.csv").write_text("prompt,response,label\np,a,1\nq,b,0\nr,c,False\n")
    assert [unit.targets for unit in read(str(tmp_path / "l.csv"), "labels")] == [(1.0,), (0.0,), (0.0,)]


def test_a_mismatched_response_is_of_another_prompt(tmp_path):
    """Rows of one prompt side by side, as a pair taken apart leaves them."""
    rows = [{"prompt": p, "response": r, "label": 1} for p, r in ("pa", "pb", "qc", "rd", "re", "pf")]
    found = read(jsonl(tmp_path, *rows), "labels")
    texts = ["pc", "pc", "qd", "rf", "rf", "pc"]
    assert [unit.mismatched[0] for unit in found] == [(*ids(text), EOS) for text in texts]
    with pytest.raises(ValueError, match="has 1 prompt; kto estimates a KL from responses to other prompts"):
        read(jsonl(tmp_path, *rows[:2], name="one.jsonl"), "labels")


@pytest.mark.parametrize(
    ("layout", "settings", "row", "reason"),
    [
        ("examples", {}, {"prompt": "p"}, "response is None"),
        ("examples", {}, {"prompt": "p", "response": " "}, "the response is empty"),
        ("examples", {"messages_key": "m"}, {"m": [*CHAT[:3], {**CHAT[1], "content": ""}]}, "is empty"),
        ("examples", {"messages_key": "m"}, {"m": [CHAT[0], CHAT[2]]}, "has the roles user user"),
        ("examples", {"messages_key": "m"}, {"m": [CHAT[0]]}, "has no assistant turn"),
        ("pairs", {}, {"prompt": "p", "response": "a", "rejected": "a"}, "response and rejected are equal"),
        ("examples", {"chat_template": True}, {"prompt": TWICE, "response": "a"}, "roles user user;"),
        ("pairs", {"chat_template": True}, {**PAIR, "prompt": SILENT}, "1. is empty"),
        ("rankings", {}, {"prompt": "p", "responses": ["a"]}, "no list of 2 or more"),
        ("rankings", {}, {"prompt": "p", "responses": ["a", "b", "a"]}, "equal responses of different ranks"),
        ("ratings", {}, {"prompt": "p", "response": "a", "rating": "good"}, "rating is 'good'; expected"),
        ("labels", {}, {"prompt": "p", "response": "a", "label": "maybe"}, "label is 'maybe'; expected true"),
    ],
)  # fmt: skip
def test_a_bad_row_is_named_or_left_out(tmp_path, layout, settings, row, reason):
    good = {
        "prompt": "p", "response": "a", "rejected": "b", "responses": ["a", "b"], "rating": 1, "label": 1,
        "m": CHAT,
    }  # fmt: skip
    path = jsonl(tmp_path, good, row, {**good, "prompt": "q", "response": "c"})
    with pytest.raises(ValueError, match=rf"x\.path=(.|\n)*row 1: .*({reason})"):
        read(path, layout, **settings)
    assert len(read(path, layout, max_bad_rows=1, **settings)) == 2


def test_messages_without_a_chat_template_are_named_by_row(tmp_path):
    path = jsonl(tmp_path, {"m": CHAT})
    with pytest.raises(ValueError, match="row 0: messages need a chat template, and the tokenizer has none"):
        read(path, "examples", messages_key="m", tokenizer=char_tokenizer(template=None))


def units(*lengths):
    return [Unit(rows=(((n,) * n, (False,) + (True,) * (n - 1)),)) for n in lengths]


def test_a_mixture_has_the_shares_of_its_ratios():
    first = [Unit(rows=(((i,), (True,)),)) for i in range(30)]
    second = [Unit(rows=(((100 + i,), (True,)),)) for i in range(10)]
    mixed = [unit.rows[0][0][0] for unit in mix([first, second], [1, 1], seed=0)]
    assert len(mixed) == 40
    small = [x for x in mixed if x < 100]
    assert len(small) == 20 == len(set(small))
    assert sorted(x for x in mixed if x >= 100) == sorted([*range(100, 110)] * 2)


def test_packing_loses_no_row_and_keeps_the_length():
    packed = pack(units(5, 3, 4, 2, 6, 1, 7), max_length=8, seed=1)
    assert sorted(len(row[0]) for unit in packed for row in unit.rows) == [1, 2, 3, 4, 5, 6, 7]
    assert all(unit.num_tokens <= 8 for unit in packed) and len(packed) < 7


@pytest.mark.parametrize("config", [tiny.llama(), tiny.gpt2()], ids=["llama", "gpt2"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_documents_do_not_see_each_other(tmp_path, config, attention):
    path = tiny.save(tmp_path, config)
    model = PolicyModel.load(Model(path=path, dtype="float32", attention=attention)).eval()
    draw = torch.Generator().manual_seed(3)
    rows = []
    for length in (5, 9, 3, 7, 4):
        tokens = torch.randint(3, tiny.VOCAB, (length,), generator=draw).tolist()
        rows.append((tuple(tokens), (False,) + (True,) * (length - 1)))
    packs = [Unit(rows=tuple(rows[:3])), Unit(rows=tuple(rows[3:]))]
    packed = collate_packed(packs, pad_id=0)
    assert packed.positions.tolist()[1] == [*range(7), *range(4), *[0] * 6]
    apart = collate_examples([Unit(rows=(row,)) for row in rows], pad_id=0)

    def said(part):
        logprobs = model(part.tokens, part.attention_mask, part.action_mask, 1.0, positions=part.positions)[0]
        return logprobs[part.action_mask]

    together = said(packed)
    together.sum().backward()
    gradient = model.model.get_input_embeddings().weight.grad.clone()
    model.zero_grad()
    alone = said(apart)
    alone.sum().backward()
    assert torch.allclose(together, alone, atol=1e-5)
    assert torch.allclose(gradient, model.model.get_input_embeddings().weight.grad, atol=1e-4)
    joined = collate_examples(
        [Unit(rows=((sum((r[0] for r in rows[:3]), ()), sum((r[1] for r in rows[:3]), ())),))], pad_id=0
    )
    contaminated = said(joined)
    assert (contaminated - alone[: len(contaminated)]).abs().max() > 1e-2  # the test would see it


def test_rows_of_a_ranking_stay_together():
    shares = plan([4, 5, 3, 6, 1], num_ranks=2, token_budget=15, units=[0, 0, 0, 1, 1])
    assert sorted(rows for rank in shares for rows in rank) == [[0, 1, 2], [3, 4]]
    with pytest.raises(
        ValueError, match=r"3 sequence\(s\) of 5 tokens .* micro_batch_tokens=14; set it to 15"
    ):
        plan([4, 5, 3], num_ranks=1, token_budget=14, units=[0, 0, 0])


def test_bad_json_keeps_its_row_number(tmp_path):
    (tmp_path / "x.jsonl").write_text(json.dumps({"prompt": "a", "response": "b"}) + "\n{oops\n")
    with pytest.raises(ValueError, match="row 1: not JSON"):
        read(str(tmp_path / "x.jsonl"), "examples")
