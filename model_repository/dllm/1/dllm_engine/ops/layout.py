"""Attention metadata of one step: where its sequences lie and what they read and write.

There are two forms. In a `PackedLayout`, sequences of equal shape form a group, and one batched
call of torch computes a whole group. The group of a sequence depends on that sequence alone, so
its numbers never depend on the rest of the batch. A `FlatLayout` holds tensors with one entry per
sequence or tile, for kernels that take sequences of any shape in one launch.
"""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import torch
from torch import Tensor

from dllm_engine.ops.transfer import Array


@dataclasses.dataclass(frozen=True)
class Selection:
    """Sequences of one shape that store a selection of their keys and values (`sparse`).

    G sequences, B rows of the active block, C candidates; all int64.
    """

    #: [G, B] and [G, C]; packed rows.
    block_rows: Tensor
    candidate_rows: Tensor
    #: [G, keep]; rows of the pool that store the kept positions, the same for every head.
    slot_mapping: Tensor
    pool_kernel: int


@dataclasses.dataclass(frozen=True)
class FreshGroup:
    """Sequences of one length in a Refresh: each attends to its own rows."""

    #: First packed row, number of sequences, rows of each.
    start: int
    count: int
    length: int
    selection: Selection | None = None
    #: [G, 1, length, length] bool; the keys that each row sees; None: all.
    mask: Tensor | None = None


@dataclasses.dataclass(frozen=True)
class PagedGroup:
    """Sequences in a Reuse: each attends to its pages, which include its fresh rows.

    G sequences with Q rows and P pages each.
    """

    #: [G, Q] int64; packed rows. Shorter sequences repeat a row.
    query_rows: Tensor
    #: [G, Q] int64; rows of the output. A repeated row writes behind the step's last row, where
    #: nothing is read.
    out_rows: Tensor
    #: [G, P] int64.
    pages: Tensor
    #: [G, 1, Q, P × page_size] bool; the stored rows that each row sees; one row of the mask stands
    #: for all if they see the same; None: all rows see all.
    kv_mask: Tensor | None

    @classmethod
    def of(cls, count: int, width: int, num_pages: int, device: str) -> PagedGroup:
        """`count` sequences that share their `width` rows and read page 0 `num_pages` times."""
        rows = torch.arange(width, device=device).expand(count, -1)
        return cls(rows, rows, pages=rows.new_zeros(count, num_pages), kv_mask=None)


@dataclasses.dataclass(frozen=True)
class PackedLayout:
    """The sequences of a step. Rows behind the last one are padding."""

    #: Rows of all sequences together.
    num_rows: int
    fresh: tuple[FreshGroup, ...]
    paged: tuple[PagedGroup, ...] = ()
    #: [n] int64: packed rows to store, and the rows of the pool that store them.
    write_rows: Tensor | None = None
    slot_mapping: Tensor | None = None

    @classmethod
    def of(cls, lengths: list[int]) -> PackedLayout:
        """Sequences of these lengths, none of which reads or writes stored keys and values."""
        groups, start = [], 0
        for length, equal in itertools.groupby(lengths):
            groups.append(FreshGroup(start, len(list(equal)), length))
            start += groups[-1].count * length
        return cls(start, tuple(groups))


@dataclasses.dataclass(frozen=True)
class FlatSelection:
    """The sequences that store a selection of their keys and values (`sparse`).

    All [S] int64. If a sequence's `keep` is 0, its other entries mean nothing.
    """

    #: Positions outside the window that each head keeps.
    keep: Tensor
    #: Positions: first of the active block, first of its window, and the end of both.
    block_start: Tensor
    window_start: Tensor
    window_end: Tensor
    pool_kernel: Tensor
    #: An upper bound on the candidates of a sequence.
    max_candidates: int


@dataclasses.dataclass(frozen=True)
class FlatLayout:
    """The sequences of a step; S sequences, T tiles of up to `block_m` rows; all int64.

    Rows behind the last sequence are padding. A sequence without rows takes no part.
    """

    block_m: int
    #: [S]; first packed row and number of rows.
    query_starts: Tensor
    query_lens: Tensor
    #: [S]; rows in its pages that a sequence attends to, including its fresh rows; 0: it attends
    #: to its fresh rows alone.
    kv_lens: Tensor
    #: [S, pages of the longest sequence].
    block_tables: Tensor
    #: [T]; sequence of each tile (S behind the last tile), and its first row in the sequence.
    tile_sequence: Tensor
    tile_row: Tensor
    #: [rows]; row of the pool that stores each packed row, or −1; None: no row is stored.
    slot_mapping: Tensor | None = None
    selection: FlatSelection | None = None
    #: [rows]; how many of its sequence's keys each packed row sees, at least 1; None: all.
    key_limits: Tensor | None = None

    @classmethod
    def of(cls, lengths: list[int], block_m: int, device: str) -> FlatLayout:
        """Sequences of these lengths, none of which reads or writes stored keys and values."""
        counts = np.array(lengths, np.int64)

        def on_device(values: Array) -> Tensor:
            return torch.from_numpy(values).to(device)

        tile_sequence, tile_row = tiles_of(counts, sum(lengths), block_m)
        return cls(
            block_m=block_m,
            query_starts=on_device(counts.cumsum() - counts),
            query_lens=on_device(counts),
            kv_lens=on_device(np.zeros_like(counts)),
            block_tables=on_device(np.zeros((len(lengths), 1), np.int64)),
            tile_sequence=on_device(tile_sequence),
            tile_row=on_device(tile_row),
        )


Layout = PackedLayout | FlatLayout


def tiles_of(query_lens: Array, num_rows: int, block_m: int) -> tuple[Array, Array]:
    """Divide sequences of [S] `query_lens`, `num_rows` in all, into tiles of `block_m` rows.

    Returns:
        [T] sequence of each tile and [T] its first row in the sequence. T is the most tiles that
        so many rows can need, so that a launch depends on less; surplus tiles have sequence S.
    """
    counts = -(-query_lens // block_m)
    ends = counts.cumsum()
    tiles = np.arange(num_rows // block_m + len(query_lens))
    sequence = np.searchsorted(ends, tiles, side="right")
    before = (ends - counts)[np.minimum(sequence, len(query_lens) - 1)]
    return sequence, (tiles - before) * block_m


@dataclasses.dataclass(frozen=True)
class LayerPages:
    """One layer's part of the pool of stored keys and values."""

    #: [pages, page_size, num_kv_heads, head_dim].
    keys: Tensor
    values: Tensor

    def write(self, slot_mapping: Tensor, keys: Tensor, values: Tensor) -> None:
        """Store [n, num_kv_heads, head_dim] at int64 [n] rows of the pool."""
        self.keys.flatten(0, 1).index_copy_(0, slot_mapping, keys)
        self.values.flatten(0, 1).index_copy_(0, slot_mapping, values)
