"""Beginnings that requests share: found if and only if they were computed and not evicted."""

from __future__ import annotations

import dataclasses
import random

import pytest
from dllm_engine.memory.kv_cache import PageAllocator
from dllm_engine.memory.prefix_cache import PrefixCache, unit_length
from dllm_engine.request import PrefixChain
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.budget import examples

#: A salt and the tokens of whole units from the beginning.
Beginning = tuple[str, tuple[int, ...]]


def chain_of(tokens: list[int], unit: int = 4, salt: str = "") -> PrefixChain:
    """The keys of a sequence."""
    chain = PrefixChain(unit, [salt])
    chain.extend(tokens)
    return chain


@pytest.mark.parametrize(
    ("block_length", "page_size", "unit"),
    [(4, 32, 32), (8, 32, 32), (16, 32, 32), (32, 32, 32), (64, 32, 64), (32, 16, 32), (12, 8, 24)],
)
def test_a_unit_is_whole_blocks_in_whole_pages(
    block_length: int, page_size: int, unit: int
) -> None:
    """It is the shortest such run."""
    assert unit_length(block_length, page_size) == unit


def test_keys_depend_on_all_tokens_before_and_on_the_identity() -> None:
    """Equal units have different keys behind different beginnings, and in another identity."""
    keys = chain_of([1, 2, 3, 4, 5, 6, 7, 8]).keys
    assert chain_of([1, 2, 3, 4, 5, 6, 7, 8, 9]).keys == keys
    assert chain_of([1, 2, 3, 4, 5, 6, 7, 9]).keys[0] == keys[0]
    assert chain_of([0, 2, 3, 4, 5, 6, 7, 8]).keys[1] != keys[1]
    assert not set(chain_of([1, 2, 3, 4, 5, 6, 7, 8], salt="other").keys) & set(keys)
    assert PrefixChain(4, ["ab", "c"]).keys == PrefixChain(4, ["a", "bc"]).keys == []
    first, second = PrefixChain(1, ["ab", "c"]), PrefixChain(1, ["a", "bc"])
    for chain in (first, second):
        chain.extend([1])
    assert first.keys != second.keys


def test_a_chain_grows_with_its_sequence() -> None:
    """Keys of a sequence that is extended token by token are those of the whole."""
    grown, tokens = chain_of([]), list(range(13))
    for count in range(len(tokens) + 1):
        grown.extend(tokens[:count])
    assert grown.keys == chain_of(tokens).keys


def test_a_beginning_computed_twice_is_stored_once() -> None:
    """Of two requests at once, the second takes the first one's pages and frees its own."""
    allocator = PageAllocator(8, 4)
    cache = PrefixCache(allocator)
    chain = chain_of(list(range(8)))
    first, second = allocator.reserve(3), allocator.reserve(3)
    assert not cache.enter(chain, range(2), first)
    assert cache.enter(chain, range(2), second)
    assert second[:2] == first[:2]
    assert second[2] != first[2]
    assert allocator.num_used == 4
    allocator.check_integrity([*first, *second])


@dataclasses.dataclass
class Cached:
    """A cached beginning of the slow model."""

    holders: int = 0
    #: When it lost its last holder.
    released: int = 0


@dataclasses.dataclass
class Sequence:
    """A request of the slow model: its tokens, and how many of its units it holds in the cache."""

    salt: str
    tokens: list[int]
    chain: PrefixChain
    pages: list[int]
    entered: int


