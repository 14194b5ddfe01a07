"""Ledger, stream, balance, placement, and publish: what the driver keeps straight."""

import asyncio
import itertools
import random

import pytest

from orchestrator.balance import plan, plan_apart
from orchestrator.configfile import load_run
from orchestrator.ledger import Ledger, sample_seed
from orchestrator.placement import Seat, engines_apart, layout, shortage
from orchestrator.stream import RolloutStream
from tests.fakes import prompt


def test_seeds_differ_between_neighbours_runs_and_epochs():
    seeds = {
        sample_seed(run, f"{epoch}/{row}/{k}")
        for run in (0, 1)
        for epoch in (0, 1)
        for row in range(50)
        for k in range(4)
    }
    assert len(seeds) == 2 * 2 * 50 * 4 and all(0 <= seed < 2**63 for seed in seeds)


def test_a_seed_is_the_same_number_in_every_process_and_release():
    """``printf 3/0/2/1 | b2sum -l 64``, without its last bit."""
    assert sample_seed(3, "0/2/1") == 0x6C72C2058258CCBC >> 1


def test_an_epoch_holds_every_prompt_once_and_the_next_has_another_order():
    stream = Ledger([prompt(row) for row in range(20)], seed=0).prompts()
    first, second = ([next(stream).uid for _ in range(20)] for _ in range(2))
    assert sorted(first) == sorted(f"0/{row}" for row in range(20))
    assert sorted(second) == sorted(f"1/{row}" for row in range(20))  # a uid is never given twice
    assert [uid[2:] for uid in second] != [uid[2:] for uid in first]


def test_a_ledger_refuses_the_state_of_another_prompt_set():
    with pytest.raises(ValueError, match="num_prompts=9, this run 2; resume with the same prompts"):
        Ledger([prompt(0), prompt(1)], seed=0).restore({"num_settled": 4, "num_prompts": 9, "seed": 0})


def test_the_stream_returns_groups_in_order_and_never_runs_more_than_its_slots():
    running = peak = 0

    async def sample(item):
        nonlocal running, peak
        running += 1
        peak = max(peak, running)
        await asyncio.sleep(0.002 * (item % 3))
        running -= 1
        return item

    async def consume():
        taken = []
        async with RolloutStream(iter(range(10**6)), sample, slots=4) as stream:
            for _ in range(5):
                taken += await stream.take(4)
                stream.release(4)
        return taken

    assert asyncio.run(consume()) == list(range(20)) and peak <= 4


def test_an_answer_that_has_come_goes_on_before_every_prompt_is_sent():
    """Sending thousands takes the driver seconds; what waited for it would not lie beside generation."""
    sent, finished = 0, []

    async def sample(number):
        nonlocal sent
        sent += 1
        await asyncio.sleep(0)  # the engine's answer is there at once
        finished.append(sent)  # scored when so many prompts were sent
        return number

    async def consume():
        async with RolloutStream(iter(range(200)), sample, slots=200) as stream:
            return await stream.take(200)

    assert asyncio.run(consume()) == list(range(200))
    assert finished[0] <= 3 and max(at - row for row, at in enumerate(finished)) <= 3


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_every_rank_gets_as_many_micro_batches_and_every_row_is_there_once(num_ranks):
    lengths = [7, 3, 9, 2, 2, 8, 5]
    shares = plan(lengths, num_ranks=num_ranks, token_budget=18)
    assert len({len(share) for share in shares}) == 1
    assert sorted(row for share in shares for rows in share for row in rows) == list(range(7))
    for rows in (rows for share in shares for rows in share if rows):
        assert max(lengths[row] for row in rows) * len(rows) <= 18


def test_rows_of_like_length_share_a_micro_batch():
    """2 6 2 6 2 in 12 tokens: [6 6] and [2 2 2] cost 18, no padding; any cut that mixes them costs more."""
    assert plan([2, 6, 2, 6, 2], num_ranks=1, token_budget=12) == [[[1, 3], [0, 2, 4]]]
    # In 12 tokens [5 4] [4 1 1] leaves a 1 out. Three: [5 4] [4] [1 1 1] costs 17, [5] [4 4] [1 1 1] 16.
    assert plan([5, 4, 4, 1, 1, 1], num_ranks=1, token_budget=12) == [[[1, 2], [0], [3, 4, 5]]]


