"""The pool of pages for keys and values; a request reserves its pages for its whole life."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from torch import Tensor

from dllm_engine.models.base import ModelSpec
from dllm_engine.ops.transfer import Array


class PageAllocator:
    """Hands out page numbers. Any free page fits any request, so nothing fragments."""

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.num_pages = num_pages
        self.page_size = page_size
        self._free = list(range(num_pages - 1, -1, -1))

    @property
    def num_free(self) -> int:
        """Pages not reserved."""
        return len(self._free)

    @property
    def num_used(self) -> int:
        """Pages reserved by running requests."""
        return self.num_pages - len(self._free)

    def pages_for(self, rows: int) -> int:
        """Count the pages that hold `rows` rows."""
        return -(-rows // self.page_size)

    def reserve(self, count: int) -> list[int]:
        """Take `count` pages; the caller has checked that they are free."""
        assert count <= len(self._free), f"{count} pages asked for, {len(self._free)} free"
        cut = len(self._free) - count
        taken, self._free = self._free[cut:], self._free[:cut]
        return taken

    def release(self, pages: list[int]) -> None:
        """Give pages back."""
        self._free.extend(pages)

    def check_integrity(self, held: list[int]) -> None:
        """Check that every page is free or in `held`, once.

        Raises:
            AssertionError: it is not so.
        """
        assert sorted([*self._free, *held]) == list(range(self.num_pages)), "pages lost or doubled"


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
        """Give a slot its pages, divided evenly between its sequences."""
        each = len(pages) // num_sequences
        self.table[slot, :num_sequences, :each] = np.reshape(pages, (num_sequences, each))

    def slot_mapping(self, slots: Array, uncond: Array, rows: Array) -> Array:
        """Return the places in the pool of numbered rows of these sequences; all int64 [n]."""
        page = self.table[slots, uncond, rows // self.page_size]
        places: Array = page * self.page_size + rows % self.page_size
        return places
