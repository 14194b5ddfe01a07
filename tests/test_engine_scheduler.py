"""Responses stay in the engine core until they are whole; vLLM's own scheduler gives the parts."""

import numpy as np
import pytest
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason
from vllm.v1.outputs import LogprobsLists

from actors.engine_scheduler import WholeResponses


def drawn(
    request: str, token: int, logprob: float, *, ends: bool = False, width: int = 1
) -> EngineCoreOutput:
    """One step's output of a request; the ranks that vLLM computes are 7."""
    scores = LogprobsLists(
        np.full((1, width), token, np.int32), np.full((1, width), logprob, np.float32), np.array([7])
    )
    return EngineCoreOutput(
        request, [token], new_logprobs=scores, finish_reason=FinishReason.STOP if ends else None
    )


@pytest.fixture
def step(monkeypatch):
    """One step of a scheduler, of which vLLM's part says what the argument says."""
    monkeypatch.setattr(Scheduler, "__init__", lambda _: None)
    monkeypatch.setattr(Scheduler, "update_from_output", lambda _, said: {0: EngineCoreOutputs(outputs=said)})
    monkeypatch.setattr(Scheduler, "reset_prefix_cache", lambda _, works=True: works)
    monkeypatch.setattr(
        Scheduler, "finish_requests", lambda _, which: [EngineCoreOutput(id, []) for id in which]
    )
    scheduler = WholeResponses()

    def step(*said: EngineCoreOutput) -> list[EngineCoreOutput]:
        answers = scheduler.update_from_output(list(said))
        assert not answers or answers[0].outputs  # no empty message
        return answers[0].outputs if answers else []

    step.scheduler = scheduler
    return step


def test_a_response_comes_whole_with_its_last_token_and_each_token_has_its_mark(step):
    assert step(drawn("a", 11, -0.5), drawn("b", 21, -1.5)) == []
    assert step.scheduler.reset_prefix_cache() == 1
    assert step(drawn("a", 12, -0.25)) == []
    [b] = step(drawn("a", 13, -0.125), drawn("b", 22, -2.0, ends=True))
    assert step.scheduler.reset_prefix_cache() == 2
    [a] = step(drawn("a", 14, -1.0, ends=True))
    assert (a.request_id, a.new_token_ids, b.new_token_ids) == ("a", [11, 12, 13, 14], [21, 22])
    assert a.new_logprobs.logprob_token_ids.tolist() == [[11], [12], [13], [14]]
    assert a.new_logprobs.logprobs.tolist() == [[-0.5], [-0.25], [-0.125], [-1.0]]
    assert a.new_logprobs.sampled_token_ranks.tolist() == [0, 1, 1, 2]
    assert b.new_logprobs.sampled_token_ranks.tolist() == [0, 1]


def test_of_an_aborted_request_nothing_stays_for_the_next_of_its_name(step):
    assert step(drawn("a", 11, -0.5)) == []
    step.scheduler.finish_requests(["a", "unknown"])
    [a] = step(drawn("a", 31, -3.0, ends=True))
    assert a.new_token_ids == [31]


def test_what_is_asked_in_another_way_is_left_as_it_is(step):
    """More log-probs than that of the drawn token, none at all, and a cache that cannot be emptied."""
    wide = drawn("a", 11, -0.5, width=3)
    plain = EngineCoreOutput("b", [5])
    assert step(wide, plain) == [wide, plain]
    assert wide.new_logprobs.sampled_token_ranks.tolist() == [7]
    assert step.scheduler.reset_prefix_cache(False) == 0
    [only] = step(drawn("c", 1, -1.0, ends=True))
    assert only.new_logprobs.sampled_token_ranks.tolist() == [0]
