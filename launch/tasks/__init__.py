"""Tasks that make their own data, tokenizer and model: a run that downloads nothing and has a known truth.

One file per task, with ``prepare(task, folder) -> TaskFiles``; the folder is the registry. What a task writes
depends on its settings alone: a resumed run writes the same bytes again.
"""

from dataclasses import dataclass
from pathlib import Path

from orchestrator import plugins
from orchestrator.config import ChatData, PromptData, Task


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskFiles:
    """What a task wrote, as the settings that read it. No held-out problem is in a training file."""

    model: Path  # from_pretrained folder, tokenizer included; random weights, float32
    sft: ChatData  # prompt and response; some responses are wrong on purpose
    pairs: ChatData  # right and wrong responses
    heldout_pairs: ChatData
    prompts: PromptData  # with the right answer as label
    heldout_prompts: PromptData


def prepare(task: Task, folder: Path) -> TaskFiles:
    """Writes the files of the task into ``folder``; ValueError lists the known tasks for an unknown name."""
    return plugins.find("launch.tasks", task.name).prepare(task, folder)
