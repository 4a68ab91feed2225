"""Who takes the next step: budgets, turns, slots, pages, and an even load."""

import dataclasses

import pytest
from dllm_engine.cache import PageAllocator
from dllm_engine.request import Prompt, SamplingParams
from dllm_engine.scheduler import MAX_HELD_STEPS, PRIORITY_STEPS, Request, Scheduler
from hypothesis import given, settings
from hypothesis import strategies as st


def make(request_id: int, rows: int, **fields: int) -> Request:
    """A request without a cache, of `rows` tokens."""
    params = SamplingParams(gen_length=1, block_length=1, steps=1, cache="none")
    return Request(request_id, Prompt([0] * (rows - 1)), params, **fields)


def ids(requests: list[Request]) -> list[int]:
    """Their ids, in order."""
    return sorted(r.request_id for r in requests)


def empty(num_slots: int, budget: int, num_pages: int = 0) -> Scheduler:
    """A scheduler that nothing was given yet."""
    return Scheduler(num_slots, budget, PageAllocator(num_pages, 16))


def loaded(num_slots: int, budget: int, rows: list[int]) -> Scheduler:
    """A scheduler with requests 0, 1, … of these sizes admitted."""
    scheduler = empty(num_slots, budget)
    for i, size in enumerate(rows):
        scheduler.add(make(i, size))
    scheduler.admit()
    return scheduler


def test_admission_is_first_come_first_served_and_bounded_by_slots() -> None:
    """Requests get slots in order of arrival; the rest wait for the first free one."""
    scheduler = empty(2, 100)
    requests = [make(i, 10) for i in range(4)]
    for request in requests:
        scheduler.add(request)
    assert ids(scheduler.admit()) == [0, 1]
    assert (scheduler.num_running, scheduler.num_waiting) == (2, 2)
    scheduler.remove(requests[0])
    assert ids(scheduler.admit()) == [2]


def test_admission_reserves_pages_and_lets_nobody_pass() -> None:
    """A request that finds too few pages waits, and so do smaller ones behind it."""
    scheduler = empty(4, 100, num_pages=10)
    first, large, small = (make(i, 10, num_pages=n) for i, n in enumerate([6, 8, 1]))
    for request in (first, large, small):
        scheduler.add(request)
    assert ids(scheduler.admit()) == [0]
    assert len(set(first.pages)) == 6
    scheduler.remove(first)
    assert ids(scheduler.admit()) == [1, 2]
    assert not set(large.pages) & set(small.pages)
    scheduler.check_integrity()


def test_request_that_runs_alone_waits_for_all_and_all_for_it() -> None:
    """It gets a slot when nobody has one, and nobody gets one beside it."""
    scheduler = empty(4, 100)
    before, alone, after = make(0, 10), make(1, 10, alone=True), make(2, 10)
    for request in (before, alone, after):
        scheduler.add(request)
    assert ids(scheduler.admit()) == [0]
    scheduler.remove(before)
    assert ids(scheduler.admit()) == [1]
    assert ids(scheduler.admit()) == []
    scheduler.remove(alone)
    assert ids(scheduler.admit()) == [2]
    assert ids(scheduler.admit()) == []


def test_priority_goes_first_but_waiting_makes_up_for_it() -> None:
    """Level 0 passes level 1, unless that has waited `PRIORITY_STEPS` steps longer."""
    scheduler = empty(1, 100)
    running = make(9, 10)
    scheduler.add(running)
    scheduler.admit()
    low = make(0, 10, priority=1)
    scheduler.add(low)
    high = make(1, 10)
    scheduler.add(high)
    scheduler.remove(running)
    assert ids(scheduler.admit()) == [1]
    for _ in range(PRIORITY_STEPS + 1):
        scheduler.schedule()
    scheduler.add(make(2, 10))
    scheduler.remove(high)
    assert ids(scheduler.admit()) == [0]


def test_a_step_fills_the_budget_and_the_passed_over_go_first_next_time() -> None:
    """Smaller requests fill what a larger one leaves; who was passed over leads the next step."""
    scheduler = loaded(4, 100, [60, 60, 30, 20])
    assert ids(scheduler.schedule()) == [0, 2]
    assert ids(scheduler.schedule()) == [1, 3]
    assert ids(scheduler.schedule()) == [0, 2]


