"""Requests whose pages grow: nobody who was admitted fails for memory."""

from __future__ import annotations

import random

import pytest
from dllm_engine.loop.scheduler import Scheduler
from dllm_engine.memory.kv_cache import PageAllocator
from dllm_engine.memory.prefix_cache import PrefixCache
from dllm_engine.request import PrefixChain, Prompt, Request
from dllm_engine.sampling_params import SamplingParams

PAGE = 4


def growing(request_id: int, tokens: list[int], gen_length: int, **fields: int) -> Request:
    """A request that needs pages for its prompt and a block at first."""
    params = SamplingParams(gen_length=gen_length, block_length=PAGE, steps=gen_length)
    request = Request(request_id, Prompt(tokens), params, grows=True, **fields)
    request.next_rows, request.next_is_refresh = PAGE, False
    request.num_pages = -(-(len(tokens) + PAGE) // PAGE)
    request.chain = PrefixChain(PAGE, [""])
    request.chain.extend(tokens)
    return request


class Decoding:
    """Runs a scheduler over requests that write a page a step; what an engine would do."""

    def __init__(self, num_pages: int, *, num_slots: int = 8, budget: int = 1000) -> None:
        self.allocator = PageAllocator(num_pages, PAGE)
        self.cache = PrefixCache(self.allocator)
        self.scheduler = Scheduler(num_slots, budget, self.allocator, prefix_cache=self.cache)
        self.done: list[int] = []
        self.written: dict[int, int] = {}
        #: Requests that were resumed, and the pages that they found in the cache then.
        self.resumed: list[tuple[int, int]] = []

    def step(self) -> list[Request]:
        """One step: what it ran."""
        for request in self.scheduler.admit():
            assert len(request.pages) == request.num_pages
            if request.has_canvas:
                self.resumed.append((request.request_id, request.num_entered))
            request.has_canvas = True
        chosen = self.scheduler.schedule()
        for request in chosen:
            assert len(request.pages) == request.num_pages
            written = self.written[request.request_id] = self.written.get(request.request_id, 0) + 1
            tokens = [*request.prompt.ids, *[request.request_id] * PAGE * written]
            assert request.chain is not None
            request.chain.extend(tokens)
            units = range(request.num_entered, len(request.chain.keys))
            self.cache.enter(request.chain, units, request.pages)
            request.num_entered = units.stop
            request.num_pages = -(-(len(tokens) + PAGE) // PAGE)
            if PAGE * written >= request.params.gen_length:
                self.scheduler.remove(request)
                self.done.append(request.request_id)
        self.scheduler.check_integrity()
        return chosen


def test_pages_are_taken_block_by_block() -> None:
    """A request holds what its next step needs, and not what its bound allows."""
    load = Decoding(100)
    request = growing(0, [0] * 8, 1000)
    load.scheduler.add(request)
    held = []
    for _ in range(5):
        load.step()
        held.append(load.allocator.num_used)
    assert held == [3, 4, 5, 6, 7]


def test_the_youngest_gives_its_pages_back_and_goes_on_from_the_cache() -> None:
    """Two requests over pages for one and a half: both end, the older one first; the younger one
    finds what the cache still has of it."""
    load = Decoding(12)
    old, young = growing(0, [1] * 8, 24), growing(1, [2] * 8, 24)
    for request in (old, young):
        load.scheduler.add(request)
    slots = set()
    for _ in range(30):
        load.step()
        slots.add(young.slot)
    assert load.done == [0, 1]
    assert load.scheduler.num_preemptions == 1
    assert load.written == {0: 6, 1: 6}, "no step was taken twice"
    ((resumed, found),) = load.resumed
    assert (resumed, found > 0) == (1, True)
    assert len(slots - {None}) == 1, "it kept its slot"
    assert young.cached_tokens == 0, "what it computed itself does not count as cached"


def test_priority_decides_who_is_the_youngest() -> None:
    """An urgent newcomer takes the pages of an older request that may wait."""
    load = Decoding(10)
    patient = growing(0, [1] * 8, 24, priority=2)
    urgent = growing(1, [2] * 8, 24)
    load.scheduler.add(patient)
    load.step()
    load.scheduler.add(urgent)
    for _ in range(30):
        load.step()
    assert load.done == [1, 0]


def test_a_request_with_reserved_pages_is_preempted_like_any_other() -> None:
    """It holds pages for its whole life, but an older one that grows comes first."""
    load = Decoding(10)
    old = growing(0, [1] * 4, 32)
    young = growing(1, [2] * 12, 4)
    young.grows = False
    for request in (old, young):
        load.scheduler.add(request)
    for _ in range(40):
        load.step()
    assert sorted(load.done) == [0, 1]


def test_pages_of_a_step_in_flight_are_not_taken() -> None:
    """The older request waits for the younger one's step, then takes its pages."""
    load = Decoding(8)
    old, young = growing(0, [1] * 8, 24), growing(1, [2] * 8, 24)
    for request in (old, young):
        load.scheduler.add(request)
    load.step()
    load.step()
    assert load.allocator.num_free == 0
    young.in_flight = True
    assert load.scheduler.schedule() == []
    assert not young.preempted
    young.in_flight = False
    assert load.scheduler.schedule() == [old]
    assert young.preempted


@pytest.mark.parametrize("seed", range(6))
def test_every_request_ends_however_few_pages_there_are(seed: int) -> None:
    """Random lengths, priorities, shared beginnings and exclusive requests, over pages for hardly
    more than the longest: each request writes each page once, and ends."""
    rng = random.Random(seed)
    load = Decoding(rng.choice([14, 20, 40]), num_slots=6, budget=rng.choice([4, 12, 1000]))
    begun = [[rng.randint(0, 1) for _ in range(16)] for _ in range(2)]
    lengths: dict[int, int] = {}
    for number in range(40):
        tokens = rng.choice(begun)[: rng.randint(1, 16)] + [rng.randint(2, 9)] * rng.randint(0, 8)
        lengths[number] = gen_length = PAGE * rng.randint(1, 7)
        request = growing(number, tokens, gen_length, priority=rng.choice([0, 1, 2]))
        request.exclusive = rng.random() < 0.1
        load.scheduler.add(request)
        for _ in range(rng.randint(0, 4)):
            chosen = load.step()
            assert chosen or len(load.done) == number + 1, "nothing runs, though requests wait"
            assert len(chosen) == 1 or not any(r.exclusive for r in chosen)
    for _ in range(2000):
        if len(load.done) == 40:
            break
        assert load.step()
    assert sorted(load.done) == list(range(40))
    assert {n: PAGE * w for n, w in load.written.items()} == lengths
    assert load.allocator.num_used == 0