class Conversations:
    """The cache beside a slow model of it: a dictionary of beginnings.

    Each page has a label that says what was written to it last.
    """

    def __init__(self, rng: random.Random, num_pages: int, page_size: int, unit: int) -> None:
        self.rng, self.page_size, self.unit = rng, page_size, unit
        self.allocator = PageAllocator(num_pages, page_size)
        self.cache = PrefixCache(self.allocator)
        self.known: dict[Beginning, Cached] = {}
        self.labels: dict[int, Beginning] = {}
        self.running: list[Sequence] = []
        self.said: list[tuple[str, list[int]]] = [("", [])]
        self.clock = 0
        self.num_found = 0

    def beginnings(self, salt: str, tokens: list[int]) -> list[Beginning]:
        """Whole units from the beginning, shortest first."""
        ends = range(self.unit, len(tokens) + 1, self.unit)
        return [(salt, tuple(tokens[:end])) for end in ends]

    def run(self, steps: int) -> None:
        """Take random actions, and check after each."""
        for _ in range(steps):
            self.clock += 1
            action = self.rng.choice([self.begin, self.begin, self.write, self.write, self.end])
            action()
            self.check()

    def begin(self) -> None:
        """A request that repeats something said, branches off from it, or goes on with it."""
        salt, before = self.rng.choice(self.said)
        if self.rng.random() < 0.2:
            salt = self.rng.choice(["", "other"])
        tokens = before[: self.rng.randint(0, len(before))] if self.rng.random() < 0.5 else before
        tokens = tokens + [self.rng.randint(0, 1) for _ in range(self.rng.randint(0, 12))]
        expected = 0
        for beginning in self.beginnings(salt, tokens):
            if beginning not in self.known:
                break
            expected += 1
        chain = chain_of(tokens, self.unit, salt)
        found = self.cache.match(chain)
        assert len(found) * self.page_size == expected * self.unit
        for beginning in self.beginnings(salt, tokens)[:expected]:
            self.known[beginning].holders += 1
        self.num_found += expected
        one = Sequence(salt, tokens, chain, found, expected)
        for place, page in enumerate(found):
            assert self.labels[page] == self.label(one, place)
        if not self.take(one, self.allocator.pages_for(len(tokens)) - len(found)):
            self.let_go(one)
            return
        self.running.append(one)

    def label(self, one: Sequence, place: int) -> Beginning:
        """What a page of this sequence holds."""
        return one.salt, tuple(one.tokens[: (place + 1) * self.page_size])

    def take(self, one: Sequence, count: int) -> bool:
        """Give a sequence pages, if there are some; the model evicts what must go."""
        if count > self.allocator.num_free:
            return False
        each = self.unit // self.page_size
        held = {page for other in [*self.running, one] for page in other.pages}
        idle = [b for b, cached in self.known.items() if not cached.holders]
        empty = self.allocator.num_pages - len(held) - each * len(idle)
        while empty < count:
            leaves = [b for b in idle if not any(self.continues(c, b) for c in self.known)]
            oldest = min(leaves, key=lambda b: self.known[b].released)
            del self.known[oldest]
            idle.remove(oldest)
            empty += each
        taken = self.allocator.reserve(count)
        assert not held & set(taken)
        for page in taken:
            self.labels[page] = ("", ())
        one.pages += taken
        return True

    @staticmethod
    def continues(longer: Beginning, shorter: Beginning) -> bool:
        """Whether one beginning is the start of a longer one."""
        (salt, tokens), (other, start) = longer, shorter
        return salt == other and len(tokens) > len(start) and tokens[: len(start)] == start

    def write(self) -> None:
        """A request computes its next units, or writes a few more tokens."""
        if not self.running:
            return
        one = self.rng.choice(self.running)
        units = self.beginnings(one.salt, one.tokens)
        if one.entered == len(units):
            more = self.rng.randint(1, 6)
            wanted = self.allocator.pages_for(len(one.tokens) + more) - len(one.pages)
            if self.take(one, max(0, wanted)):
                one.tokens += [self.rng.randint(0, 1) for _ in range(more)]
                one.chain.extend(one.tokens)
            return
        end = self.rng.randint(one.entered + 1, len(units))
        each = self.unit // self.page_size
        for place in range(one.entered * each, end * each):
            self.labels[one.pages[place]] = self.label(one, place)
        before = list(one.pages)
        changed = self.cache.enter(one.chain, range(one.entered, end), one.pages)
        assert changed == (before != one.pages)
        for beginning in units[one.entered : end]:
            self.known.setdefault(beginning, Cached()).holders += 1
        one.entered = end
        for place in range(end * each):
            assert self.labels[one.pages[place]] == self.label(one, place)

    def end(self) -> None:
        """A request ends; what it said may be repeated."""
        if self.running:
            one = self.running.pop(self.rng.randrange(len(self.running)))
            self.said.append((one.salt, one.tokens))
            self.let_go(one)

    def let_go(self, one: Sequence) -> None:
        """Release the pages, last one first."""
        self.allocator.release(reversed(one.pages))
        for beginning in reversed(self.beginnings(one.salt, one.tokens)[: one.entered]):
            self.clock += 1
            cached = self.known[beginning]
            cached.holders -= 1
            if not cached.holders:
                cached.released = self.clock

    def check(self) -> None:
        """Every page is counted, and as much is cached as the model says."""
        self.allocator.check_integrity([page for one in self.running for page in one.pages])
        assert self.allocator.num_cached * self.page_size == len(self.known) * self.unit


@settings(max_examples=examples(60))
@given(
    seed=st.integers(0, 2**32),
    num_pages=st.sampled_from([6, 12, 40]),
    shape=st.sampled_from([(1, 1), (2, 2), (4, 4), (2, 4), (1, 3)]),
)
def test_the_cache_is_a_dictionary_of_beginnings(
    seed: int, num_pages: int, shape: tuple[int, int]
) -> None:
    """Random conversations that share beginnings, branch and are evicted find what a slow model
    finds: the longest beginning that it has, leaves evicted first, the longest unused before."""
    page_size, unit = shape
    load = Conversations(random.Random(seed), num_pages, page_size, unit)
    load.run(150)


def test_conversations_of_the_model_share_and_evict() -> None:
    """The random load above reaches what it is to test: many hits, and evictions."""
    load = Conversations(random.Random(1), 12, 2, 2)
    load.run(600)
    assert load.num_found > 100
    assert load.cache.evictions > 50
