"""Adding one digit to a three-digit number: a task on which a whole RLHF run can be seen to work in minutes.

The demonstrations of the SFT stage are wrong in one way: in ``wrong_fraction`` of them the carry is
forgotten ("437+8=435"). SFT imitates them and ends mediocre. The preference pairs are clean, so the reward
model learns to tell right from wrong, and PPO moves the policy to what is preferred. The judge is equality
with the sum, never the reward model.

    prompt "437+8="    right "445"    carry forgotten "435"    pair ("445", a mistake)    label "445"

Only a problem with a carry (half of all) can be demonstrated wrongly. When most of them are, the likeliest
answer to each of them is wrong: greedy accuracy after SFT is 50 to 60 %.

Why not two two-digit numbers, or all ten digits: learning to say a sum is easy (every token teaches),
learning to check one is hard (one bit a pair). Fifty last-digit sums are what a reward model this small
learns to check in half a minute; with ninety it fails on some seeds, and PPO then learns what it got wrong.
"""

import json
import random
from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from launch.tasks import TaskFiles
from orchestrator.config import ChatData, PromptData, Task

Problem = tuple[int, int]  # (437, 8)

FIRST, SECOND = range(100, 1000), range(3, 8)  # half of these problems have a carry
MISTAKES = {"carry": 40, "wrong way": 15, "last digit": 20, "other digit": 15, "length": 10}  # odds
PAIRS_PER_PROBLEM = 5
MAX_POSITIONS = 64
SPECIAL = ("<pad>", "<eos>", "<unk>")  # padding is not EOS: a batch shows where a response ended


def prepare(task: Task, folder: Path) -> TaskFiles:
    """Writes data, tokenizer and model; ValueError when the settings ask for too many problems."""
    folder.mkdir(parents=True, exist_ok=True)
    train, heldout = split(task)
    chance = random.Random(task.seed + 1)
    spoilt = _spoilt(train, task, chance)
    sft = [{"prompt": prompt(p), "response": forgotten_carry(p) if p in spoilt else answer(p)} for p in train]
    return TaskFiles(
        model=_write_model(folder / "model", task.seed),
        sft=ChatData(path=_write(folder / "sft.jsonl", sft)),
        pairs=_write_pairs(folder / "pairs.jsonl", train, chance),
        heldout_pairs=_write_pairs(folder / "heldout_pairs.jsonl", heldout, chance),
        prompts=_write_prompts(folder / "prompts.jsonl", train),
        heldout_prompts=_write_prompts(folder / "heldout_prompts.jsonl", heldout),
    )


def split(task: Task) -> tuple[list[Problem], list[Problem]]:
    """Training and held-out problems: all different, in an order of the task's seed."""
    problems = [(a, b) for a in FIRST for b in SECOND]
    wanted = task.num_train + task.num_heldout
    if wanted > len(problems):
        raise ValueError(
            f"task.num_train={task.num_train} + task.num_heldout={task.num_heldout} = {wanted} problems, but "
            f"there are only {len(problems)}; lower one of them"
        )
    random.Random(task.seed).shuffle(problems)
    return problems[: task.num_train], problems[task.num_train : wanted]


def prompt(problem: Problem) -> str:
    return f"{problem[0]}+{problem[1]}="


def answer(problem: Problem) -> str:
    return str(sum(problem))


def has_carry(problem: Problem) -> bool:
    """Whether the last digits add up to ten or more."""
    return problem[0] % 10 + problem[1] % 10 > 9


def forgotten_carry(problem: Problem) -> str:
    """(437, 8) -> "435"."""
    return str(sum(problem) - 10)


def mistake(problem: Problem, chance: random.Random) -> str:
    """A plausible wrong answer: a carry forgotten or invented, one digit replaced, a digit too few or many.

    The forgotten carry is what the SFT policy gets wrong. The others must be there too: a reward model that
    has only seen it prefers the higher answer wherever there is a carry, and PPO finds out.
    """
    right = answer(problem)
    kind = chance.choices(tuple(MISTAKES), tuple(MISTAKES.values()))[0]
    if kind == "carry":
        return str(sum(problem) - 10 if has_carry(problem) else sum(problem) + 10)
    if kind == "wrong way":
        return str(sum(problem) + 10 if has_carry(problem) else sum(problem) - 10)
    if kind == "length":
        return chance.choice((right[:-1], right[1:], right + str(chance.randrange(10))))
    at = len(right) - 1 if kind == "last digit" else chance.randrange(len(right) - 1)
    return right[:at] + str((int(right[at]) + chance.randrange(1, 10)) % 10) + right[at + 1 :]


def _spoilt(train: list[Problem], task: Task, chance: random.Random) -> set[Problem]:
    """The problems that are demonstrated wrongly."""
    carrying = [problem for problem in train if has_carry(problem)]
    count = round(task.wrong_fraction * len(train))
    if count > len(carrying):
        raise ValueError(
            f"task.wrong_fraction={task.wrong_fraction} spoils {count} of {len(train)} rows, but only "
            f"{len(carrying)} have a carry to forget; use at most {len(carrying) / len(train):.2f}"
        )
    return set(chance.sample(carrying, count))


def _write_pairs(file: Path, problems: list[Problem], chance: random.Random) -> ChatData:
    rows = (
        {"prompt": prompt(p), "chosen": answer(p), "rejected": mistake(p, chance)}
        for _ in range(PAIRS_PER_PROBLEM)
        for p in problems
    )
    return ChatData(path=_write(file, rows), response_key="chosen")


def _write_prompts(file: Path, problems: list[Problem]) -> PromptData:
    rows = ({"prompt": prompt(p), "answer": answer(p)} for p in problems)
    return PromptData(path=_write(file, rows), label_key="answer")


def _write(file: Path, rows: Iterable[dict[str, str]]) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character, no BOS: "437+8=" -> six tokens."""
    vocabulary = {token: i for i, token in enumerate((*SPECIAL, *"0123456789+="))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    pad, eos, unknown = SPECIAL
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=pad,
        eos_token=eos,
        unk_token=unknown,
        model_max_length=MAX_POSITIONS,
    )


def _write_model(folder: Path, seed: int) -> Path:
    """A Llama of one million parameters with random weights of this seed."""
    tokenizer = make_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=1152,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=MAX_POSITIONS,
        initializer_range=0.05,  # Llama's 0.02 is meant for wider models: this one learns twice as fast
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