def test_an_oversized_request_runs_alone_and_blocks_nobody() -> None:
    """Larger than the budget: a step of its own when its turn comes, others in between."""
    scheduler = loaded(3, 100, [40, 500, 40])
    assert [ids(scheduler.schedule()) for _ in range(3)] == [[0, 2], [1], [0, 2]]


def test_guidance_counts_twice() -> None:
    """A request with guidance pushes its rows twice and is charged for both."""
    request = Request(0, Prompt([0] * 9), SamplingParams(gen_length=1, cfg_scale=1.0))
    assert request.step_cost == 20


def test_a_waiting_request_can_be_removed() -> None:
    """Cancelling before admission leaves slots and queue whole."""
    scheduler = empty(1, 10)
    requests = [make(0, 5), make(1, 5)]
    for request in requests:
        scheduler.add(request)
    scheduler.admit()
    scheduler.remove(requests[1])
    scheduler.check_integrity()
    assert scheduler.num_waiting == 0


@dataclasses.dataclass
class Denoising:
    """What the runner would tell of a request with `dual`: one token per step."""

    request: Request
    step: int = 0

    def take_step(self) -> bool:
        """One step; whether the request is finished."""
        params = self.request.params
        assert params.block_length is not None
        self.request.rows_run += self.request.step_cost
        self.request.steps_run += 1
        self.step += 1
        self.request.next_refresh = self.step % params.block_length == 0
        self.request.next_rows = (
            self.request.length if self.request.next_refresh else params.block_length
        )
        return self.step == params.gen_length


def cached(request_id: int, prompt: int = 128, gen: int = 128, block: int = 32) -> Denoising:
    """A request with `dual`."""
    params = SamplingParams(gen_length=gen, steps=gen, block_length=block, cache="dual")
    return Denoising(Request(request_id, Prompt([0] * prompt), params))


@pytest.mark.parametrize(
    ("count", "prompt", "gen", "block", "worst"),
    [
        (32, 128, 128, 32, 1.7),
        (16, 256, 256, 32, 2.0),  # two Refreshes
        (48, 64, 128, 16, 1.7),
        (8, 896, 128, 32, 2.6),  # a single one
    ],
)
def test_a_burst_drifts_apart_so_that_steps_are_even(
    count: int, prompt: int, gen: int, block: int, worst: float
) -> None:
    """Equal requests arrive together: after the first block no step is much above the mean, as
    far as single Refreshes allow.

    Together for ever, every 32nd step of the first case would carry 8,192 rows and all others
    1,024.
    """
    scheduler = empty(count, count * (prompt + gen))
    burst = {i: cached(i, prompt, gen, block) for i in range(count)}
    for one in burst.values():
        scheduler.add(one.request)
    scheduler.admit()
    loads = []
    while burst:
        chosen = scheduler.schedule()
        loads.append(sum(r.step_cost for r in chosen))
        for request in chosen:
            if burst[request.request_id].take_step():
                scheduler.remove(request)
                del burst[request.request_id]
    steady = loads[block + 8 : gen - 8]
    assert max(steady) <= worst * sum(steady) / len(steady)
    assert sum(loads) == count * gen // block * (prompt + gen + (block - 1) * block)
    assert len(loads) <= gen + 2 * MAX_HELD_STEPS


def reusing(request_id: int, rows: int) -> Request:
    """A request whose every step is a Reuse of `rows` rows."""
    params = SamplingParams(gen_length=rows, block_length=rows, steps=rows, cache="dual")
    request = Request(request_id, Prompt([0]), params)
    request.next_rows, request.next_refresh = rows, False
    return request


def refreshing(request_id: int, rows: int) -> Request:
    """A request that is to Refresh `rows` rows."""
    params = SamplingParams(gen_length=32, block_length=32, steps=32, cache="dual")
    return Request(request_id, Prompt([0] * (rows - 32)), params)


