"""One GRPO training with TRL, in an environment of TRL's: ``versus_trl.py`` starts it.

Prints one line of JSON: seconds of every optimizer step, those of its generation (with vLLM: the weights'
way into it included), and the response tokens of all steps. The reward is the share of letters. With
``--vllm`` the engine lives in TRL's process, as TRL builds it. vLLM's CPU backend keeps linear weights
packed, where TRL's loading of one parameter after the other finds nothing to write to: there a whole reload,
layer by layer, takes its place.
"""

import argparse
import functools
import json
import time
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoTokenizer, PrinterCallback
from transformers.utils import logging
from trl import GRPOConfig, GRPOTrainer
from trl_stage import Clock, model, read


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--prompts", type=Path, required=True, help="lines of JSON with a prompt")
    parser.add_argument("--prompts-per-step", type=int, required=True)
    parser.add_argument("--samples", type=int, required=True)
    parser.add_argument("--tokens", type=int, required=True, help="of a response, at most")
    parser.add_argument("--max-length", type=int, required=True, help="of a prompt and its response")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--micro", type=int, required=True, help="sequences of one backward pass")
    parser.add_argument("--learning-rate", type=float, required=True)
    parser.add_argument("--device", choices=["cpu", "cuda"], required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--bf16", action="store_true", help="autocast; the weights stay float32")
    parser.add_argument("--vllm", action="store_true")
    parser.add_argument("--vllm-memory", type=float, default=0.4, help="share of the device")
    parser.add_argument("--out", required=True)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    if asked.vllm and asked.device == "cpu":
        fit_vllm_to_cpus("bfloat16" if asked.bf16 else "float32")
    tokens = []
    trainer = GRPOTrainer(
        model=model(asked),
        processing_class=AutoTokenizer.from_pretrained(asked.model),
        reward_funcs=functools.partial(letters, tokens), args=settings(asked),
        train_dataset=Dataset.from_list(read(asked.prompts)),
    )  # fmt: skip
    clock, generating = Clock(), timed(trainer, "_generate")
    trainer.add_callback(clock)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    print(json.dumps({"seconds": clock.seconds, "generate": generating, "tokens": sum(tokens)}))


def settings(asked):
    rows = asked.prompts_per_step * asked.samples
    return GRPOConfig(
        output_dir=asked.out, use_cpu=asked.device == "cpu", bf16=asked.bf16, gradient_checkpointing=False,
        per_device_train_batch_size=asked.micro, gradient_accumulation_steps=rows // asked.micro,
        num_generations=asked.samples, max_completion_length=asked.tokens, num_iterations=1, beta=0.0,
        temperature=1.0, top_p=1.0, top_k=0, learning_rate=asked.learning_rate, loss_type="grpo",
        lr_scheduler_type="constant", max_grad_norm=1.0, max_steps=asked.steps, logging_steps=1,
        save_strategy="no", report_to=[], disable_tqdm=True, dataloader_pin_memory=asked.device == "cuda",
        use_vllm=asked.vllm, vllm_mode="colocate", vllm_gpu_memory_utilization=asked.vllm_memory,
        vllm_max_model_length=asked.max_length if asked.vllm else None,
    )  # fmt: skip


def letters(tokens, completions, completion_ids, **_):
    tokens.append(sum(len(ids) for ids in completion_ids))
    return [sum(map(str.isalpha, text)) / max(1, len(text)) for text in completions]


def timed(owner, name):
    """Seconds of every call of the method, appended as they come."""
    seconds, method = [], getattr(owner, name)

    def call(*arguments, **named):
        start = time.perf_counter()
        answer = method(*arguments, **named)
        seconds.append(time.perf_counter() - start)
        return answer

    setattr(owner, name, call)
    return seconds


def fit_vllm_to_cpus(dtype):
    """Eager, as Quartet's engine is in this comparison; and the reload."""
    from trl.generation import vllm_generation
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
    from vllm.model_executor.model_loader.reload import (
        finalize_layerwise_reload,
        initialize_layerwise_reload,
    )

    def sync_weights(generation):
        worker = generation.llm.llm_engine.model_executor.driver_worker
        worker = getattr(worker, "worker", worker)
        served = worker.model_runner.model
        with torch.no_grad(), set_current_vllm_config(worker.vllm_config):
            initialize_layerwise_reload(served)
            served.load_weights((name, tensor.detach()) for name, tensor in generation._iter_named_params())
            finalize_layerwise_reload(served, worker.model_config)
            for layer in served.modules():
                if isinstance(layer, VocabParallelEmbedding):  # a tied head's packed copy
                    layer.quant_method.process_weights_after_loading(layer)
        generation.llm.reset_prefix_cache()

    vllm_generation.LLM = functools.partial(vllm_generation.LLM, dtype=dtype, enforce_eager=True)
    vllm_generation.VLLMGeneration.sync_weights = sync_weights


if __name__ == "__main__":
    main()
