"""Texts and chat messages -> tokens, in one way for SFT, preference pairs and the engine.

The invariant: the tokens of a prompt are a function of the prompt alone. A supervised row is those tokens,
then the response's tokens, then EOS: what SFT trains on is what the engine continues. A response ends with
the tokenizer's EOS and not with what the chat template writes after it (ChatML adds a newline), because EOS
is where the engine stops.

BOS follows the tokenizer: where its own encoding starts with BOS, every prompt starts with exactly one,
whether the chat template writes it too or not (BUGS A15); where it does not (GPT-2, SmolLM2), none is
invented.

    [{"role": "user", "content": "Hi"}]  and  [{"from": "human", "value": "Hi"}]  are the same messages
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from jinja2 import TemplateError

Message = dict[str, str]  # role, content

ROLES = {"human": "user", "gpt": "assistant", "observation": "tool"}  # ShareGPT's names -> ours
NEXT = {"user": ("assistant",), "assistant": ("user", "tool"), "tool": ("assistant", "tool")}
KNOWN_ROLES = ("system", "user", "assistant", "tool")
TURN = re.compile(r"\n\n(Human|Assistant):")  # dialogues of hh-rlhf
LAST_ASSISTANT = "\n\nAssistant:"


class BadRowError(ValueError):
    """What is wrong with one row, and the remedy; the reader adds file and row number."""


@dataclass(frozen=True, slots=True)
class Encoder:
    """A tokenizer, and what it does of its own accord."""

    tokenizer: Any  # PreTrainedTokenizerFast
    bos: tuple[int, ...]  # what every prompt starts with: one BOS, or nothing
    use_template: bool  # wrap texts too; message lists always are

    @classmethod
    def of(cls, tokenizer: Any, *, use_template: bool, field: str, path: str) -> "Encoder":
        """Raises ValueError when the template is asked for and there is none."""
        if use_template and not tokenizer.chat_template:
            raise ValueError(
                f"{field}.path={path!r} with {field}.chat_template=True, but the tokenizer "
                f"{tokenizer.name_or_path!r} has no chat template; set it to false, or use an instruct model"
            )
        bos = tokenizer.bos_token_id
        adds = bos is not None and tokenizer("a")["input_ids"][:1] == [bos]
        return cls(tokenizer, (bos,) if adds else (), use_template)

    def prompt(self, value: str | list[Message]) -> tuple[str, tuple[int, ...]]:
        """The text as the model meets it, and its tokens with at most one BOS."""
        text = value
        if self.use_template and isinstance(value, str):
            turns = dialogue(value) or [{"role": "user", "content": value}]
            text = self._render(to_messages(turns, "the prompt"))
        elif not isinstance(value, str):
            text = self._render(value)
        tokens = self._encode(text)
        if self.bos and tokens[:1] != self.bos:
            tokens = self.bos + tokens
        if tokens == self.bos:
            raise BadRowError(f"the prompt {text[:40]!r} encodes to no tokens; fill it in")
        return str(text), tokens

    def response(self, text: str) -> tuple[int, ...]:
        """Tokens of a response, EOS at the end."""
        return (*self._encode(text), self.tokenizer.eos_token_id)

    def text(self, text: str) -> tuple[int, ...]:
        """Tokens of a document: BOS where the tokenizer has it, EOS at the end."""
        return (*self.bos, *self._encode(text), self.tokenizer.eos_token_id)

    def chat(self, messages: list[Message]) -> list[tuple[tuple[int, ...], bool]]:
        """A whole chat as (tokens, trained) pieces: every assistant turn is trained, EOS included.

        Between two turns the template's own text stands. Where it ends a turn with the EOS token, that token
        is the trained one; where it ends turns otherwise, EOS is trained at the end of the chat only, because
        nothing else of the kind stands in the prompts that the engine will see.
        """
        pieces: list[tuple[tuple[int, ...], bool]] = []
        eos, eos_text = (self.tokenizer.eos_token_id,), str(self.tokenizer.eos_token)
        said = ""  # the chat so far, as the template writes it
        for turn in [i for i, message in enumerate(messages) if message["role"] == "assistant"]:
            before = self._render(messages[:turn])
            if not before.startswith(said):
                raise BadRowError(
                    "the chat template rewrites earlier turns (it may drop thoughts); give one turn a row, "
                    "as prompt and response"
                )
            between = before[len(said) :]
            if pieces and between.startswith(eos_text):
                pieces.append((eos, True))
                between = between.removeprefix(eos_text)
            start = self._encode(between)
            if not pieces and self.bos and start[:1] != self.bos:
                start = self.bos + start
            content = messages[turn]["content"]
            after = self._render(messages[: turn + 2]) if turn + 2 < len(messages) else before + content
            if not after.startswith(before + content):
                content = content.strip()  # many templates trim
            said = before + content
            pieces += [(start, False), (self._encode(content), True)]
        return [*pieces, (eos, True)]

    def _encode(self, text: Any) -> tuple[int, ...]:
        return tuple(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _render(self, messages: list[Message]) -> str:
        if not self.tokenizer.chat_template:
            raise BadRowError(
                "messages need a chat template, and the tokenizer has none; use an instruct model"
            )
        try:
            template = self.tokenizer.apply_chat_template
            return str(template(messages, tokenize=False, add_generation_prompt=True))
        except TemplateError as error:
            raise BadRowError(f"the chat template refuses the messages ({error}); change them") from error


def clean(value: object, what: str, *, empty: bool = False) -> str:
    """The text itself; BadRowError for None, another type, a lone surrogate or (unless allowed) emptiness."""
    if value is None:
        raise BadRowError(f"{what} is None; fill it in")
    if not isinstance(value, str):
        raise BadRowError(f"{what} is {type(value).__name__} {str(value)[:40]!r}; expected a text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise BadRowError(f"{what} has a lone surrogate at character {error.start}; remove it") from None
    if not empty and not value.strip():
        raise BadRowError(f"{what} is empty; fill it in")
    return value


def to_messages(values: Sequence[object], what: str) -> list[Message]:
    """Messages of either style: a system message only at the start, then user and assistant in turn."""
    if not values:
        raise BadRowError(f"{what} is an empty list; give it at least one message")
    messages = [to_message(value, f"{what}[{i}]") for i, value in enumerate(values)]
    turns = [m["role"] for m in messages]
    turns = turns[1:] if turns[0] == "system" else turns
    if turns[:1] != ["user"] or not all(b in NEXT.get(a, ()) for a, b in pairwise(turns)):
        found = " ".join(m["role"] for m in messages)
        raise BadRowError(f"{what} has the roles {found}; expected [system] user assistant user ...")
    return messages


def to_message(value: object, what: str) -> Message:
    """{role, content} or {from, value}."""
    if not isinstance(value, dict):
        raise BadRowError(f"{what} is {type(value).__name__}; expected {{role, content}} or {{from, value}}")
    role, content = value.get("role", value.get("from")), value.get("content", value.get("value"))
    role = ROLES.get(role, role) if isinstance(role, str) else role
    if role not in KNOWN_ROLES:
        raise BadRowError(f"{what} has the role {role!r}; known: {', '.join((*KNOWN_ROLES, *ROLES))}")
    return {"role": str(role), "content": clean(content, what)}


def dialogue(text: str) -> list[Message]:
    """An hh-rlhf prompt ("\\n\\nHuman: Hi\\n\\nAssistant:") as messages; [] when the text is not one."""
    start, *turns = TURN.split(text)
    contents = [content.strip() for content in turns[1::2]]
    if start.strip() or not turns or turns[-2:] != ["Assistant", ""]:
        return []
    roles = ["user" if name == "Human" else "assistant" for name in turns[0:-2:2]]
    return [{"role": r, "content": c} for r, c in zip(roles, contents[:-1], strict=True)]