def steps_of(scheduler: Scheduler, wanted: list[Request], count: int) -> dict[int, int]:
    """The step in which each of `wanted` ran first, of `count` steps."""
    first: dict[int, int] = {}
    for step in range(1, count + 1):
        for request in scheduler.schedule():
            first.setdefault(request.request_id, step)
            request.next_refresh = False
            request.next_rows = min(request.step_cost, 1000)
    return {r.request_id: first[r.request_id] for r in wanted}


def test_what_steps_leave_unspent_is_saved_for_a_refresh() -> None:
    """Steps may have 2,000 rows and 1,000 are wanted: a Refresh of 3,000 waits for two of them."""
    scheduler = empty(4, 16000)
    other, large = reusing(0, 1000), refreshing(1, 3000)
    for request in (other, large):
        scheduler.add(request)
    scheduler.admit()
    assert steps_of(scheduler, [other, large], 10) == {0: 1, 1: 3}


def test_what_a_step_spends_beyond_its_share_is_paid_back() -> None:
    """Nobody waits with the first Refresh; the second waits until the debt is gone."""
    scheduler = empty(4, 16000)
    first, second = refreshing(0, 4000), refreshing(1, 4000)
    for request in (first, second):
        scheduler.add(request)
    scheduler.admit()
    began = steps_of(scheduler, [first, second], 20)
    assert began[0] == 1
    assert began[1] > 2


def test_a_single_request_never_waits() -> None:
    """With nobody to be even with, every step is taken at once."""
    scheduler = empty(4, 2048)
    one = cached(0)
    scheduler.add(one.request)
    scheduler.admit()
    for _ in range(128):
        assert scheduler.schedule() == [one.request]
        one.take_step()


@settings(deadline=None)
@given(
    shapes=st.lists(
        st.tuples(st.integers(1, 200), st.integers(1, 12), st.integers(1, 6), st.integers(0, 2)),
        min_size=1,
        max_size=25,
    ),
    num_slots=st.integers(1, 8),
    budget=st.integers(1, 150),
    arrivals=st.data(),
)
def test_nobody_starves_and_no_step_is_wasted(
    shapes: list[tuple[int, int, int, int]],
    num_slots: int,
    budget: int,
    arrivals: st.DataObject,
) -> None:
    """Over random arrivals: no running request waits longer than a bound, steps stay in budget
    (or hold one request), and whoever is left out did not fit or is a Refresh held back for a
    while; so every request finishes within a bound."""
    scheduler = empty(num_slots, budget, num_pages=12)
    pending = [cached(i, p, g, min(b, g)) for i, (p, g, b, _) in enumerate(shapes)]
    for one, (_, _, _, pages) in zip(pending, shapes, strict=True):
        one.request.num_pages = pages * 6
        one.request.priority = pages
    everyone = {one.request.request_id: one for one in pending}
    idle: dict[int, int] = {}
    # The oldest by turn always runs; priorities and the handicap only shift turns.
    bound = MAX_HELD_STEPS + 2 * PRIORITY_STEPS + 10 + 3 * num_slots
    steps = 0
    while pending or everyone:
        steps += 1
        for _ in range(arrivals.draw(st.integers(0, 3)) if idle else 1):
            if pending:
                scheduler.add(pending.pop().request)
        for request in scheduler.admit():
            idle[request.request_id] = 0
        chosen = scheduler.schedule()
        scheduler.check_integrity()
        assert bool(chosen) == bool(idle)
        used = sum(r.step_cost for r in chosen)
        assert len(chosen) == 1 or used <= budget
        for i in idle.keys() - set(ids(chosen)):
            left_out = everyone[i].request
            held = left_out.next_refresh and idle[i] <= MAX_HELD_STEPS
            assert held or used + left_out.step_cost > budget
        for i in idle:
            idle[i] = 0 if i in ids(chosen) else idle[i] + 1
            assert idle[i] <= bound
        for request in chosen:
            if everyone[request.request_id].take_step():
                scheduler.remove(request)
                del everyone[request.request_id], idle[request.request_id]
    # In every step somebody goes on.
    assert steps <= sum(g for _, g, _, _ in shapes)
