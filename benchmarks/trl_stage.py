"""One SFT or DPO training with TRL on a CPU, in an environment of TRL's: ``versus_trl_stages.py`` starts it.

Prints one line of JSON: wall and CPU seconds of every optimizer step, and the tokens in it without padding,
as Quartet counts them. What TRL can do about padding on a CPU is a setting: ``--micro`` sequences (pairs) per
backward pass, ``--group-by-length``, and ``--packing``.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback
from transformers.utils import logging
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--stage", choices=["sft", "dpo"], required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--micro", type=int, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--max-length", type=int, required=True)
    parser.add_argument("--learning-rate", type=float, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--group-by-length", action="store_true")
    parser.add_argument("--packing", action="store_true")
    parser.add_argument("--precompute", action="store_true")
    parser.add_argument("--out", required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    trainer = (sft if arguments.stage == "sft" else dpo)(arguments)
    clock, seen = Clock(), counting(trainer)
    trainer.add_callback(clock)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    per_step = arguments.batch // arguments.micro
    tokens = [sum(seen[i : i + per_step]) for i in range(0, len(seen), per_step)]
    loss = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    found = {"seconds": clock.seconds, "cpu_seconds": clock.cpu_seconds, "loss": loss}
    print(json.dumps({**found, "tokens": tokens[: len(clock.seconds)]}))


def common(arguments):
    return {
        "output_dir": arguments.out, "use_cpu": True, "bf16": False, "gradient_checkpointing": False,
        "per_device_train_batch_size": arguments.micro, "max_steps": arguments.steps,
        "gradient_accumulation_steps": arguments.batch // arguments.micro, "report_to": [],
        "learning_rate": arguments.learning_rate, "lr_scheduler_type": "constant", "logging_steps": 1,
        "save_strategy": "no", "max_length": arguments.max_length, "dataloader_pin_memory": False,
        "train_sampling_strategy": "group_by_length" if arguments.group_by_length else "random",
    }  # fmt: skip


def sft(arguments):
    settings = SFTConfig(**common(arguments), packing=arguments.packing, completion_only_loss=True)
    rows = [{"prompt": row["prompt"], "completion": row["response"]} for row in read(arguments.rows)]
    return SFTTrainer(
        model=model(arguments), args=settings, train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(arguments.model),
    )  # fmt: skip


def dpo(arguments):
    settings = DPOConfig(**common(arguments), beta=0.1, precompute_ref_log_probs=arguments.precompute)
    rows = [
        {"prompt": row["prompt"], "chosen": row["response"], "rejected": row["rejected"]}
        for row in read(arguments.rows)
    ]
    reference = None if arguments.precompute else model(arguments)
    return DPOTrainer(
        model=model(arguments), ref_model=reference, args=settings, train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(arguments.model),
    )  # fmt: skip


def read(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def model(arguments):
    return AutoModelForCausalLM.from_pretrained(
        arguments.model, dtype=torch.float32, attn_implementation="sdpa"
    )


class Clock(TrainerCallback):
    """Seconds of every optimizer step, by the wall and by the processors."""

    def __init__(self):
        self.seconds, self.cpu_seconds = [], []

    def on_train_begin(self, *_, **__):
        self.last = time.perf_counter(), time.process_time()

    def on_step_end(self, *_, **__):
        now = time.perf_counter(), time.process_time()
        self.seconds.append(now[0] - self.last[0])
        self.cpu_seconds.append(now[1] - self.last[1])
        self.last = now


def counting(trainer):
    """Tokens of every micro-batch that the trainer is given, appended as it goes."""
    seen, step = [], trainer.training_step

    def training_step(given, inputs, *rest):
        mask = inputs.get("attention_mask")
        seen.append(int(inputs["input_ids"].numel() if mask is None else mask.sum()))
        return step(given, inputs, *rest)

    trainer.training_step = training_step
    return seen


if __name__ == "__main__":
    main()
