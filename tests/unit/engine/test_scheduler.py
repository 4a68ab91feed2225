"""Who takes the next step: budgets, turns, slots, pages, and an even load."""

import dataclasses
import random
from typing import Any

import pytest
from dllm_engine.loop.scheduler import Scheduler
from dllm_engine.memory.kv_cache import PageAllocator
from dllm_engine.request import Prompt, Request
from dllm_engine.sampling_params import SamplingParams


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
    assert (len(scheduler.running), len(scheduler.waiting)) == (2, 2)
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
    """It gets a slot when all slots are free, and runs alone."""
    scheduler = empty(4, 100)
    before, alone, after = make(0, 10), make(1, 10, exclusive=True), make(2, 10)
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
    """Level 0 passes level 1, unless that has waited 64 steps longer."""
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
    for _ in range(65):
        scheduler.schedule()
    scheduler.add(make(2, 10))
    scheduler.remove(high)
    assert ids(scheduler.admit()) == [0]


def test_a_step_is_for_the_oldest_and_smaller_ones_fill_what_is_left() -> None:
    """A request that was passed over for 32 steps goes first in the next one."""
    scheduler = loaded(4, 100, [60, 60, 30, 20])
    assert [ids(scheduler.schedule()) for _ in range(32)] == [[0, 2]] * 32
    assert ids(scheduler.schedule()) == [1, 3]
    assert ids(scheduler.schedule()) == [0, 2]


def test_a_more_urgent_request_takes_the_next_step() -> None:
    """Level 0 goes before one of level 1 that runs already, unless that came 64 steps earlier."""
    for earlier, first in ((63, 1), (65, 0)):
        scheduler = empty(2, 100)
        scheduler.add(make(0, 60, priority=1))
        scheduler.admit()
        for _ in range(earlier):
            scheduler.schedule()
        scheduler.add(make(1, 60))
        scheduler.admit()
        assert ids(scheduler.schedule()) == [first]


def test_an_oversized_request_runs_alone_and_blocks_nobody() -> None:
    """Larger than the budget: a step of its own when its turn comes, and no more than 32 of them
    before the others have theirs."""
    younger = loaded(3, 100, [40, 500, 40])
    assert [ids(younger.schedule()) for _ in range(34)] == [[0, 2]] * 32 + [[1], [0, 2]]
    older = loaded(3, 100, [500, 40, 40])
    assert [ids(older.schedule()) for _ in range(34)] == [[0]] * 32 + [[1, 2], [0]]


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
    assert len(scheduler.waiting) == 0


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
        self.request.next_is_refresh = self.step % params.block_length == 0
        self.request.next_rows = (
            self.request.length if self.request.next_is_refresh else params.block_length
        )
        return self.step == params.gen_length


def cached(
    request_id: int, prompt: int = 128, gen: int = 128, block: int = 32, cache: str = "dual"
) -> Denoising:
    """A request of one token per step."""
    params = SamplingParams(gen_length=gen, steps=gen, block_length=block, cache=cache)
    return Denoising(Request(request_id, Prompt([0] * prompt), params))


@pytest.mark.parametrize(
    ("params", "rows"),
    [
        ({"cache": "none"}, 256),
        ({"cache": "dual"}, (256 + 31 * 32) / 32),
        ({"cache": "dual", "steps": 32}, (256 + 7 * 32) / 8),
        ({"cache": "dual", "delay_steps": 2}, (3 * 256 + 29 * 32) / 32),
        ({"cache": "dual", "refresh_interval": 8}, (4 * 256 + 28 * 32) / 32),
        ({"cache": "dual", "delay_steps": 2, "refresh_interval": 8}, (6 * 256 + 26 * 32) / 32),
        # 128 rows from the first block on, 32 from the last one on, and 16 behind the canvas.
        ({"cache": "prefix"}, (256 + 31 * (80 + 16)) / 32),
        # 32 rows in the block's second step, 2 in its last one.
        ({"cache": "delayed"}, (256 + 31 * 17) / 32),
        ({"cache": "dual", "cfg_scale": 1.0}, 2 * (256 + 31 * 32) / 32),
    ],
)
def test_mean_cost_is_planned_from_the_parameters(params: dict[str, Any], rows: float) -> None:
    """Rows per step of a block, for 112 tokens before and 16 behind a canvas of 128."""
    asked = SamplingParams(**{"gen_length": 128, "block_length": 32, "steps": 128} | params)
    prompt = Prompt([0] * 112, suffix_ids=[0] * 16)
    assert Request(0, prompt, asked).mean_cost == pytest.approx(rows)


