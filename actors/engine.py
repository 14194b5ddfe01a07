"""The rollout engine: vLLM in child processes, token-in token-out, with the actor's weights behind it.

One ``EngineWorker`` is one replica. It never speaks text to vLLM: prompts go in as token ids, responses come
out as token ids with the log-probs the sampler drew from, and the version of the weights each was drawn from.

Who waits for whom: ``generate`` calls run side by side; ``receive_weights`` keeps new ones waiting, freezes
those under way where they stand (vLLM's pause "keep") and waits for the sender; ``commit_weights``, when the
driver has seen that all is there, lets them go on. The update is one call, between two steps of the engine: a
step inside it would meet a model that lies on ``meta``. The frozen requests are prefilled again: their old
keys and values came from the old weights. When an update fails the engine holds half a model: it serves
nobody and says why until a whole update has arrived.
"""

import asyncio
import os
import socket
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import psutil

from actors.engine_children import processes, pulse_of, require
from actors.engine_params import Device, drawing, environment, is_eager, reading, tokenizer_and_ends
from actors.engine_sockets import remove_own_folder, socket_folder
from actors.vital_signs import NoWeights, ProcessGone, Pulse, RosterLine, VitalSigns
from actors.weights.wire import Address, ServedAdapter, Transport
from actors.worker import settle_heap
from orchestrator.batch import Prompt, Rollout, StopReason
from orchestrator.config import EngineConfig
from orchestrator.roles import Residency, Sampling, WeightReceipt
from orchestrator.work import Work

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.outputs import RequestOutput

_CPU_KV_CACHE_MB = 256
CPU_BLOCK_TOKENS = 32  # the least that vLLM's CPU attention likes