@pytest.mark.parametrize(("overhead", "parts"), [(17, [[0, 1], [2, 3]]), (19, [[0, 1, 2, 3]])])
def test_a_micro_batch_more_where_it_saves_more_padding_than_it_costs(overhead, parts):
    """10 10 1 1: together 40 tokens and one overhead, apart 22 and two; alike at 18."""
    assert plan([10, 10, 1, 1], num_ranks=1, token_budget=100, overhead=overhead) == [parts]
    each = plan_apart([10, 10, 1, 1] * 2, [4, 4], num_ranks=1, token_budget=100, overhead=overhead)
    assert sorted(each[0]) == sorted(parts + [[row + 4 for row in rows] for rows in parts])


def test_ranks_get_even_loads_by_largest_differencing():
    """16 15 14 13 12 11, one row a micro-batch, two ranks: the gaps 16-15, 14-13 and 12-11 are 1 each; 16+13
    against 15+14 closes one, and 40 against 41 is as even as 81 can be. Greedy dealing in turns gives 42 and
    39."""
    lengths = [16, 15, 14, 13, 12, 11]
    shares = plan(lengths, num_ranks=2, token_budget=16)
    loads = sorted(sum(lengths[row] for rows in share for row in rows) for share in shares)
    assert loads == [40, 41] and [len(share) for share in shares] == [3, 3]


def all_cuts(lengths, num_parts):
    """Padded tokens of each part, of every cut of the sorted rows into so many."""
    ordered = sorted(lengths, reverse=True)
    for borders in itertools.combinations(range(1, len(ordered)), num_parts - 1):
        cut = [ordered[a:b] for a, b in itertools.pairwise((0, *borders, len(ordered)))]
        yield [rows[0] * len(rows) for rows in cut]


def test_no_cut_pads_less():
    for seed in range(20):
        lengths = random.Random(seed).choices(range(1, 12), k=7)
        (parts,) = plan(lengths, num_ranks=1, token_budget=16)
        ours = [max(lengths[row] for row in rows) * len(rows) for rows in parts]
        assert max(ours) <= 16
        assert sum(ours) == min(sum(costs) for costs in all_cuts(lengths, len(parts)) if max(costs) <= 16)


@pytest.mark.parametrize(("num_ranks", "num_rows"), [(2, 8), (2, 3), (3, 9), (4, 3)])
def test_with_a_micro_batch_each_no_cut_lets_ranks_wait_less(num_ranks, num_rows):
    for seed in range(20):
        lengths = random.Random(seed).choices(range(1, 12), k=num_rows)
        shares = plan(lengths, num_ranks=num_ranks, token_budget=100)
        assert [len(share) for share in shares] == [1] * num_ranks
        costs = [max(lengths[row] for row in rows) * len(rows) for (rows,) in shares if rows]
        assert max(costs) == min(max(costs) for costs in all_cuts(lengths, len(costs)))


def test_ranks_wait_less_with_a_little_padding():
    """3 3 3 3 1 1 in 12 tokens: [3 3 3 3] and [1 1] have no padding, and a rank waits for 12; [3 3 3] and
    [3 1 1] are 9 each."""
    assert plan([3, 3, 3, 3, 1, 1], num_ranks=2, token_budget=12) == [[[0, 1, 2]], [[3, 4, 5]]]


def test_many_rows_are_cut_at_few_places_into_as_few_micro_batches(monkeypatch):
    chance = random.Random(0)
    lengths = [chance.randint(100, 300) for _ in range(1500)]
    cuts = {}
    for places in (300, 1500):
        monkeypatch.setattr("orchestrator.balance.CUTS", places)
        (parts,) = plan(lengths, num_ranks=1, token_budget=16384)
        assert sorted(row for rows in parts for row in rows) == list(range(1500))
        cuts[places] = [max(lengths[row] for row in rows) * len(rows) for rows in parts]
    assert len(cuts[300]) == len(cuts[1500]) and max(cuts[300]) <= 16384
    assert sum(cuts[1500]) <= sum(cuts[300]) <= 1.005 * sum(cuts[1500])