def test_mean_cost_follows_what_steps_have_cost() -> None:
    """Each step of threshold decoding finishes a block: all are Refreshes, and so is the mean."""
    request = cached(0).request
    for _ in range(2000):
        request.rows_run += request.length
        request.steps_run += 1
    assert request.mean_cost == pytest.approx(request.length, rel=0.02)


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
    assert len(loads) <= gen + 64


def reusing(request_id: int, rows: int) -> Request:
    """A request whose every step is a Reuse of `rows` rows."""
    params = SamplingParams(gen_length=rows, block_length=rows, steps=rows, cache="dual")
    request = Request(request_id, Prompt([0]), params)
    request.next_rows, request.next_is_refresh = rows, False
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
            request.next_is_refresh = False
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
    """Steps may have 2,000 rows: the first Refresh of 4,000 leaves a debt of 2,000, which two steps
    of 1,000 pay back, and the next three save what the second needs."""
    scheduler = empty(4, 16000)
    first, second = refreshing(0, 4000), refreshing(1, 4000)
    for request in (first, second):
        scheduler.add(request)
    scheduler.admit()
    assert steps_of(scheduler, [first, second], 20) == {0: 1, 1: 7}


def test_a_single_request_never_waits() -> None:
    """A single request takes every step at once."""
    scheduler = empty(4, 2048)
    one = cached(0)
    scheduler.add(one.request)
    scheduler.admit()
    for _ in range(128):
        assert scheduler.schedule() == [one.request]
        one.take_step()


def test_a_refresh_is_held_for_32_steps_at_most() -> None:
    """Reuses take all that steps may have, an eighth of the budget: both Refreshes run in the 33rd,
    as no Refresh does that is held."""
    scheduler = empty(4, 16000)
    reuses, *refreshes = reusing(0, 2000), refreshing(1, 3000), refreshing(2, 3000)
    for request in (reuses, *refreshes):
        request.steps_run = 10**6  # at a mean load of next to nothing
        scheduler.add(request)
    scheduler.admit()
    first: dict[int, int] = {}
    for step in range(1, 40):
        for request in scheduler.schedule():
            first.setdefault(request.request_id, step)
    assert first == {0: 1, 1: 33, 2: 33}


