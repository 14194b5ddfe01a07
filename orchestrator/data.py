"""Prompts, tokenised and checked before any model is loaded; the sieve that every file goes through.

Every bad row of a file is reported in one error, with its number and the remedy. What these functions return
is good: no later stage meets an empty prompt, a prompt without room for an answer, or an over-long row.

    {"prompt": "2+3="}, one token a character    Prompt(tokens=(2, 10, 3, 11), text="2+3=", ...)
"""

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from orchestrator.batch import Prompt
from orchestrator.chats import BadRowError, Encoder, Message, clean, to_messages
from orchestrator.config import ChatData, PromptData
from orchestrator.tables import Complaints, Row, Unreadable, read_rows, require_columns

PromptValue = str | list[Message]
T = TypeVar("T")

log = logging.getLogger(__name__)

TOO_LONG_REMEDY = "shorten it, raise model.max_length, or set too_long: drop"
PROBES = ("Hello, world!  2+3=5\n", "<s>naïve</s> 你好 🙂\t", "    def f(x):\n        return x\n")


class TooLongError(BadRowError):
    """A row that does not fit; ``too_long: drop`` leaves it out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptSet:
    """The prompts of a run in file order, with the uids of epoch 0; the ledger gives each epoch its own."""

    prompts: tuple[Prompt, ...]
    num_dropped: int  # too long, left out because ``too_long`` says so


def read_prompts(data: PromptData, tokenizer: Any, *, room: int, field: str) -> PromptSet:
    """``room``: tokens a prompt may have, max_length - max_new_tokens. ValueError lists every bad row."""
    rows = read_rows(data.path, split=data.split, max_rows=data.max_rows, field=field)
    require_columns(rows, {"prompt_key": data.prompt_key, "label_key": data.label_key or ""}, field)
    if not data.prompt_key:
        raise ValueError(f"{field}.prompt_key is empty; name the column with the prompt")
    encoder = Encoder.of(tokenizer, use_template=data.chat_template, field=field, path=data.path)

    def read(row: dict[str, Any], number: int) -> Prompt:
        text, tokens = encoder.prompt(prompt_value(row.get(data.prompt_key), data.prompt_key))
        if len(tokens) > room:
            raise TooLongError(f"the prompt has {len(tokens)} tokens, room is {room}; {TOO_LONG_REMEDY}")
        label = _label(row.get(data.label_key), data.label_key) if data.label_key else None
        return Prompt(uid=f"0/{number}", row=number, tokens=tokens, text=text, label=label)

    prompts = sieve(rows, read, data=data, field=field)
    return PromptSet(prompts=tuple(prompts), num_dropped=len(rows) - len(prompts))


def sieve(
    rows: Sequence[Row],
    read: Callable[[dict[str, Any], int], T],
    *,
    data: PromptData | ChatData,
    field: str,
) -> list[T]:
    """Every row through ``read``; ValueError for more than ``max_bad_rows`` bad ones, or none left."""
    complaints = Complaints(f"{field}.path={data.path!r}", data.max_bad_rows)
    kept: list[T] = []
    dropped: list[int] = []
    for number, row in enumerate(rows):
        try:
            if isinstance(row, Unreadable):
                raise BadRowError(row.reason)
            kept.append(read(row, number))
        except TooLongError as error:
            if data.too_long == "drop":
                dropped.append(number)
            else:
                complaints.add(number, str(error))
        except BadRowError as error:
            complaints.add(number, str(error))
    complaints.raise_all()
    if not kept:
        raise ValueError(
            f"{complaints.where}: no row is left of {len(rows)}, {len(dropped)} are too long and "
            f"{len(complaints.lines)} are bad; raise model.max_length, or correct the rows"
        )
    if dropped:
        text = "%s: dropped %d of %d rows that are too long, the first of them %s (numbered from 0)"
        log.warning(text, complaints.where, len(dropped), len(rows), dropped[:10])
    return kept


def prompt_value(value: object, key: str) -> PromptValue:
    """A text, or messages that end where the assistant is to speak."""
    if not isinstance(value, list):
        return clean(value, key)
    messages = to_messages(value, key)
    if messages[-1]["role"] == "assistant":
        raise BadRowError(f"{key} ends with the assistant, so nothing is to answer; end it with the user")
    return messages


def _label(value: object, key: str) -> str:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    return clean(value, key)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fingerprint:
    """What two tokenizers must have in common for the tokens of one to mean the same to the other.

    Padding is left out: no role ever attends to it.
    """

    vocabulary: str  # hash of token -> id
    special_tokens: tuple[tuple[str, int | None], ...]  # (("bos", None), ("eos", 9))
    chat_template: str  # hash; "" without a template
    probes: tuple[tuple[int, ...], ...]  # awkward texts: merges and normalisation are not in the vocabulary


def fingerprint(tokenizer: Any) -> Fingerprint:
    """Equal for tokenizers that read every text alike."""
    return Fingerprint(
        vocabulary=_hash(json.dumps(sorted(tokenizer.get_vocab().items()))),
        special_tokens=(("bos", tokenizer.bos_token_id), ("eos", tokenizer.eos_token_id)),
        chat_template=_hash(str(tokenizer.chat_template)) if tokenizer.chat_template else "",
        probes=tuple(tuple(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in PROBES),
    )


def same_tokenizer(a: Any, b: Any, names: tuple[str, str]) -> None:
    """ValueError that says what differs, and how, between the tokenizers that ``names`` gave.

    Roles exchange tokens, never text, so a role whose folder has no chat template is no conflict.
    """
    left, right = fingerprint(a), fingerprint(b)
    if left.vocabulary != right.vocabulary:
        what = "vocabularies differ: " + _first_difference(a.get_vocab(), b.get_vocab())
    elif left.special_tokens != right.special_tokens:
        what = f"special tokens differ: {dict(left.special_tokens)} and {dict(right.special_tokens)}"
    elif left.probes != right.probes:
        text, x, y = next(p for p in zip(PROBES, left.probes, right.probes, strict=True) if p[1] != p[2])
        what = f"rules differ: {text!r} becomes {list(x)} and {list(y)}"
    elif left.chat_template and right.chat_template and left.chat_template != right.chat_template:
        what = "chat templates differ"
    else:
        return
    raise ValueError(f"{names[0]} and {names[1]}: the tokenizers' {what}; use models that share a tokenizer")


def _first_difference(a: dict[str, int], b: dict[str, int]) -> str:
    token = min(t for t in a.keys() | b.keys() if a.get(t) != b.get(t))
    there = (a.get(token, "absent"), b.get(token, "absent"))
    return f"{len(a)} and {len(b)} tokens, e.g. {token!r} is {there[0]} and {there[1]}"


def _hash(text: str) -> str:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
