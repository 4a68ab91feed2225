"""Shares keys and values of equal beginnings between requests.

Only for families whose keys and values are final: what a row of a finished block stores depends on
the tokens up to the end of its block and on nothing behind it.

The *unit* of sharing is a run of whole blocks that fills whole pages: the least common multiple of
block length and page size (blocks of 4 to 32 tokens and pages of 32: one page; blocks of 64: two).
A unit is only shared when all its rows are final, so a shared page is never written, and a page
that holds several blocks needs no rule of its own. The price is that up to one unit less than the
common beginning is shared.

A unit's key is SHA-256 over the key before it and its tokens. The first key stands for all else
that keys and values depend on (model, adapter, block length) and for the *salt*: requests share
only if their salts are equal. Two different beginnings with one key are beyond what anyone can
construct, so tokens are not compared.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from dllm_engine.memory.kv_cache import PageAllocator
from dllm_engine.models.base import BlockAttention
from dllm_engine.request import PrefixChain


def unit_length(block_length: int, page_size: int) -> int:
    """Tokens of a unit: whole blocks that fill whole pages."""
    return math.lcm(block_length, page_size)


def prefix_chain(
    prompt_ids: Sequence[int],
    blocks: BlockAttention,
    *,
    block_length: int,
    page_size: int,
    identity: Sequence[str],
) -> PrefixChain:
    """Make the chain of a request, with the keys of its prompt.

    Args:
        prompt_ids: the tokens before the canvas.
        blocks: how the model attends.
        block_length: of the request.
        page_size: tokens per page.
        identity: model, adapter and salt.
    """
    # A token that sees no later one depends on no block.
    length = 1 if blocks.prompt_causal else block_length
    chain = PrefixChain(unit_length(length, page_size), [*identity, length])
    # The answer's first token comes from the hidden state of the prompt's last one: compute that.
    chain.extend(prompt_ids[:-1] if blocks.first_token_given else prompt_ids)
    return chain


class PrefixCache:
    """Which pages hold the keys and values of which beginnings. Not thread-safe.

    A request that holds a unit holds all units before it, and releases the last one first. So the
    least recently released page never belongs to a unit that another cached unit continues:
    leaves are evicted first, without a search.
    """

    def __init__(self, allocator: PageAllocator) -> None:
        self._allocator = allocator
        self._pages: dict[bytes, list[int]] = {}
        self._key_of: dict[int, bytes] = {}
        #: The key of the unit before.
        self._before: dict[bytes, bytes] = {}
        allocator.on_evict = self._evict
        #: Pages evicted since the start.
        self.evictions = 0

    def match(self, chain: PrefixChain) -> list[int]:
        """Take a reference to the pages of the longest cached beginning, and return them."""
        found: list[int] = []
        for key in chain.keys:
            pages = self._pages.get(key)
            if pages is None:
                break
            found += pages
        self._allocator.share(found)
        return found

    def enter(self, chain: PrefixChain, units: range, pages: list[int]) -> bool:
        """Cache some units, whose pages the caller holds and has filled.

        Args:
            units: which of the chain; those before them are cached, and the caller holds them.
            pages: all pages of the caller's sequence. Where a unit is cached already, the cached
                pages take the place of the caller's, which are released.

        Returns:
            Whether `pages` was changed.
        """
        each = chain.unit // self._allocator.page_size
        changed = False
        for index in units:
            key, place = chain.keys[index], slice(index * each, (index + 1) * each)
            own = pages[place]
            known = self._pages.get(key)
            if known is None:
                self._pages[key] = own
                self._before[key] = chain.keys[index - 1] if index else b""
                self._key_of.update(dict.fromkeys(own, key))
                self._allocator.keep(own)
            elif known != own:
                self._allocator.share(known)
                self._allocator.release(own)
                pages[place] = known
                changed = True
        return changed

    def forget(self, chain: PrefixChain) -> None:
        """Let no further request have the units of a chain, nor any that continues one of them.

        Requests that hold such pages keep them.
        """
        gone = set(chain.keys)
        for key in list(self._pages):  # a unit is entered after the one before it
            if key in gone or self._before[key] in gone:
                gone.add(key)
                self._allocator.forget(self._remove(key))

    def _evict(self, page: int) -> list[int]:
        pages = self._remove(self._key_of[page])
        self.evictions += len(pages)
        return pages

    def _remove(self, key: bytes) -> list[int]:
        pages = self._pages.pop(key)
        del self._before[key]
        for each in pages:
            del self._key_of[each]
        return pages
