"""A tiny Llama with a byte tokenizer, as a ``from_pretrained`` folder that vLLM loads: half a second, 0.4 M
parameters."""

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests import tiny

SPECIAL = ("<pad>", "<bos>", "<eos>")  # 0, 1, 2, as tests/tiny.py numbers them


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte: "a" is 3 + its place in the alphabet of bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate([*SPECIAL, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    pad, bos, eos = SPECIAL
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=pad, bos_token=bos, eos_token=eos)


def tiny_model(folder: Path, *, tied: bool, hidden: int = 128, layers: int = 2, seed: int = 0) -> str:
    """Writes model and tokenizer; returns the folder as the text that ``Model.path`` takes."""
    tokenizer = byte_tokenizer()
    config = tiny.llama(tied=tied, hidden=hidden, layers=layers, vocab=len(tokenizer) + 1)
    config.max_position_embeddings = 512
    tokenizer.save_pretrained(folder)
    return tiny.save(folder, config, seed=seed)
