"""vLLM's scheduler, for responses that are asked for whole.

vLLM hands every token of every request from its engine core to the process that asked, where each costs some
40 us: for a small model or a fast device more than drawing it. Here the tokens of a response stay in the
engine core until its last one is there. Each is marked with how often the prefix cache had been emptied,
which ends every update of the weights: so their version is known token by token.
"""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
from vllm.v1.outputs import LogprobsLists
from vllm.v1.request import Request


@dataclass
class Held:
    """What a request has drawn so far: one entry per token."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    emptied: list[int] = field(default_factory=list)

    def take(self, output: EngineCoreOutput, emptied: int) -> None:
        assert output.new_logprobs is not None
        self.tokens += output.new_token_ids
        self.logprobs += output.new_logprobs.logprobs[:, 0].tolist()
        self.emptied += [emptied] * len(output.new_token_ids)

    def give(self, output: EngineCoreOutput) -> None:
        """Writes all of it into the request's last output; the mark stands where nobody asks for a rank."""
        output.new_token_ids = self.tokens
        output.new_logprobs = LogprobsLists(
            np.array(self.tokens, dtype=np.int32)[:, None],
            np.array(self.logprobs, dtype=np.float32)[:, None],
            np.array(self.emptied, dtype=np.int64),
        )


class WholeResponses(Scheduler):
    """For requests with ``logprobs=0``: those of the drawn tokens and no others."""

    _emptied = 0

    @cached_property
    def _held(self) -> dict[str, Held]:
        return {}

    def update_from_output(self, *step: Any) -> dict[int, EngineCoreOutputs]:
        """What vLLM's would give, less the outputs of requests that go on."""
        answers = super().update_from_output(*step)
        for client, answer in list(answers.items()):
            answer.outputs = [output for output in answer.outputs if self._is_due(output)]
            if not (answer.outputs or answer.scheduler_stats or answer.finished_requests):
                del answers[client]
        return answers

    def _is_due(self, output: EngineCoreOutput) -> bool:
        scores = output.new_logprobs
        if scores is not None and scores.logprobs.shape[1] == 1:
            self._held.setdefault(output.request_id, Held()).take(output, self._emptied)
            if output.finish_reason is None:
                return False
        if output.finish_reason is not None and (held := self._held.pop(output.request_id, None)):
            held.give(output)
        return True

    def finish_requests(self, *request_ids_and_status: Any) -> list[Request]:
        """Of aborted ones nothing is kept."""
        finished = super().finish_requests(*request_ids_and_status)
        for request in finished:
            self._held.pop(request.request_id, None)
        return finished

    def reset_prefix_cache(self, *options: bool) -> int:
        """How often it has been emptied; 0 when it could not be."""
        if not super().reset_prefix_cache(*options):
            return 0
        self._emptied += 1
        return self._emptied


class WholeResponsesAhead(WholeResponses, AsyncScheduler):
    """The same where vLLM plans a step while the one before is computed: on GPUs."""
