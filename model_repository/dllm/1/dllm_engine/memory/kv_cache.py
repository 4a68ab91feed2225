"""The pool of pages for keys and values, and which request holds which of them."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor

from dllm_engine.models.base import ModelSpec
from dllm_engine.ops.transfer import Array


class PageAllocator:
    """Hands out page numbers with counted references. Any free page fits any request.

    A page without references is free. A free page may still hold keys and values that the prefix
    cache can hand out again: it is *idle*. `reserve` takes empty pages first, then idle ones, the
    least recently released first.
    """

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.num_pages = num_pages
        self.page_size = page_size
        self._empty = list(range(num_pages - 1, -1, -1))
        self._references = [0] * num_pages
        #: Pages whose content the prefix cache has, with or without references.
        self._cached: set[int] = set()
        #: Cached pages without references, least recently released first.
        self._idle: collections.OrderedDict[int, None] = collections.OrderedDict()
        #: Tells the prefix cache that a page is needed for something else; returns the pages whose
        #: content became useless, that page among them.
        self.on_evict: Callable[[int], Iterable[int]] = lambda page: [page]

    @property
    def num_free(self) -> int:
        """Pages without references."""
        return len(self._empty) + len(self._idle)

    @property
    def num_used(self) -> int:
        """Pages that running requests hold."""
        return self.num_pages - self.num_free

    @property
    def num_cached(self) -> int:
        """Pages whose content the prefix cache has."""
        return len(self._cached)

    def pages_for(self, rows: int) -> int:
        """Count the pages that hold `rows` rows."""
        return -(-rows // self.page_size)

    def reserve(self, count: int) -> list[int]:
        """Take `count` pages to write to; the caller has checked that they are free."""
        assert count <= self.num_free, f"{count} pages asked for, {self.num_free} free"
        while len(self._empty) < count:
            self.forget(self.on_evict(next(iter(self._idle))))
        cut = len(self._empty) - count
        taken, self._empty = self._empty[cut:], self._empty[:cut]
        for page in taken:
            self._references[page] = 1
        return taken

    def share(self, pages: Iterable[int]) -> None:
        """Add a reference to each of some pages of the prefix cache."""
        for page in pages:
            self._references[page] += 1
            self._idle.pop(page, None)

    def release(self, pages: Iterable[int]) -> None:
        """Take a reference from each page.

        The first page is evicted first: give the pages of a sequence from its end to its beginning.
        """
        for page in pages:
            self._references[page] -= 1
            if self._references[page] == 0:
                if page in self._cached:
                    self._idle[page] = None
                else:
                    self._empty.append(page)

    def keep(self, pages: Iterable[int]) -> None:
        """Keep the content of these pages when they are released, until `on_evict`."""
        self._cached.update(pages)

    def forget(self, pages: Iterable[int]) -> None:
        """Undo `keep`: those of the pages that are idle become empty."""
        for page in pages:
            self._cached.remove(page)
            if page in self._idle:
                del self._idle[page]
                self._empty.append(page)

    def check_integrity(self, held: Iterable[int]) -> None:
        """Check that each page has the references of `held`, and is empty, idle or held.

        Args:
            held: the pages of all holders; a shared page once for each of them.

        Raises:
            AssertionError: it is not so.
        """
        counts = collections.Counter(held)
        assert self._references == [counts[page] for page in range(self.num_pages)], "references"
        pages = sorted([*self._empty, *self._idle, *counts])
        assert pages == list(range(self.num_pages)), "pages lost or doubled"
        assert set(self._idle) == self._cached - set(counts), "idle pages are the cached ones"


@dataclasses.dataclass(frozen=True)
class KVPages:
    """The pool of one device, and which sequence holds which pages.

    A sequence's rows are numbered from 0; row r lies in page `table[slot, uncond, r // page_size]`.
    With guidance, a request has an unconditional sequence with its own pages.
    """

    #: [layers, pages, page_size, num_kv_heads, head_dim].
    keys: Tensor
    values: Tensor
    #: [slots, 2, pages of the longest sequence] int64, on the host.
    table: Array

    @classmethod
    def allocate(
        cls,
        spec: ModelSpec,
        *,
        num_pages: int,
        page_size: int,
        num_slots: int,
        device: str,
        dtype: torch.dtype,
    ) -> KVPages:
        """Allocate zeros, since rows that were never written are read under a mask."""
        num_kv_heads = spec.num_kv_heads // spec.num_ranks
        shape = (spec.num_layers, num_pages, page_size, num_kv_heads, spec.head_dim)
        longest = -(-spec.max_model_len // page_size)
        return cls(
            torch.zeros(shape, device=device, dtype=dtype),
            torch.zeros(shape, device=device, dtype=dtype),
            np.zeros((num_slots, 2, longest), np.int64),
        )

    @property
    def page_size(self) -> int:
        """Rows per page."""
        return self.keys.shape[2]

    def assign(self, slot: int, pages: list[int], num_sequences: int) -> None:
        """Set the pages of a slot; its sequences take turns in the list, so that it can grow."""
        each = len(pages) // num_sequences
        self.table[slot, :num_sequences, :each] = np.reshape(pages, (each, num_sequences)).T

    def slot_mapping(self, slots: Array, uncond: Array, rows: Array) -> Array:
        """Return the places in the pool of numbered rows of these sequences; all int64 [n]."""
        page = self.table[slots, uncond, rows // self.page_size]
        places: Array = page * self.page_size + rows % self.page_size
        return places
