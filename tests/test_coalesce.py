"""Questions that wait are asked together, and every asker gets its own answers or the error."""

import asyncio

import pytest

from orchestrator.coalesce import Coalescer


def run(work):
    return asyncio.run(asyncio.wait_for(work, 5))


def test_what_waits_for_a_busy_server_goes_to_it_in_one_call():
    calls = []

    async def server(items):
        calls.append(list(items))
        await asyncio.sleep(0.01)
        return [10 * item for item in items]

    async def work():
        coalescer = Coalescer([server])
        first = asyncio.create_task(coalescer.ask(0))
        await asyncio.sleep(0.001)
        rest = await asyncio.gather(*(coalescer.ask(k) for k in range(1, 4)))
        return [await first, *rest]

    assert run(work()) == [0, 10, 20, 30]
    assert calls == [[0], [1, 2, 3]]


def test_two_servers_work_side_by_side():
    busy = []

    async def server(items):
        busy.append(items)
        while len(busy) < 2:
            await asyncio.sleep(0.001)
        return items

    async def work():
        coalescer = Coalescer([server, server])
        first = asyncio.create_task(coalescer.ask(1))
        await asyncio.sleep(0.001)
        return [await coalescer.ask(2), await first]

    assert run(work()) == [2, 1]


@pytest.mark.parametrize("error", [RuntimeError, AttributeError])
def test_an_error_reaches_who_was_in_the_call_and_the_next_call_is_served(error):
    async def server(items):
        if items == ["bad"]:
            raise error("no")
        return items

    async def work():
        coalescer = Coalescer([server])
        with pytest.raises(error, match="no"):
            await coalescer.ask("bad")
        return await coalescer.ask("good")

    assert run(work()) == "good"


def test_a_server_that_answers_too_little_is_an_error():
    async def server(items):
        return items[1:]

    async def work():
        await Coalescer([server]).ask(1)

    with pytest.raises(RuntimeError, match="0 answers to 1 questions"):
        run(work())


def test_who_gave_up_waiting_does_not_disturb_the_others():
    async def server(items):
        await asyncio.sleep(0.01)
        return items

    async def work():
        coalescer = Coalescer([server])
        asks = [asyncio.create_task(coalescer.ask(k)) for k in range(3)]
        await asyncio.sleep(0.001)
        asks[1].cancel()
        return await asks[0], await asks[2]

    assert run(work()) == (0, 2)
