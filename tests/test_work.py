"""What workers did and when: intervals, clocks of other hosts, shares of device time and the trace file, from
times made by hand."""

import json

import pytest

from actors.recording import recorded
from launch.trace import RunTrace, TraceFile
from orchestrator.clocks import Clocks
from orchestrator.intervals import difference, intersection, length, union
from orchestrator.work import (
    Recorded,
    Seated,
    Work,
    WorkBook,
    WorkSpan,
    device_shares,
    engine_shares,
    hidden_share,
    work_metrics,
)

ENGINE, ACTOR, JUDGE = (
    Seated(worker=worker, device=device)
    for worker, device in [("engine 0", "0.0"), ("actor rank 0", "1.0"), ("reward rank 0", "2.0")]
)


def span(seat, work, start, end):
    return WorkSpan(seat=seat, work=work, start=start, end=end)


def test_intervals_join_meet_and_leave_holes():
    joined = union([(7, 9), (0, 4), (1, 5), (3, 2), (6, 6)])
    assert joined == [(0, 5), (7, 9)] and length(joined) == 7
    assert intersection(joined, [(4, 8)]) == [(4, 5), (7, 8)]
    assert difference(joined, [(4, 8)]) == [(0, 4), (8, 9)]
    assert difference(joined, []) == joined and intersection(joined, []) == []


def test_another_hosts_clock_is_known_to_half_the_slack_of_the_quickest_calls():
    clocks = Clocks(own="here")
    clocks.observe("there", sent=10, begin=103, end=105, received=14)  # 91 to 93
    assert (clocks.offset("there"), clocks.error("there")) == (92, 1)
    clocks.observe("there", sent=20, begin=112.5, end=113, received=20.6)  # 92.4 to 92.5
    assert clocks.offset("there") == pytest.approx(92.45) and clocks.error("there") == pytest.approx(0.05)
    clocks.observe("here", sent=0, begin=50, end=51, received=1)
    assert clocks.offset("here") == 0 and clocks.offset("unknown") == 0


STEP = [
    span(ENGINE, Work.GENERATE, 0, 4), span(ENGINE, Work.GENERATE, 1, 6), span(ACTOR, Work.UPDATE, 7, 9),
    span(ACTOR, Work.SEND, 9, 10), span(ENGINE, Work.RECEIVE, 9, 10),
]  # fmt: skip


def test_every_moment_of_every_device_has_one_cause():
    shares = device_shares(STEP, [ENGINE, ACTOR], 0, 10)
    assert shares == pytest.approx(
        {"useful": 8 / 20, "sync": 2 / 20, "wait_generate": 6 / 20, "wait_update": 2 / 20, "driver": 2 / 20}
    )


def test_roles_on_one_device_count_once():
    beside = Seated(worker="reference rank 0", device=ACTOR.device)
    spans = [*STEP, span(beside, Work.SCORE, 5, 8)]  # 7 to 8 beside the update
    shares = device_shares(spans, [ENGINE, ACTOR, beside], 0, 10)
    assert shares["useful"] == pytest.approx((6 + 4) / 20) and sum(shares.values()) == pytest.approx(1)


def test_what_trainers_wait_for_and_engines_leave_undone():
    assert engine_shares(STEP, [ENGINE, ACTOR], 0, 10) == pytest.approx(
        {"trainer_wait": 6 / 10, "engine_busy": 6 / 10, "engine_idle": 3 / 10}
    )
    second = Seated(worker="engine 1", device="3.0")
    spans = [*STEP, span(second, Work.GENERATE, 5, 8)]  # from 7 on beside the update
    assert engine_shares(spans, [ENGINE, second, ACTOR], 0, 10) == pytest.approx(
        {"trainer_wait": 7 / 10, "engine_busy": 9 / 20, "engine_idle": 10 / 20}
    )
    assert engine_shares(STEP, [ACTOR], 0, 10) == {}  # a stage without engines


