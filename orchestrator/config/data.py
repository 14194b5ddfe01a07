"""What is read from files: prompts, conversations, and the built-in task that writes its own."""

from __future__ import annotations

from typing import Literal

from pydantic import NonNegativeInt, PositiveFloat, PositiveInt

from orchestrator.settings import Fraction, Settings


class Task(Settings):
    """A small verifiable task that makes its own data, tokenizer and model: nothing is downloaded."""

    name: str = "addition"
    """A file in launch/tasks/."""
    seed: int = 0
    """Seeds the data, the split and the initial weights."""
    num_train: PositiveInt = 4000
    """Rows of the training split."""
    num_heldout: PositiveInt = 500
    """Rows of the held-out split; no row is in both."""
    wrong_fraction: Fraction = 0.0
    """Share of the SFT rows whose answer is wrong on purpose, so that SFT ends mediocre."""


class PromptData(Settings):
    path: str = ""
    """JSON, JSONL, Parquet or CSV file, or a Hub data set id."""
    split: str = "train"
    """Split of a Hub data set."""
    prompt_key: str = "prompt"
    """Column with the prompt: a text, or a list of chat messages."""
    label_key: str | None = None
    """Column with the reference answer for reward functions."""
    chat_template: bool = False
    """Wrap a prompt in the tokenizer's chat template (message lists always are)."""
    max_rows: PositiveInt | None = None
    """Use only the first rows."""
    too_long: Literal["error", "drop"] = "error"
    """A prompt that leaves no room for max_new_tokens: refuse the run (naming the row), or drop and count
    it."""
    max_bad_rows: NonNegativeInt = 0
    """Go on without this many bad rows, counted in a warning; with more the run is refused."""


class ChatData(Settings):
    path: str = ""
    """JSON, JSONL, Parquet or CSV file, or a Hub data set id."""
    split: str = "train"
    """Split of a Hub data set."""
    prompt_key: str = "prompt"
    """Column with the prompt: a text, or a list of chat messages."""
    messages_key: str | None = None
    """Column with a whole chat: SFT trains on every assistant turn; kto judges the last one."""
    text_key: str | None = None
    """Column with plain text (SFT): every token is trained, longer texts are cut at model.max_length."""
    response_key: str = "response"
    """Column with the response (for pairs, the better one)."""
    rejected_key: str = "rejected"
    """Column with the worse response; only preference data has one."""
    margin_key: str | None = None
    """Column with how much better the chosen response is (bradley_terry)."""
    responses_key: str = "responses"
    """Column with the list of responses of a prompt (ranking), best first unless ranks_key is set."""
    ranks_key: str | None = None
    """Column with the rank of each of them: 1 is best, equal ranks are not compared."""
    rating_key: str = "rating"
    """Column with the number a response was given (regression)."""
    label_key: str = "label"
    """Column with good or bad: true or false, 1 or 0 (kto)."""
    input_key: str | None = None
    """Column appended to the prompt where it is not empty (Alpaca's `input`)."""
    chat_template: bool = False
    """Wrap prompt and response in the tokenizer's chat template."""
    max_rows: PositiveInt | None = None
    """Use only the first rows."""
    too_long: Literal["error", "drop"] = "error"
    """A row longer than model.max_length: refuse the run (naming the row), or drop and count it."""
    max_bad_rows: NonNegativeInt = 0
    """Go on without this many bad rows, counted in a warning; with more the run is refused."""
    ratio: PositiveFloat | None = None
    """Share of this data set in a mixture, relative to the others'; default: its share of the rows."""