def test_pairs_stay_together_and_a_row_over_the_budget_is_refused():
    shares = plan([4, 5, 9, 1, 2, 2], num_ranks=2, token_budget=18, units=[0, 0, 1, 1, 2, 2])
    assert sorted(row for share in shares for rows in share for row in rows) == list(range(6))
    for rows in (rows for share in shares for rows in share if rows):
        assert all((row ^ 1) in rows for row in rows)
    with pytest.raises(ValueError, match="9 tokens do not fit micro_batch_tokens=8; set it to 9 or more"):
        plan([9, 1], num_ranks=1, token_budget=8)


def ppo_run(*overrides):
    return load_run([], ["model.path=m", "roles.reward.model=r", "rl.steps=1", *overrides])


ROLES = ["actor", "critic", "reward", "reference", "engine"]


def test_each_role_scales_by_its_own_number():
    run = ppo_run("roles.actor.gpus=8", "roles.critic.gpus=4", "roles.reward.gpus=2",
                  "roles.reference.gpus=1",
                  "engine.replicas=2", "engine.tensor_parallel=4", "engine.gpus=8")  # fmt: skip
    plan_ = layout(run, ROLES)
    assert {role: len(seats) for role, seats in plan_.seats.items()} == {
        "actor": 8,
        "critic": 4,
        "reward": 2,
        "reference": 1,
        "engine": 2,
    }
    assert plan_.seats["engine"][0].resources["GPU"] == 4
    assert sum(bundle["GPU"] for group in plan_.groups for bundle in group) == 8 + 4 + 2 + 1 + 8


def test_roles_that_share_take_equal_parts_of_one_gpu():
    run = ppo_run(
        "placement.share=[[actor,reference]]",
        *(f"roles.{role}.gpus=2" for role in ROLES[:4]),
        "engine.gpus=1",
    )
    plan_ = layout(run, ROLES)
    actor, reference = plan_.seats["actor"], plan_.seats["reference"]
    assert [(seat.group, seat.bundle) for seat in actor] == [(seat.group, seat.bundle) for seat in reference]
    assert actor[0].resources["GPU"] == reference[0].resources["GPU"] == 0.5
    assert sum(bundle.get("GPU", 0) for group in plan_.groups for bundle in group) == 2 + 2 + 2 + 1


def test_engines_that_live_alone_have_a_group_each():
    """Ray places the bundles of one group that a host took with it together or not at all."""
    run = ppo_run("engine.replicas=3", "roles.reward.workers=2", "placement.share=[[actor, critic]]")
    together, apart = layout(run, ROLES), engines_apart(layout(run, ROLES))
    one = {"CPU": 1.0}
    assert together.groups == (({"CPU": 2.0},), (one, one), (one,), (one, one, one))
    assert apart.groups == (({"CPU": 2.0},), (one, one), (one,), (one,), (one,), (one,))
    assert apart.seats["engine"] == tuple(Seat(group=k, bundle=0, resources=one) for k in (3, 4, 5))
    assert {role: apart.seats[role] for role in ROLES[:4]} == {
        role: together.seats[role] for role in ROLES[:4]
    }
    beside = layout(ppo_run("engine.replicas=2", "placement.share=[[engine, actor]]"), ROLES)
    assert engines_apart(beside) == beside
    assert engines_apart(layout(run, ["actor"])) == layout(run, ["actor"])


def test_a_shortage_says_what_was_asked_what_is_there_and_which_number_to_change():
    run = ppo_run("roles.critic.workers=6")
    why = shortage(run, layout(run, ROLES), [{"CPU": 2.0}])
    assert "critic: 6 worker(s) x 1 CPU" in why
    assert "wants 10 CPU; the cluster has 2" in why
    assert "lower roles.critic.workers or roles.critic.cpus_per_worker" in why
    assert shortage(run, layout(run, ROLES), [{"CPU": 8.0}, {"CPU": 2.0}]) is None