def test_scoring_is_hidden_while_somebody_generates():
    spans = [*STEP, span(JUDGE, Work.REWARD, 3, 4), span(JUDGE, Work.REWARD, 5, 8)]
    assert hidden_share(spans, 0, 10) == 2 / 4  # 3 to 4 and 5 to 6, of four seconds
    assert hidden_share(STEP, 0, 10) is None
    figures = work_metrics(spans, [ENGINE, ACTOR, JUDGE], 0, 10)
    assert figures["scoring_hidden"] == 0.5 and figures["overhead_s"] == 0
    assert work_metrics(STEP, [ENGINE], 0, 10)["overhead_fraction"] == 0.1


class Adder:
    verbs = {"add": Work.UPDATE, "later": Work.GENERATE}  # noqa: RUF012

    def add(self, a, b):
        return a + b

    async def later(self, a):
        return a

    def other(self):
        return "plain"


async def test_a_recorded_worker_answers_as_before_and_says_when():
    worker, book = recorded(Adder)(), WorkBook()
    log = book.enter("actor rank 0", "0.0", Adder.verbs)
    for verb, call in [("add", lambda: worker.add(1, 2)), ("other", worker.other)]:
        with log.call(verb) as unpacked:
            answer = call()
            assert unpacked(answer) == {"add": 3, "other": "plain"}[verb]
    with log.call("later") as unpacked:
        assert unpacked(await worker.later(5)) == 5
        done, in_flight = book.take()
    assert [s.work for s in done] == [Work.UPDATE, Work.GENERATE] and [s.work for s in in_flight] == [
        Work.GENERATE
    ]
    assert all(s.start <= s.end for s in done)
    with pytest.raises(KeyError), log.call("add"):
        raise KeyError
    assert book.take() == ([], [])


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def play(trace, spans):
    """Each span as a call that is sent a second before it begins and answered when it ends, on one clock."""
    for s in spans:
        log = trace.book.enter(s.seat.worker, s.seat.device, {s.work: s.work})
        trace.book.clock.now = s.start - 1
        with log.call(s.work) as unpacked:
            trace.book.clock.now = s.end
            unpacked(Recorded(None, s.start, s.end, "here"))


def traced(path):
    trace = RunTrace(path)
    trace.book.clock, trace.book.clocks = Clock(), Clocks(own="here")
    return trace


def rows(path):
    events = json.loads(path.read_text())
    names = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"}
    found = {}
    for e in events:
        if e["ph"] == "X":
            found.setdefault((e["pid"], names[e["pid"], e["tid"]]), []).append(
                (e["ts"] / 1e6, (e["ts"] + e["dur"]) / 1e6, e["name"], e["args"].get("for"))
            )
    return {name: sorted(events) for name, events in found.items()}


def test_the_trace_has_a_row_per_worker_without_overlap_and_goes_on_after_a_kill(tmp_path):
    path = tmp_path / "trace.json"
    trace = traced(path)
    play(trace, [*STEP, span(ENGINE, Work.GENERATE, 8, 12)])
    figures = trace.step("rl", 1, 0, 10)
    assert figures["device/useful"] == pytest.approx((6 + 1 + 2) / 20)  # the engine receives from 9 on
    found = rows(path)
    assert found[1, "steps"] == [(0, 10, "rl step 1", None)]
    assert found[1, "engine 0"] == [
        (0, 6, "generate", None), (6, 7, "wait", "driver"), (7, 8, "wait", "update"),
        (8, 9, "generate", None), (9, 10, "receive", None), (10, 12, "generate", None),
    ]  # fmt: skip
    assert found[1, "actor rank 0"][0] == (0, 6, "wait", "generate")
    trace.close()
    path.write_text(path.read_text()[:-40])  # a torn last event
    with pytest.raises(json.JSONDecodeError):
        json.loads(path.read_text())
    again = traced(path)
    play(again, [span(ACTOR, Work.UPDATE, 100, 101)])
    again.step("rl", 2, 100, 101)
    resumed = rows(path)
    last = max(end for (pid, _), events in resumed.items() if pid == 1 for _, end, *_ in events)
    assert resumed[2, "actor rank 0"] == [(last, last + 1, "update", None)]


def test_a_trace_without_steps_is_not_written(tmp_path):
    RunTrace(tmp_path / "trace.json").close()
    TraceFile(tmp_path / "trace.json").close()
    assert not (tmp_path / "trace.json").exists()
    assert RunTrace(None).step("rl", 1, 0, 1)["overhead_fraction"] == 1
