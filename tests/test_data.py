"""Reading prompts, rows and pairs: exact tokens on good data, one helpful error on bad data."""

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from orchestrator.config import ChatData, PromptData
from orchestrator.data import fingerprint, read_prompts, same_tokenizer
from orchestrator.examples import read_units

REAL = Path(__file__).parents[2] / "shared" / "data"
BOS, EOS = 1, 2
TURNS = "{% for m in messages %}{{ m.role[0] }}{{ m.content }};{% endfor %}"
TEMPLATE = TURNS + "{% if add_generation_prompt %}a{% endif %}"


def char_tokenizer(
    *, bos: bool = False, template: str | None = TEMPLATE, pad: str = "</s>", swap: bool = False
):
    """One token a character, from "!" at 4 on; padding is EOS unless said otherwise."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, " ": 3} | {chr(33 + i): 4 + i for i in range(94)}
    if swap:
        vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    core.decoder = decoders.Fuse()
    if bos:
        core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    names = {"bos_token": "<s>"} if bos else {}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="</s>", pad_token=pad, unk_token="<unk>", **names
    )
    tokenizer.chat_template = template
    return tokenizer


def ids(text: str) -> tuple[int, ...]:
    return tuple(3 if c == " " else ord(c) - 29 for c in text)


def jsonl(folder: Path, *rows: object, name: str = "rows.jsonl") -> str:
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / name)


def prompts(path: str, *, room: int = 100, tokenizer=None, **settings):
    data = PromptData(path=path, **settings)
    return read_prompts(data, tokenizer or char_tokenizer(), room=room, field="rl.prompts")


def rows_of(path: str, *, max_length: int = 1000, tokenizer=None, **settings):
    data = ChatData(path=path, **settings)
    return [unit.rows[0] for unit in units_of("examples", data, tokenizer, max_length, "sft.data")]


def pairs_of(path: str, *, max_length: int = 1000, tokenizer=None, **settings):
    data = ChatData(path=path, **settings)
    return [list(unit.rows) for unit in units_of("pairs", data, tokenizer, max_length, "reward_model.data")]


def units_of(layout, data, tokenizer=None, max_length=1000, field="x.data"):
    return read_units(data, tokenizer or char_tokenizer(), layout=layout, max_length=max_length, field=field)


class TestTokens:
    def test_a_raw_prompt_is_its_tokens_and_keeps_its_label(self, tmp_path):
        path = jsonl(tmp_path, {"q": "2+3=", "a": 5}, {"q": "4", "a": "x"})
        found = prompts(path, prompt_key="q", label_key="a").prompts
        assert [(p.uid, p.row, p.tokens, p.text, p.label) for p in found] == [
            ("0/0", 0, ids("2+3="), "2+3=", "5"),
            ("0/1", 1, ids("4"), "4", "x"),
        ]

    def test_response_ends_with_a_trained_eos_even_where_padding_is_eos(self, tmp_path):
        (row,) = rows_of(jsonl(tmp_path, {"prompt": "2+3=", "response": "5"}))
        assert row == ((*ids("2+3="), *ids("5"), EOS), (False,) * 4 + (True,) * 2)

    @pytest.mark.parametrize("chat", [True, False])
    @pytest.mark.parametrize("template", [TEMPLATE, "<s>" + TEMPLATE])
    def test_exactly_one_bos_whatever_the_template_writes(self, tmp_path, chat, template):
        tokenizer = char_tokenizer(bos=True, template=template)
        path = jsonl(tmp_path, {"prompt": "hi", "response": "yo"})
        (prompt,) = prompts(path, tokenizer=tokenizer, chat_template=chat).prompts
        ((tokens, _),) = rows_of(path, tokenizer=tokenizer, chat_template=chat)
        assert prompt.tokens == (BOS, *ids("uhi;a" if chat else "hi"))
        assert tokens == (*prompt.tokens, *ids("yo"), EOS)

    def test_no_bos_is_invented_for_a_tokenizer_that_adds_none(self, tmp_path):
        (prompt,) = prompts(jsonl(tmp_path, {"prompt": "hi"})).prompts
        assert prompt.tokens == ids("hi")

    def test_both_styles_of_messages_are_the_same_prompt(self, tmp_path):
        ours = [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}]
        theirs = [{"from": "system", "value": "S"}, {"from": "human", "value": "U"}]
        found = prompts(jsonl(tmp_path, {"prompt": ours}, {"prompt": theirs})).prompts
        assert [p.tokens for p in found] == [ids("sS;uU;a")] * 2

    def test_input_is_appended_to_the_instruction_where_there_is_one(self, tmp_path):
        path = jsonl(tmp_path, *({"prompt": "add", "input": x, "response": "3"} for x in ("1 2", "")))
        tokenizer = char_tokenizer()
        found = [
            tokenizer.decode(tokens) for tokens, _ in rows_of(path, tokenizer=tokenizer, input_key="input")
        ]
        assert found == ["add<unk>1 23</s>", "add3</s>"]  # the newline is not in this vocabulary

    @pytest.mark.parametrize(
        "good",
        [
            "yes",
            {"from": "gpt", "value": "yes"},
            [{"role": "assistant", "content": "yes"}],
            [{"role": "user", "content": "ok?"}, {"role": "assistant", "content": "yes"}],
        ],
    )
    def test_a_pair_is_the_prompt_twice_however_responses_are_written(self, tmp_path, good):
        row = {"prompt": [{"role": "user", "content": "ok?"}], "response": good, "rejected": "n"}
        ((chosen, rejected),) = pairs_of(jsonl(tmp_path, row))
        start = ids("uok?;a")
        assert chosen == ((*start, *ids("yes"), EOS), (False,) * 6 + (True,) * 4)
        assert rejected == ((*start, *ids("n"), EOS), (False,) * 6 + (True,) * 2)

    def test_whole_dialogues_share_their_prompt(self, tmp_path):
        start = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"
        path = jsonl(tmp_path, {"response": start + " xy", "rejected": start + " xz"})
        ((chosen, rejected),) = pairs_of(path, prompt_key="")
        assert (sum(chosen[1]), sum(rejected[1])) == (
            4,
            4,
        )  # space, two letters, EOS: the shared x is response
        assert chosen[0][-4:] == (*ids(" xy"), EOS)
        ((chat, _),) = pairs_of(path, prompt_key="", chat_template=True)
        assert chat[0] == (*ids("ua;ab;uc;a xy"), EOS)


class TestFiles:
    def test_every_format_gives_the_same_prompts(self, tmp_path):
        rows = [{"prompt": "a,b", "label": "1"}, {"prompt": 'c"d', "label": "2"}]
        jsonl(tmp_path, *rows)
        (tmp_path / "rows.json").write_text(json.dumps(rows, indent=1))
        (tmp_path / "rows.csv").write_text('prompt,label\n"a,b",1\n"c""d",2\n')
        (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress((tmp_path / "rows.jsonl").read_bytes()))
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
        files = sorted(tmp_path.iterdir())
        found = [prompts(str(file), label_key="label").prompts for file in files]
        assert len(files) == 5
        assert all(each == found[0] for each in found)

    def test_a_line_separator_inside_a_text_does_not_cut_the_row(self, tmp_path):
        (tmp_path / "rows.jsonl").write_text('{"prompt": "a\u2028b"}\n\n{"prompt": "c"}\n')
        assert [p.row for p in prompts(str(tmp_path / "rows.jsonl")).prompts] == [0, 1]

    def test_max_rows_reads_only_the_first(self, tmp_path):
        path = jsonl(tmp_path, {"prompt": "a"}, {"prompt": "b"}, {"prompt": None})
        assert [p.text for p in prompts(path, max_rows=2).prompts] == ["a", "b"]

    @pytest.mark.parametrize(
        ("name", "content", "reason"),
        [
            ("row.jsonl", None, "no such file, did you mean 'rows.jsonl'"),
            ("rows.json", b"[1, ", "not JSON"),
            ("rows.jsonl", b"\n", "holds no rows"),
            ("rows.json", b"[]", "holds no rows"),
            ("rows.jsonl.gz", b"plain", "cannot be read: Not a gzipped file"),
            ("rows.parquet", b"plain", "cannot be read"),
            ("rows.csv", b"prompt\n\xff\n", "cannot be read: 'utf-8'"),
            ("rows.txt", b"a", "is no data file; give a file ending in one of .json"),
        ],
    )
    def test_a_broken_file_is_named_with_field_and_reason(self, tmp_path, name, content, reason):
        (tmp_path / "rows.jsonl").write_text("{}")
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=r"rl\.prompts\.path=.*" + reason.replace(".", r"\.")):
            prompts(str(tmp_path / name))

    def test_a_hub_id_without_the_package_says_what_to_install(self, monkeypatch):
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(ValueError, match=r"no file here.*pip install datasets"):
            prompts("org/name")


class TestBadRows:
    def test_a_mistyped_column_is_one_error_with_the_nearest_name(self, tmp_path):
        path = jsonl(tmp_path, {"question": "a"}, {"question": "b"})
        with pytest.raises(ValueError, match=r"rl\.prompts\.prompt_key='qestion'.*'question'\?; its columns"):
            prompts(path, prompt_key="qestion")

    def test_every_bad_row_is_named_with_its_reason(self, tmp_path):
        user = {"role": "user", "content": "a"}
        bad = [
            (None, "prompt is None"),
            ("  ", "prompt is empty"),
            (7, "prompt is int '7'; expected a text"),
            ("a\ud800", "lone surrogate at character 1"),
            ([], "empty list"),
            ([{"role": "boss", "content": "a"}], "prompt[0] has the role 'boss'"),
            ([user, user], "has the roles user user"),
            ([user, {"role": "assistant", "content": "b"}], "ends with the assistant"),
            ([{"role": "user", "content": None}], "prompt[0] is None"),
            ("x" * 101, "has 101 tokens, room is 100"),
        ]
        good = [{"prompt": "fine"}]
        path = jsonl(tmp_path, *good, *({"prompt": value} for value, _ in bad))
        with Path(path).open("a") as file:
            file.write('{"prompt": "cut\n[1]\n{"other": 1}\n')
        with pytest.raises(ValueError) as caught:
            prompts(path)
        lines = str(caught.value).splitlines()
        assert lines[0] == (
            f"rl.prompts.path={path!r}: 13 bad rows (numbered from 0); correct or remove them"
        )
        reasons = [*(reason for _, reason in bad), "not JSON", "a row is an object", "prompt is None"]
        for number, (line, reason) in enumerate(zip(lines[1:], reasons, strict=True), start=1):
            assert line.startswith(f"  row {number}: ") and reason in line

    def test_twenty_rows_are_listed_and_the_rest_counted(self, tmp_path):
        with pytest.raises(ValueError, match=r"23 bad rows") as caught:
            prompts(jsonl(tmp_path, *[{"prompt": ""}] * 23))
        assert str(caught.value).splitlines()[-2:] == [
            "  row 19: prompt is empty; fill it in",
            "  ... and 3 more",
        ]

    @pytest.mark.parametrize(("size", "fits"), [(4, True), (5, True), (6, False)])
    def test_a_prompt_may_fill_its_room_and_not_more(self, tmp_path, size, fits):
        path = jsonl(tmp_path, {"prompt": "ab"}, {"prompt": "x" * size})
        found = prompts(path, room=5, too_long="drop")
        assert ([p.row for p in found.prompts], found.num_dropped) == (([0, 1], 0) if fits else ([0], 1))

    def test_dropping_every_row_is_an_error(self, tmp_path):
        path = jsonl(tmp_path, {"prompt": "abc"}, {"prompt": ""})
        with pytest.raises(ValueError, match="no row is left of 2, 1 are too long and 1 are bad"):
            prompts(path, room=2, too_long="drop", max_bad_rows=1)

    def test_eos_counts_towards_the_length_of_a_row(self, tmp_path):
        path = jsonl(tmp_path, {"prompt": "ab", "response": "c", "rejected": "cd"})
        assert len(rows_of(path, max_length=4)) == 1
        with pytest.raises(
            ValueError, match=r"sft.data.path=(.|\n)*row 0: the row has 2 \+ 2 tokens, .* is 3"
        ):
            rows_of(path, max_length=3)
        with pytest.raises(ValueError, match=r"row 0: the row has 2 \+ 3 tokens"):
            pairs_of(path, max_length=4)

    def test_dropped_rows_are_reported(self, tmp_path, caplog):
        path = jsonl(tmp_path, *({"prompt": "ab", "response": "c" * n} for n in (1, 9, 1)))
        assert len(rows_of(path, max_length=5, too_long="drop")) == 2
        assert "dropped 1 of 3 rows that are too long, the first of them [1]" in caplog.text

    def test_an_empty_demonstration_is_refused(self, tmp_path):
        with pytest.raises(ValueError, match="row 0: the response is empty"):
            rows_of(jsonl(tmp_path, {"prompt": "ab", "response": ""}))

    def test_a_conversation_that_is_not_the_prompts_is_refused(self, tmp_path):
        other = [{"role": "user", "content": "else"}, {"role": "assistant", "content": "yes"}]
        with pytest.raises(ValueError, match="row 0: response starts unlike the prompt"):
            pairs_of(jsonl(tmp_path, {"prompt": "ab", "response": other, "rejected": "n"}))

    def test_a_template_that_is_missing_or_refuses_says_so(self, tmp_path):
        path = jsonl(tmp_path, {"prompt": "hi"})
        with pytest.raises(ValueError, match=r"rl\.prompts\.path=.*rows.jsonl' with .*chat_template=True"):
            prompts(path, tokenizer=char_tokenizer(template=None), chat_template=True)
        with pytest.raises(ValueError, match=r"row 0: the chat template refuses the messages \(no system"):
            prompts(
                path,
                tokenizer=char_tokenizer(template="{{ raise_exception('no system') }}"),
                chat_template=True,
            )


class TestTokenizers:
    def test_equal_tokenizers_agree_and_padding_does_not_matter(self):
        a, b = char_tokenizer(), char_tokenizer(pad="<unk>", template=None)
        same_tokenizer(a, b, ("model.path", "roles.reward.model"))
        assert fingerprint(a) == fingerprint(char_tokenizer())

    @pytest.mark.parametrize(
        ("other", "difference"),
        [
            (char_tokenizer(swap=True), "vocabularies differ: 98 and 98 tokens, e.g. 'a' is 68 and 69"),
            (char_tokenizer(bos=True), "special tokens differ: .*'bos': None.*'bos': 1"),
            (char_tokenizer(template="{{ x }}"), "chat templates differ"),
        ],
    )
    def test_the_error_says_what_differs(self, other, difference):
        with pytest.raises(ValueError, match="model.path and roles.reward.model: .*" + difference):
            same_tokenizer(char_tokenizer(), other, ("model.path", "roles.reward.model"))


@pytest.mark.skipif(not REAL.is_dir(), reason=f"real data sets are not at {REAL}")
class TestRealFiles:
    def test_alpaca(self):
        path = str(REAL / "alpaca_en_demo.json")
        found = rows_of(
            path, max_length=10**6, prompt_key="instruction", response_key="output", input_key="input"
        )
        assert len(found) == 999
        assert all(tokens[-1] == EOS and mask[-1] for tokens, mask in found)

    def test_dpo(self):
        path = str(REAL / "dpo_en_demo.json")
        found = pairs_of(path, max_length=10**6, prompt_key="conversations", response_key="chosen")
        assert len(found) == 300

    def test_gsm8k(self):
        path = str(REAL / "gsm8k_train.jsonl")
        found = prompts(path, room=10**6, prompt_key="question", label_key="answer").prompts
        assert len(found) == 7473
        assert found[0].label is not None and found[0].label.endswith("#### 72")

    def test_hh(self):
        path = str(REAL / "hh_rlhf_harmless_base_test.jsonl.gz")
        found = pairs_of(path, max_length=10**6, prompt_key="", response_key="chosen")
        assert len(found) == 2312
        for (chosen, a), (rejected, b) in found:
            assert chosen[: a.index(True)] == rejected[: b.index(True)]
