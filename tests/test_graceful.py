"""SIGTERM while training: a request that is read after the step, and handlers that are put back."""

import asyncio
import os
import signal

from launch.cluster import role_labels
from launch.graceful import StopRequest, stop_on_sigterm
from orchestrator.placement import Layout, Seat


async def test_sigterm_is_a_request_inside_and_what_it_was_outside():
    seen = []
    before = signal.signal(signal.SIGTERM, lambda number, _: seen.append(number))
    try:
        request = StopRequest()
        with stop_on_sigterm(request):
            assert not request.asked
            os.kill(os.getpid(), signal.SIGTERM)
            await asyncio.sleep(0.05)
            assert request.asked and seen == []
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.sleep(0.05)
        assert seen == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_group_asks_for_the_labels_of_its_roles_where_nodes_have_them():
    def seats(group):
        return (Seat(group=group, bundle=0, resources={"CPU": 1.0}),)

    plan = Layout(
        groups=(({"CPU": 2.0},), ({"CPU": 1.0},)),
        seats={"actor": seats(0), "reference": seats(0), "engine": seats(1)},
    )
    both = {"quartet.role.actor", "quartet.role.engine", "ray.io/node-id"}
    assert role_labels(plan, 0, both) == {"quartet.role.actor": "true"}
    assert role_labels(plan, 1, both) == {"quartet.role.engine": "true"}
    assert role_labels(plan, 0, {"ray.io/node-id"}) == {}
