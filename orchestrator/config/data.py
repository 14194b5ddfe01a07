"""What is read from files: prompts, conversations, and the built-in task that writes its own."""

from __future__ import annotations

from typing import Literal

from pydantic import PositiveInt

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


class ChatData(Settings):
    path: str = ""
    """JSON, JSONL, Parquet or CSV file, or a Hub data set id."""
    split: str = "train"
    """Split of a Hub data set."""
    prompt_key: str = "prompt"
    """Column with the prompt: a text, or a list of chat messages."""
    response_key: str = "response"
    """Column with the response (for pairs, the better one)."""
    rejected_key: str = "rejected"
    """Column with the worse response; only preference data has one."""
    input_key: str | None = None
    """Column appended to the prompt where it is not empty (Alpaca's `input`)."""
    chat_template: bool = False
    """Wrap prompt and response in the tokenizer's chat template."""
    max_rows: PositiveInt | None = None
    """Use only the first rows."""
    too_long: Literal["error", "drop"] = "error"
    """A row longer than model.max_length: refuse the run (naming the row), or drop and count it."""