class EngineWorker(VitalSigns):
    """One vLLM replica. ``start`` before anything else."""

    verbs: ClassVar[dict[str, Work]] = {
        "generate": Work.GENERATE,
        "receive_weights": Work.RECEIVE,
        "logprobs": Work.PROBE,
    }

    def __init__(  # noqa: PLR0913 - one line per fact, all by name
        self,
        *,
        config: EngineConfig,
        model: str,
        revision: str | None,
        dtype: str,
        max_length: int,
        index: int,
        device: Device,
        transport: Transport,
        adapter: ServedAdapter | None = None,
        sleeps: bool = False,
    ) -> None:
        """``adapter``: the actor's, which is then all that an update brings; None: whole weights.
        ``sleeps``: it will be told to leave its devices to others."""
        os.environ.update(environment(config, device) | socket_folder())
        self._config, self._model, self._revision, self._dtype = config, model, revision, dtype
        self._max_length, self._index, self._device, self._transport = max_length, index, device, transport
        self._serves, self._sleeps = adapter, sleeps
        self._version = 0  # weights of the model folder
        self._versions = [0]  # by how often the prefix cache had been emptied (engine_scheduler.py)
        self._failure: str | None = None  # why this engine holds no usable weights
        self._eager = is_eager(config, device)
        self._num_probes = 0
        self._num_running = 0  # requests that vLLM has and has not answered
        self._frozen = False  # these requests are paused
        self._children: list[int] = []
        self._level = Residency.AWAKE
        self._open = asyncio.Event()  # cleared during an update
        self._open.set()

    async def start(self) -> None:
        """Loads the model. Blocks this process's event loop for some 8 s and more."""
        from vllm.v1.engine.async_llm import AsyncLLM  # noqa: PLC0415 - after the environment is set

        from actors.weights.served_adapter import adapter_request  # noqa: PLC0415

        self._adapter = None if self._serves is None else adapter_request()
        self._llm = AsyncLLM.from_engine_args(self._arguments())
        self._children = processes(self._llm)
        if self._device == "cpu":
            await self._llm.collective_rpc("draw_in_blocks")
        self._tokenizer, self._stop_ids = tokenizer_and_ends(self._model, self._revision)
        settle_heap()

    def _arguments(self) -> Any:
        from vllm import AsyncEngineArgs  # noqa: PLC0415
        from vllm.config import WeightTransferConfig  # noqa: PLC0415

        from actors.weights.served_adapter import lora_arguments  # noqa: PLC0415

        config, on_cpu = self._config, self._device == "cpu"
        kv_cache_mb = config.kv_cache_mb or (_CPU_KV_CACHE_MB if on_cpu else None)
        return AsyncEngineArgs(
            model=self._model,
            revision=self._revision,
            dtype=config.dtype or self._dtype,
            max_model_len=self._max_length,
            tensor_parallel_size=config.tensor_parallel,
            distributed_executor_backend="uni" if config.tensor_parallel == 1 else "mp",
            kv_cache_memory_bytes=kv_cache_mb and kv_cache_mb << 20,
            gpu_memory_utilization=config.gpu_memory_fraction,
            max_num_seqs=config.max_num_seqs,
            enforce_eager=self._eager,
            enable_prefix_caching=True,
            # Siblings share whole blocks of their prompt; at vLLM's 128 on CPUs most prompts share none.
            block_size=CPU_BLOCK_TOKENS if on_cpu else None,
            # vLLM rewinds a seeded sampler after a part of a prompt, which its CPU generators cannot.
            enable_chunked_prefill=not on_cpu,
            logprobs_mode="processed_logprobs",  # those of the distribution that was drawn from
            skip_tokenizer_init=True,
            enable_sleep_mode=self._sleeps and not on_cpu,
            scheduler_cls=f"actors.engine_scheduler.WholeResponses{'' if on_cpu else 'Ahead'}",
            worker_extension_cls="actors.weights.receivers.WorkerExtension",
            weight_transfer_config=WeightTransferConfig(backend=f"quartet_{self._transport}"),
            disable_log_stats=True,
            **lora_arguments(self._serves),
        )

    async def generate(
        self, prompt: Prompt, num_samples: int, sampling: Sampling, seeds: Sequence[int]
    ) -> list[Rollout]:
        """One request per sample, each with its own seed; greedy log-probs are those at temperature 1.

        The end-of-sequence token, where there is one, is the last sampled token. ValueError for a prompt that
        leaves no room.
        """
        if len(seeds) != num_samples:
            raise ValueError(
                f"{len(seeds)} seeds for {num_samples} samples of prompt {prompt.uid}; give one each"
            )
        if len(prompt.tokens) >= self._max_length:
            raise ValueError(
                f"prompt {prompt.uid} (row {prompt.row}) has {len(prompt.tokens)} tokens and leaves no "
                f"room in model.max_length={self._max_length}; drop it (too_long: drop) or raise the latter"
            )
        async with asyncio.TaskGroup() as group:  # one failure cancels, and thereby aborts, its siblings
            tasks = [
                group.create_task(self._sample(prompt, k, sampling, seed)) for k, seed in enumerate(seeds)
            ]
        return [task.result() for task in tasks]

    async def _sample(self, prompt: Prompt, sample: int, sampling: Sampling, seed: int) -> Rollout:
        await self._admitted()
        uid = f"{prompt.uid}/{sample}"
        room = self._max_length - len(prompt.tokens)
        output = await self._request(prompt.tokens, uid, drawing(sampling, seed, room, self._stop_ids))
        completion = output.outputs[0]
        response = tuple(completion.token_ids)
        reasons = {"stop": StopReason.EOS, "length": StopReason.LENGTH}
        if completion.finish_reason not in reasons:
            raise RuntimeError(f"engine {self._index} ended {uid} with {completion.finish_reason!r}")
        drawn = [entry[token] for entry, token in zip(completion.logprobs, response, strict=True)]
        return Rollout(
            uid=uid,
            prompt=prompt,
            tokens=prompt.tokens + response,
            action_mask=(False,) * len(prompt.tokens) + (True,) * len(response),
            logprobs=(0.0,) * len(prompt.tokens) + tuple(token.logprob for token in drawn),
            text=self._tokenizer.decode(response, skip_special_tokens=True),
            versions=(0,) * len(prompt.tokens) + tuple(self._drawn_from(token.rank) for token in drawn),
            stop=reasons[completion.finish_reason],
        )

    def _drawn_from(self, emptied: int) -> int:
        """The version of the weights when the prefix cache had been emptied so often."""
        return self._versions[min(emptied, len(self._versions) - 1)]

    async def logprobs(self, tokens: Sequence[int]) -> list[float]:
        """log p(tokens[t] | tokens[:t]) for t = 1, 2, ... at temperature 1, through the engine's own
        lm_head."""
        await self._admitted()
        self._num_probes += 1
        output = await self._request(tokens, f"probe/{self._num_probes}", reading())
        rows = output.prompt_logprobs[1:]
        return [row[token].logprob for row, token in zip(rows, tokens[1:], strict=True)]

    async def _request(self, tokens: Sequence[int], uid: str, params: "SamplingParams") -> "RequestOutput":
        prompt = {"prompt_token_ids": list(tokens)}
        stream = self._llm.generate(prompt, params, uid, lora_request=self._adapter)
        self._num_running += 1
        from vllm.v1.engine.exceptions import EngineDeadError  # noqa: PLC0415

        try:
            async with aclosing(stream) as outputs:
                async for output in outputs:
                    return output
        except EngineDeadError as error:
            raise ProcessGone(f"vLLM's processes have ended: {error}") from error
        finally:
            self._num_running -= 1
        raise RuntimeError(f"engine {self._index} gave no answer to request {uid}")

    async def join_weights(self, address: Address, rank_offset: int) -> None:
        """Tells the workers where the sender is. Waits for nobody; again after every ``Sender.open``."""
        from vllm.distributed.weight_transfer.base import WeightTransferInitRequest  # noqa: PLC0415

        request = WeightTransferInitRequest(init_info=address.plain(rank_offset))
        await self._llm.init_weight_transfer_engine(request)

    async def receive_weights(self, version: int) -> list[WeightReceipt]:
        """Returns when the new weights are in place and nothing of the old ones is cached; nobody is served
        before ``commit_weights``."""
        self._failure = f"update to version {version} has not finished"
        self._open.clear()
        try:
            receipts = await self._update(version)
        except Exception as error:
            self._failure = f"update to version {version} failed: {error}"
            self._open.set()  # who waited now learns of it
            require(self._children)
            raise
        self._version, self._failure = version, None
        who = f"engine {self._index} worker"
        return [
            WeightReceipt(
                version=r["version"],
                checksums=r["checksums"],
                who=f"{who} {r['worker']}",
                num_bytes=r["num_bytes"],
            )
            for r in receipts
        ]

    async def _update(self, version: int) -> list[dict[str, Any]]:
        """One call does the whole update, between two steps of the engine; nothing new is admitted."""
        if self._num_running > 0 and not self._frozen:
            # AsyncLLM.pause_generation does this, and sleeps 20 ms for answers that may as well come later.
            await self._llm.engine_core.pause_scheduler_async(mode="keep", clear_cache=False)
            self._frozen = True
        receipts = await self._llm.collective_rpc("apply_weight_update", args=(version,))
        # AsyncLLM.reset_prefix_cache does this, and makes of the number a yes.
        emptied = await self._llm.engine_core.call_utility_async("reset_prefix_cache", True, False)
        if not emptied:
            raise RuntimeError("vLLM kept its prefix cache: keys and values of old weights would be reused")
        asleep = emptied - len(self._versions)  # going to sleep empties it too
        self._versions += [self._versions[-1]] * asleep + [version]
        return receipts

    async def commit_weights(self, version: int) -> None:
        """Serves again, with the weights received last."""
        self._refuse_if_broken()
        if version != self._version:
            raise RuntimeError(f"engine {self._index} holds version {self._version}, not {version}")
        if self._frozen:
            await self._llm.resume_generation()
        self._frozen = False
        self._open.set()

    async def _admitted(self) -> None:
        """Returns when no update is under way; raises when the last one failed."""
        await self._open.wait()
        self._refuse_if_broken()

    def _refuse_if_broken(self) -> None:
        if self._failure is not None:
            raise NoWeights(f"engine {self._index} has no usable weights: {self._failure}")

    async def reside(self, level: Residency) -> None:
        """vLLM's sleep mode: weights into the host's memory, the KV cache away; no request is under way. Its
        CPU platform has none, and only pauses the scheduler."""
        if level is self._level:
            return  # a move of all that failed for somebody else is made again
        if level < self._level:
            await self._llm.sleep(level=1)
        if level is Residency.WEIGHTS:
            await self._llm.wake_up(tags=["weights"])
        elif level is Residency.AWAKE:
            await self._llm.wake_up(
                tags=["kv_cache"] if self._level is Residency.WEIGHTS else ["weights", "kv_cache"]
            )
        self._level = level

    async def health(self) -> None:
        self._refuse_if_broken()
        require(self._children)
        await self._llm.check_health()

    def pulse(self) -> Pulse:
        """Of vLLM's processes: this one only waits for them. Raises ProcessGone when one has ended. Between
        an update and its commit requests stand still, however long others need for theirs."""
        held = not self._open.is_set() and self._failure is None
        return replace(pulse_of(self._children), held=held)

    async def pids(self) -> list[int]:
        """vLLM's processes: the engine core, and a worker each when tensor_parallel > 1."""
        return list(self._children)

    async def describe(self) -> list[RosterLine]:
        """This process, then vLLM's, for roster.json."""
        node = socket.gethostname()
        own = RosterLine(role="engine", rank=self._index, pid=os.getpid(), node=node)
        children = [
            RosterLine(role=f"engine {self._index} child", rank=k, pid=pid, node=node)
            for k, pid in enumerate(self._children)
        ]
        return [own, *children]

    async def close(self) -> None:
        """Ends the children; after five seconds by force."""
        self._llm.shutdown(timeout=5)
        left = [psutil.Process(pid) for pid in self._children if psutil.pid_exists(pid)]
        for process in psutil.wait_procs(left, timeout=5)[1]:
            process.kill()
        remove_own_folder()
        del self._llm  # its destructor shuts down again, too late when the interpreter does
