"""Supervised rows, tokenised and checked before any model is loaded: chats, texts, pairs, rankings, ratings.

Every bad row of a file is reported in one error, with its number and the remedy. What comes out is a list of
units: the rows that one loss compares, with what the data say of them.

    {"prompt": "2+3=", "response": "5", "rejected": "6"}   one token a character, EOS 9, no BOS
    examples   Unit(rows=(((2, 10, 3, 11, 5, 9), (False, ..., True, True)),))   EOS is trained (BUGS A7)
    pairs      Unit(rows=(chosen row, rejected row))
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from orchestrator.chats import LAST_ASSISTANT, BadRowError, Encoder, Message, clean, to_message, to_messages
from orchestrator.config import ChatData
from orchestrator.data import TOO_LONG_REMEDY, PromptValue, TooLongError, prompt_value, sieve
from orchestrator.ledger import sample_seed
from orchestrator.objectives._base import Layout
from orchestrator.tables import read_rows, require_columns

Example = tuple[tuple[int, ...], tuple[bool, ...]]  # tokens, action_mask


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """What is drawn, shuffled and kept together."""

    rows: tuple[Example, ...]  # one; chosen and rejected; the K responses of a ranking
    targets: tuple[float, ...] | None = None  # of each row: margin, minus its rank, rating, 1 good / 0 bad
    mismatched: Example | None = None  # kto: this prompt with another's response

    @property
    def num_tokens(self) -> int:
        return sum(len(tokens) for tokens, _ in self.rows)


def read_units(data: ChatData, tokenizer: Any, *, layout: Layout, max_length: int, field: str) -> list[Unit]:
    """The rows of one file as an objective reads them. ValueError lists every bad row."""
    rows = read_rows(data.path, split=data.split, max_rows=data.max_rows, field=field)
    columns, reader = _readers(data, layout)
    require_columns(rows, {key: getattr(data, key) or "" for key in columns}, field)
    encoder = Encoder.of(tokenizer, use_template=data.chat_template, field=field, path=data.path)

    def read(row: dict[str, Any], number: int) -> list[Unit]:
        return reader(encoder, row, data, max_length)

    units = [unit for found in sieve(rows, read, data=data, field=field) for unit in found]
    return _with_mismatches(units, max_length, field) if layout == "labels" else units


RowReader = Callable[[Encoder, dict[str, Any], ChatData, int], list[Unit]]


def _readers(data: ChatData, layout: Layout) -> tuple[tuple[str, ...], RowReader]:
    """The settings that name columns, and the function that reads a row."""
    prompt: tuple[str, ...] = ("prompt_key", "response_key", "input_key")
    if layout == "examples" and data.text_key:
        return ("text_key",), _read_text
    if layout in ("examples", "labels") and data.messages_key:
        prompt = ("messages_key",)
    readers: dict[str, tuple[tuple[str, ...], RowReader]] = {
        "examples": (prompt, _read_chat if data.messages_key else _read_example),
        "pairs": ((*prompt, "rejected_key", "margin_key"), _read_pair),
        "rankings": (("prompt_key", "responses_key", "ranks_key", "input_key"), _read_ranking),
        "ratings": ((*prompt, "rating_key"), _read_rating),
        "labels": ((*prompt, "label_key"), _read_label),
    }
    return readers[layout]


def _read_text(encoder: Encoder, row: dict[str, Any], data: ChatData, max_length: int) -> list[Unit]:
    """A document, cut where it is longer; its first token has nothing before it and is not trained."""
    tokens = encoder.text(clean(row.get(str(data.text_key)), str(data.text_key)))
    parts = [tokens[start : start + max_length] for start in range(0, len(tokens), max_length)]
    return [Unit(rows=((part, (False,) + (True,) * (len(part) - 1)),)) for part in parts if len(part) > 1]


def _read_chat(encoder: Encoder, row: dict[str, Any], data: ChatData, max_length: int) -> list[Unit]:
    messages = _messages(row, data)
    pieces = encoder.chat(messages)
    tokens = tuple(token for piece, _ in pieces for token in piece)
    mask = tuple(trained for piece, trained in pieces for _ in piece)
    if len(tokens) > max_length:
        found = f"the chat has {len(tokens)} tokens, model.max_length is {max_length}"
        raise TooLongError(f"{found}; {TOO_LONG_REMEDY}")
    return [Unit(rows=((tokens, mask),))]


def _read_example(encoder: Encoder, row: dict[str, Any], data: ChatData, max_length: int) -> list[Unit]:
    prompt, (response,) = _conversation(row, data, (data.response_key,))
    return [Unit(rows=(_example(encoder, prompt, clean(response, "the response"), max_length),))]


def _read_pair(encoder: Encoder, row: dict[str, Any], data: ChatData, max_length: int) -> list[Unit]:
    """Silence is a response (hh-rlhf); two equal responses prefer nothing."""
    keys = (data.response_key, data.rejected_key)
    prompt, responses = _conversation(row, data, keys)
    if responses[0] == responses[1]:
        raise BadRowError(f"{keys[0]} and {keys[1]} are equal, so neither is preferred; remove the row")
    rows = tuple(_example(encoder, prompt, response, max_length) for response in responses)
    if data.margin_key is None:
        return [Unit(rows=rows)]
    return [Unit(rows=rows, targets=(_number(row.get(data.margin_key), data.margin_key), 0.0))]


def _read_ranking(encoder: Encoder, row: dict[str, Any], data: ChatData, max_length: int) -> list[Unit]:
    """Targets are minus the ranks: higher is better."""
    responses = row.get(data.responses_key)
    if not isinstance(responses, list) or len(responses) < 2:
        raise BadRowError(
            f"{data.responses_key} is no list of 2 or more responses; give it all of a prompt's"
        )
    named = {f"{data.responses_key}[{i}]": response for i, response in enumerate(responses)}
    prompt, texts = _conversation({**row, **named}, data, tuple(named))
    ranks: object = row.get(data.ranks_key) if data.ranks_key else list(range(len(texts)))
    if not isinstance(ranks, list) or len(ranks) != len(texts):
        raise BadRowError(f"{data.ranks_key} is no list of {len(texts)} ranks; give each response one")
    targets = tuple(-_number(rank, str(data.ranks_key)) for rank in ranks)
    if len(set(targets)) == 1:
        raise BadRowError(f"{data.ranks_key} ranks all responses equal, so none is preferred; remove the row")
    if len(set(zip(texts, targets, strict=True))) > len(set(texts)):
        raise BadRowError(f"{data.responses_key} has equal responses of different ranks; leave one of them")
    return [Unit(rows=tuple(_example(encoder, prompt, t, max_length) for t in texts), targets=targets)]


def _read_rating(encoder: Encoder, row: dict[str, Any], data: ChatData, max_length: int) -> list[Unit]:
    prompt, (response,) = _conversation(row, data, (data.response_key,))
    rating = _number(row.get(data.rating_key), data.rating_key)
    return [Unit(rows=(_example(encoder, prompt, response, max_length),), targets=(rating,))]


def _read_label(encoder: Encoder, row: dict[str, Any], data: ChatData, max_length: int) -> list[Unit]:
    label = row.get(data.label_key)
    if label in ("true", "True", "1", "false", "False", "0"):  # as CSV has it
        label = str(label).lower() in ("true", "1")
    if label not in (0, 1):
        raise BadRowError(f"{data.label_key} is {label!r}; expected true or false, 1 or 0")
    if data.messages_key:
        messages = _messages(row, data)
        if messages[-1]["role"] != "assistant":
            raise BadRowError(
                f"{data.messages_key} ends with the {messages[-1]['role']}; end it with the assistant"
            )
        example = _example(encoder, messages[:-1], messages[-1]["content"], max_length)
    else:
        prompt, (response,) = _conversation(row, data, (data.response_key,))
        example = _example(encoder, prompt, response, max_length)
    return [Unit(rows=(example,), targets=(float(bool(label)),))]


def _with_mismatches(units: Sequence[Unit], max_length: int, field: str) -> list[Unit]:
    """Each prompt with the response to the next other prompt, cut at ``max_length``.

    The paper shifts responses within a micro-batch (arXiv:2402.01306 section 4.1); shifted over the whole set
    they are as unrelated, and the same in every epoch. Rows of one prompt often stand together (a pair taken
    apart), and a response to the same prompt would be no mismatch.
    """
    examples = [unit.rows[0] for unit in units]
    prompts = [tokens[: mask.index(True)] for tokens, mask in examples]
    if len(set(prompts)) < 2:
        raise ValueError(
            f"{field} has {len(set(prompts))} prompt; kto estimates a KL from responses to other prompts: "
            "give it rows of 2 or more prompts"
        )
    n = len(units)
    other = [0] * n
    for place in reversed(range(2 * n)):  # twice around: the first round does not know what is after the end
        here, after = place % n, (place + 1) % n
        other[here] = after if prompts[here] != prompts[after] else other[after]
    found = []
    for unit, prompt, index in zip(units, prompts, other, strict=True):
        tokens, mask = examples[index]
        both = (prompt + tokens[mask.index(True) :])[:max_length]
        action_mask = (False,) * len(prompt) + (True,) * (len(both) - len(prompt))
        found.append(replace(unit, mismatched=(both, action_mask)))
    return found


def mix(sets: Sequence[Sequence[Unit]], ratios: Sequence[float], *, seed: int) -> list[Unit]:
    """As many units as there are in all, each set's share by its ratio.

    A set that is too small for its share is gone through again, each pass in an order of its own; of one that
    is too large a random part is used. Example: sets of 30 and 10 with ratios 1 and 1 give 20 and 20: two
    thirds of the first, the second twice.
    """
    total, whole = sum(map(len, sets)), sum(ratios)
    ends = [round(total * sum(ratios[: i + 1]) / whole) for i in range(len(ratios))]
    mixed: list[Unit] = []
    for number, (units, start, end) in enumerate(zip(sets, [0, *ends], ends, strict=False)):
        for turn in range(0, end - start, len(units)):
            order = list(units)
            random.Random(sample_seed(seed, f"mixture/{number}/{turn}")).shuffle(order)
            mixed += order[: end - start - turn]
    return mixed


def pack(units: Sequence[Unit], *, max_length: int, seed: int) -> list[Unit]:
    """Units of several rows, at most ``max_length`` tokens each: first fit in a shuffled order."""
    order = list(units)
    random.Random(sample_seed(seed, "packing")).shuffle(order)
    bins: list[list[Unit]] = []
    open_bins: list[tuple[int, int]] = []  # (room, bin); only the last few: a full search is quadratic
    for unit in order:
        fitting = next((i for i, (room, _) in enumerate(open_bins) if room >= unit.num_tokens), None)
        if fitting is None:
            bins.append([])
            open_bins = [(max_length, len(bins) - 1), *open_bins][:64]
            fitting = 0
        room, index = open_bins[fitting]
        bins[index].append(unit)
        open_bins[fitting] = (room - unit.num_tokens, index)
    return [Unit(rows=tuple(row for unit in units for row in unit.rows)) for units in bins]


def _messages(row: dict[str, Any], data: ChatData) -> list[Message]:
    """A chat with an answer in it."""
    value = row.get(str(data.messages_key))
    if not isinstance(value, list):
        raise BadRowError(f"{data.messages_key} is {type(value).__name__}; expected a list of messages")
    messages = to_messages(value, str(data.messages_key))
    if not any(message["role"] == "assistant" for message in messages):
        raise BadRowError(f"{data.messages_key} has no assistant turn, so nothing is to learn; give it one")
    return messages


def _number(value: object, key: str) -> float:
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise BadRowError(f"{key} is {value!r}; expected a number") from None
    if number - number != 0:
        raise BadRowError(f"{key} is {value!r}; expected a finite number")
    return number


def _example(encoder: Encoder, prompt: PromptValue, response: str, max_length: int) -> Example:
    start, end = encoder.prompt(prompt)[1], encoder.response(response)
    if len(start) + len(end) > max_length:
        found = f"the row has {len(start)} + {len(end)} tokens, model.max_length is {max_length}"
        raise TooLongError(f"{found}; {TOO_LONG_REMEDY}")
    return start + end, (False,) * len(start) + (True,) * len(end)


def _conversation(row: dict[str, Any], data: ChatData, keys: Sequence[str]) -> tuple[PromptValue, list[str]]:
    """The prompt, and the response of each key. With ``prompt_key`` "" the columns hold whole dialogues."""
    if not data.prompt_key:
        return _shared_prefix([row.get(key) for key in keys], keys)
    prompt = prompt_value(row.get(data.prompt_key), data.prompt_key)
    extra = row.get(data.input_key) if data.input_key else None
    if extra:
        if not isinstance(prompt, str):
            raise BadRowError(f"{data.input_key} cannot be appended to messages; leave input_key out")
        prompt = f"{prompt}\n{clean(extra, str(data.input_key))}"
    return prompt, [_response(row.get(key), prompt, key) for key in keys]


def _response(value: object, prompt: PromptValue, key: str) -> str:
    """A text, one assistant message, or a list: that message alone, or the prompt's messages and then it."""
    if not isinstance(value, (list, dict)):
        return clean(value, key, empty=True)
    messages = [to_message(m, key) for m in (value if isinstance(value, list) else [value])]
    before = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
    if not messages or messages[-1]["role"] != "assistant":
        raise BadRowError(f"{key} does not end with the assistant; give it the assistant's message")
    if messages[:-1] not in ([], before):
        raise BadRowError(f"{key} starts unlike the prompt; give it only the assistant's message")
    return messages[-1]["content"]


def _shared_prefix(values: Sequence[object], keys: Sequence[str]) -> tuple[PromptValue, list[str]]:
    """Whole dialogues: what they share up to the assistant's last common turn is the prompt."""
    first = values[0]
    if isinstance(first, list):
        prompt = prompt_value(to_messages(first, keys[0])[:-1], keys[0])
        return prompt, [_response(value, prompt, key) for value, key in zip(values, keys, strict=True)]
    texts = [clean(value, key) for value, key in zip(values, keys, strict=True)]
    shared = next((i for i, chars in enumerate(zip(*texts, strict=False)) if len(set(chars)) > 1), None)
    start = texts[0][: min(map(len, texts)) if shared is None else shared].rfind(LAST_ASSISTANT)
    if start < 0:
        raise BadRowError(
            f"{' and '.join(keys)}: no shared prompt ends with {LAST_ASSISTANT!r}; set prompt_key"
        )
    start += len(LAST_ASSISTANT)
    return texts[0][:start], [text[start:] for text in texts]
