"""How the sequences of one step lie among its packed rows, and what they read and write.

Sequences of equal shape stand together, so that one batched kernel call takes all of a group.
Which group a sequence falls into depends on itself alone: its numbers never depend on the rest
of the batch.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Selection:
    """Sequences of one shape that store a selection of their keys and values (`sparse`).

    G sequences, B rows of the active block, C candidates; all int64.
    """

    #: [G, B] and [G, C]; packed rows.
    block_rows: Tensor
    candidate_rows: Tensor
    #: [G, keep]; places in the pool that take what is kept, the same for every head.
    places: Tensor
    pool_kernel: int


@dataclasses.dataclass(frozen=True)
class FreshGroup:
    """Refreshing sequences of one length: each attends to its own rows."""

    #: First packed row, number of sequences, rows of each.
    start: int
    count: int
    length: int
    selection: Selection | None = None


@dataclasses.dataclass(frozen=True)
class PagedGroup:
    """Reusing sequences that attend to what lies in their pages, their fresh rows among it.

    G sequences, Q rows each, P pages each.
    """

    #: [G, Q] int64; packed rows. Shorter sequences repeat a row.
    query_rows: Tensor
    #: [n] int64; where among the G × Q the group's n packed rows are, in order; None: all are.
    kept: Tensor | None
    #: Packed rows of the group.
    rows: slice
    #: [G, P] int64.
    pages: Tensor
    #: [G, 1, 1, P × page_size] bool, the rows that are held; None when all are.
    held: Tensor | None


@dataclasses.dataclass(frozen=True)
class PackedLayout:
    """The sequences of a step. Rows behind the last one are padding."""

    #: Rows of all sequences together.
    num_rows: int
    fresh: tuple[FreshGroup, ...]
    paged: tuple[PagedGroup, ...] = ()
    #: [n] int64: packed rows that are stored, and their places in the pool.
    write_rows: Tensor | None = None
    write_places: Tensor | None = None

    @classmethod
    def of(cls, lengths: list[int]) -> PackedLayout:
        """Sequences of these lengths, none of which reads or writes stored keys and values."""
        starts = torch.tensor([0, *lengths]).cumsum(0).tolist()
        groups = (FreshGroup(start, 1, n) for start, n in zip(starts, lengths, strict=False))
        return cls(sum(lengths), tuple(groups))


@dataclasses.dataclass(frozen=True)
class LayerPages:
    """One layer's part of the pool of stored keys and values."""

    #: [pages, page_size, num_kv_heads, head_dim].
    keys: Tensor
    values: Tensor

    def write(self, places: Tensor, keys: Tensor, values: Tensor) -> None:
        """Store [n, num_kv_heads, head_dim] at int64 [n] places."""
        self.keys.flatten(0, 1).index_copy_(0, places, keys)
        self.values.flatten(0, 1).index_copy_(0, places, values)