@dataclasses.dataclass
class ClosedLoop:
    """A scheduler whose queue always holds six requests of all sizes, policies and priorities."""

    num_slots: int
    budget: int
    rng: random.Random
    steps: int = 0
    #: Most steps in a row that a running request was left out of, …
    longest_idle: int = 0
    #: … and that one waited for a slot.
    longest_wait: int = 0

    def __post_init__(self) -> None:
        self.scheduler = empty(self.num_slots, self.budget, num_pages=200)
        self.live: dict[int, Denoising] = {}
        self.queued: dict[int, int] = {}
        self.idle: dict[int, int] = {}
        self.count = 0

    def arrive(self) -> None:
        """One more request; a fifth of them may wait for two levels of more urgent ones."""
        gen, rng = self.rng.choice([4, 32, 64]), self.rng
        cache = rng.choice(["none", "prefix", "dual"])
        one = cached(self.count, rng.randint(1, 600), gen, min(32, gen), cache)
        one.request.num_pages = rng.randint(0, 400 // self.num_slots)
        one.request.priority = rng.choice([0, 0, 0, 0, 2])
        self.live[self.count], self.queued[self.count] = one, self.steps
        self.scheduler.add(one.request)
        self.count += 1

    def run(self, steps: int) -> None:
        """Check every one of `steps` steps."""
        for _ in range(steps):
            self.steps += 1
            while len(self.scheduler.waiting) < 6:
                self.arrive()
            for request in self.scheduler.admit():
                del self.queued[request.request_id]
                self.idle[request.request_id] = 0
            self.check_step(self.scheduler.schedule())
            waits = [self.steps - queued for queued in self.queued.values()]
            self.longest_wait = max([self.longest_wait, *waits])

    def check_step(self, chosen: list[Request]) -> None:
        """It is within the budget and wastes nothing; then it runs."""
        scheduler = self.scheduler
        scheduler.check_integrity()
        used = sum(r.step_cost for r in chosen)
        assert len(chosen) == 1 or (chosen and used <= self.budget)
        for i in self.idle.keys() - set(ids(chosen)):
            left_out = self.live[i].request
            held = left_out.next_is_refresh and self.idle[i] < 32
            assert held or used + left_out.step_cost > self.budget
            self.idle[i] += 1
            self.longest_idle = max(self.longest_idle, self.idle[i])
        for request in chosen:
            i = request.request_id
            self.idle[i] = 0
            if self.live[i].take_step():
                scheduler.remove(request)
                del self.live[i], self.idle[i]


@pytest.mark.parametrize(
    ("num_slots", "budget", "longest_idle", "longest_wait"),
    [
        (4, 64, 35, 400),
        (4, 2048, 35, 300),
        (16, 512, 47, 200),
        (64, 64, 95, 1200),
        (64, 512, 95, 200),
        (64, 2048, 95, 100),
    ],
)
def test_nobody_starves_and_no_step_is_wasted(
    num_slots: int, budget: int, longest_idle: int, longest_wait: int
) -> None:
    """While requests keep arriving, steps stay in budget (or hold one request). A request that is
    left out did not fit or is a Refresh held back for a while. A running request is left out of 32
    steps and one for each other at most; a waiting one, urgent or not, gets a slot."""
    for seed in range(4):
        load = ClosedLoop(num_slots, budget, random.Random(seed))
        load.run(1500)
        assert load.longest_idle <= longest_idle
        assert load.longest_wait <= longest_wait


@pytest.mark.parametrize(("others", "beside"), [([40] * 5, 5), ([400] * 4, 0)])
def test_a_large_request_does_not_keep_small_ones_out(others: list[int], beside: int) -> None:
    """Where two steps may be in flight, each has half; but the first may be more than that by
    itself, and requests that fit beside it join unless the others make a step of their own."""
    scheduler = Scheduler(8, 16384, PageAllocator(0, 1), overlap_rows=1024)
    for i, size in enumerate([3000, *others]):
        scheduler.add(make(i, size))
    scheduler.admit()
    for request in scheduler.running:
        request.next_is_refresh = False
    first = scheduler.schedule()
    assert ids(first) == list(range(1 + beside))
    for request in first:
        request.in_flight = True
    assert ids(scheduler.schedule()) == ([] if beside else [1, 2, 3, 4])


@dataclasses.dataclass
class Overlapped:
    """A scheduler that always has six requests waiting, with two steps in flight where it can."""

    num_slots: int
    budget: int
    overlap_rows: int
    rng: random.Random
    longest_idle: int = 0
    most_in_flight: int = 0

    def run(self, steps: int) -> None:
        """Launch so many steps, and check each."""
        scheduler = Scheduler(
            self.num_slots, self.budget, PageAllocator(0, 1), overlap_rows=self.overlap_rows
        )
        live: dict[int, Denoising] = {}
        last: dict[int, int] = {}
        flights: list[list[Request]] = []
        count = launched = 0
        while launched < steps:
            while len(scheduler.waiting) < 6:
                gen, cache = self.rng.choice([4, 32, 64]), self.rng.choice(["none", "dual"])
                live[count] = cached(count, self.rng.randint(1, 600), gen, min(32, gen), cache)
                scheduler.add(live[count].request)
                count += 1
            for request in scheduler.admit():
                last[request.request_id] = launched
            chosen = scheduler.schedule() if len(flights) < 2 else []
            if chosen:
                launched += 1
                used = sum(request.step_cost for request in chosen)
                assert used <= self.budget or len(chosen) == 1
                for request in chosen:
                    assert not request.in_flight
                    request.in_flight = True
                    idle = launched - last[request.request_id]
                    self.longest_idle = max(self.longest_idle, idle)
                    last[request.request_id] = launched
                flights.append(chosen)
                self.most_in_flight = max(self.most_in_flight, len(flights))
                continue
            assert flights, "nothing runs and nothing is launched"
            for request in flights.pop(0):
                request.in_flight = False
                if live[request.request_id].take_step():
                    scheduler.remove(request)
                    del live[request.request_id], last[request.request_id]
            scheduler.check_integrity()


@pytest.mark.parametrize(
    ("num_slots", "budget", "overlap_rows", "longest_idle"),
    [(4, 2048, 64, 38), (16, 2048, 256, 50), (64, 2048, 512, 98), (64, 16384, 1024, 98)],
)
def test_nobody_starves_while_two_steps_are_in_flight(
    num_slots: int, budget: int, overlap_rows: int, longest_idle: int
) -> None:
    """There is always one in flight, often two, of different requests, each within its budget; a
    running request is left out of 32 steps and one for each other, and a few while it was under
    way."""
    for seed in range(4):
        load = Overlapped(num_slots, budget, overlap_rows, random.Random(seed))
        load.run(1500)
        assert load.most_in_flight == 2
        assert load.longest_idle <= longest_idle
