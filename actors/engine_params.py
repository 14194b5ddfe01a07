"""What vLLM is told: its environment, its sampling parameters, and which tokens end a response."""

from typing import TYPE_CHECKING, Any, Literal

from actors.threads import openmp
from orchestrator.config import EngineConfig
from orchestrator.roles import Sampling

if TYPE_CHECKING:
    from vllm import SamplingParams

Device = Literal["cpu", "cuda"]


def environment(config: EngineConfig, device: Device) -> dict[str, str]:
    """What vLLM and its children read while they are imported; also for Ray's runtime environment."""
    quiet = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
    if device == "cuda":
        return quiet
    # The CPU platform turns executor "uni" into "mp", a process more, unless this says otherwise.
    single = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"} if config.tensor_parallel == 1 else {}
    return (
        quiet
        | single
        | openmp(config.threads)
        | {
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "TOKENIZERS_PARALLELISM": "false",
        }
        | ({"TORCH_COMPILE_DISABLE": "1"} if is_eager(config, device) else {})
    )


def is_eager(config: EngineConfig, device: Device) -> bool:
    """Compiling pays in long runs only on CPUs, where it takes a minute and halves the time of a step."""
    return device == "cpu" if config.eager is None else config.eager


def drawing(sampling: Sampling, seed: int, room: int, stop_ids: list[int]) -> "SamplingParams":
    """One response of at most ``room`` tokens, with the log-prob of each token that was drawn."""
    from vllm import SamplingParams  # noqa: PLC0415
    from vllm.sampling_params import RequestOutputKind  # noqa: PLC0415

    return SamplingParams(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        seed=seed,
        max_tokens=min(sampling.max_new_tokens, room),
        stop_token_ids=stop_ids,
        ignore_eos=True,  # stop_token_ids has the end-of-sequence ids
        logprobs=0,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def reading() -> "SamplingParams":
    """The log-prob of each token of the prompt; vLLM cannot do with less than one token drawn."""
    from vllm import SamplingParams  # noqa: PLC0415
    from vllm.sampling_params import RequestOutputKind  # noqa: PLC0415

    return SamplingParams(
        temperature=0,
        max_tokens=1,
        prompt_logprobs=0,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def tokenizer_and_ends(model: str, revision: str | None) -> tuple[Any, list[int]]:
    """The tokenizer, and every id that ends a response: the tokenizer's and those of the generation
    config."""
    from transformers import AutoTokenizer, GenerationConfig  # noqa: PLC0415

    tokenizer = AutoTokenizer.from_pretrained(model, revision=revision)
    ends = {tokenizer.eos_token_id} - {None}
    try:
        declared = GenerationConfig.from_pretrained(model, revision=revision).eos_token_id
    except OSError:  # the folder has no generation_config.json
        declared = None
    ends |= set(declared if isinstance(declared, list) else [declared]) - {None}
    if not ends:
        raise ValueError(f"{model} names no end-of-sequence token; set eos_token in its tokenizer")
    return tokenizer, sorted(ends)
