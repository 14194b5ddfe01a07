"""A model of a known shape with random weights, and a run on it: measured without a download.

    python benchmarks/shapes.py qwen2.5-0.5b /tmp/q05

writes the model, a byte-level tokenizer, prompts.jsonl and run.yaml (GRPO, a reward by letters, 256 tokens a
prompt) into the folder. ``tiny`` is for a machine without a GPU.
"""

import argparse
import json
import random
import string
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

SHAPES = {  # hidden, inner, layers, heads, key-value heads, vocabulary, tied head
    "tiny": (128, 384, 4, 4, 2, 512, True),
    "qwen2.5-0.5b": (896, 4864, 24, 14, 2, 151936, True),
    "qwen2.5-1.5b": (1536, 8960, 28, 12, 2, 151936, True),
    "qwen2.5-7b": (3584, 18944, 28, 28, 4, 152064, False),
}
PROMPTS, PROMPT_CHARACTERS = 4096, 256
EOS, PAD = "<|eos|>", "<|pad|>"

RUN = """\
name: shapes
run_dir: {folder}/run
model: {{path: {folder}, dtype: {dtype}, max_length: {length}}}
roles: {{reward: {{function: letter_fraction}}}}
rl:
  algorithm: {{name: grpo, kl_coef: 0.01}}
  prompts: {{path: {folder}/prompts.jsonl}}
  samples_every: 0
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--max-length", type=int, default=1280)
    given = parser.parse_args()
    folder = given.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(folder)
    write_model(folder, given.shape, getattr(torch, given.dtype))
    generator = random.Random(0)
    texts = ("".join(generator.choices(string.ascii_lowercase, k=PROMPT_CHARACTERS)) for _ in range(PROMPTS))
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    run = RUN.format(folder=folder, dtype=given.dtype, length=given.max_length)
    (folder / "run.yaml").write_text(run)


def write_tokenizer(folder: Path) -> None:
    """One token a byte; ids beyond are never asked for and decode to nothing."""
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: index for index, symbol in enumerate([*symbols, PAD, EOS])}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=inner, pad_token=PAD, eos_token=EOS).save_pretrained(folder)


def write_model(folder: Path, name: str, dtype: torch.dtype) -> None:
    hidden, inner, layers, heads, kv_heads, vocabulary, tied = SHAPES[name]
    config = Qwen2Config(
        hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, vocab_size=vocabulary, tie_word_embeddings=tied,
        max_position_embeddings=32768, rms_norm_eps=1e-6, pad_token_id=256, eos_token_id=257,
        bos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    Qwen2ForCausalLM(config).to(dtype).save_pretrained(folder)


if __name__ == "__main__":
    main()
