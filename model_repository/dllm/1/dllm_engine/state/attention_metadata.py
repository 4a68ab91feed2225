"""Which rows a step is made of, and which stored rows they read and write."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np

from dllm_engine.memory import LEAST_KEPT, CachePolicy, KVPages, Phases
from dllm_engine.ops import (
    Array,
    FlatLayout,
    FlatSelection,
    FreshGroup,
    PackedLayout,
    PagedGroup,
    Selection,
    Upload,
)
from dllm_engine.ops.layout import tiles_of
from dllm_engine.ops.rows import ROW_MULTIPLE
from dllm_engine.state.canvas import CanvasTable
from dllm_engine.state.slots import SlotState

#: Rows of Reuses are grouped by their number rounded up to a multiple of this.
_QUERY_MULTIPLE = 8


@dataclasses.dataclass(frozen=True)
class Sequences:
    """The sequences of a step, in the order of their rows.

    R requests; S sequences, two for a request with guidance; N packed rows. All int64 unless
    said otherwise.
    """

    #: Of the R requests; and [R], the first sequence of each.
    requests: SlotState
    first_copy: Array
    #: Of the S sequences; and [S], 1 for the unconditional sequence.
    state: SlotState
    uncond: Array
    phases: Phases
    #: [S]; the window, how many rows go through the model, and the first of them.
    window_start: Array
    window_end: Array
    num_rows: Array
    query_starts: Array
    #: [S]; stored rows: what `sparse` keeps outside the window, and all that a Reuse attends to.
    keep: Array
    kv_lens: Array
    #: [S, 6]; sequences with equal keys form a group; None: they are not grouped.
    shape: Array | None
    #: [N]; sequence and position of each row.
    owner: Array
    positions: Array
    #: [S]; position of the first row, where all up to the last go through the model.
    _begin: Array
    #: [S, width + 1] int64 and bool; of partial windows the place of each position among their
    #: rows, from the one before the block on; and which windows are partial. None: none is.
    _partial: tuple[Array, Array] | None

    @classmethod
    def of(
        cls, table: CanvasTable, pages: KVPages, state: SlotState, *, grouped: bool
    ) -> Sequences:
        """The sequences of some requests, ordered by shape where they are grouped."""
        phases = table.phases(state)
        start, end = table.window(state)
        num_rows = table.num_rows(state, phases)
        keep, kv_lens = _stored_rows(state, end - start)
        shape = None
        if grouped:
            shape = _shape(pages, state, phases, start, end, num_rows, keep, kv_lens)
            order = np.lexsort(shape.T[::-1])
        else:
            order = np.arange(len(keep))
        requests = state.take(order)
        first_copy = np.arange(len(order))
        uncond = np.zeros_like(first_copy)
        state = requests
        if (requests.cfg_scale > 0).any():
            # Twins stand right behind their sequence, so that equal shapes stay together.
            copies = 1 + (requests.cfg_scale > 0)
            first_copy = copies.cumsum() - copies
            which = np.repeat(np.arange(len(copies)), copies)
            uncond = np.arange(len(which)) - first_copy[which]
            state, order = requests.take(which), order[which]
        phases, start, end = phases.take(order), start[order], end[order]
        num_rows, keep, kv_lens = num_rows[order], keep[order], kv_lens[order]
        shape = None if shape is None else shape[order]
        begin, _ = phases.span(state.length, start, end)
        query_starts = num_rows.cumsum() - num_rows
        owner = np.repeat(np.arange(len(num_rows)), num_rows)
        positions = np.arange(len(owner)) + (begin - query_starts)[owner]
        partial = None
        if (is_partial := phases.partial).any():
            wanted = table.unfinished(state) & is_partial[:, None]
            sequence, column = wanted.nonzero()
            positions[is_partial[owner]] = state.block_start[sequence] - 1 + column
            partial = wanted.cumsum(axis=1) - 1, is_partial
        return cls(
            requests=requests,
            first_copy=first_copy,
            state=state,
            uncond=uncond,
            phases=phases,
            window_start=start,
            window_end=end,
            num_rows=num_rows,
            query_starts=query_starts,
            keep=keep,
            kv_lens=kv_lens,
            shape=shape,
            owner=owner,
            positions=positions,
            _begin=begin,
            _partial=partial,
        )

    def row_of(self, sequence: Array, position: Array) -> Array:
        """Packed row of a position that goes through the model; all [n]."""
        row: Array = position - self._begin[sequence]
        if self._partial is not None:
            places, partial = self._partial
            column = np.clip(
                position - self.state.block_start[sequence] + 1, 0, places.shape[1] - 1
            )
            row = np.where(partial[sequence], places[sequence, column], row)
        packed: Array = self.query_starts[sequence] + row
        return packed

    def stores(self) -> Array:
        """[S] bool; whether the rows that go through the model are stored as they are."""
        return ~self.phases.refresh | (self.phases.store & ~self.phases.selects)

    def slot_mapping(self, pages: KVPages, rows: Array) -> Array:
        """Places in the pool of packed rows that are stored as they are; all [n]."""
        owner, position = self.owner[rows], self.positions[rows]
        # Of a sparse request the window stands behind what is kept, of others all in its place.
        sparse = self.phases.policy == int(CachePolicy.SPARSE)
        moved = np.where(sparse, self.keep - self.window_start, 0)
        return pages.slot_mapping(
            self.state.slots[owner], self.uncond[owner], position + moved[owner]
        )


def _stored_rows(state: SlotState, window: Array) -> tuple[Array, Array]:
    """Rows that `sparse` keeps outside the window (else 0), and all that a Reuse attends to."""
    sparse = state.cache == int(CachePolicy.SPARSE)
    if not sparse.any():
        return np.zeros_like(window), state.length
    candidates = state.length - window
    kept = np.maximum((state.retention_ratio * candidates).astype(np.int64), LEAST_KEPT)
    keep = np.where(sparse, np.minimum(kept, candidates), 0)
    return keep, np.where(sparse, keep + window, state.length)


def _shape(
    pages: KVPages,
    state: SlotState,
    phases: Phases,
    start: Array,
    end: Array,
    num_rows: Array,
    keep: Array,
    kv_lens: Array,
) -> Array:
    """[R, 6] int64; what must be equal for two sequences to share a kernel call.

    Of a Refresh: 0, length and, where it selects, block, window, kept rows and pooling. Of a
    Reuse: 1, rows rounded up, pages, and whether the last page is full.
    """
    shape = np.zeros((len(keep), 6), np.int64)
    shape[:, 0] = ~phases.refresh
    shape[:, 1] = np.where(
        phases.refresh, state.length, -(-num_rows // _QUERY_MULTIPLE) * _QUERY_MULTIPLE
    )
    selects = phases.selects
    if selects.any():
        selecting = [end - state.block_start, end - start, keep, state.pool_kernel]
        shape[:, 2:] = np.where(selects, selecting, 0).T
    shape[:, 2] = np.where(phases.refresh, shape[:, 2], -(-kv_lens // pages.page_size))
    shape[:, 3] = np.where(phases.refresh, shape[:, 3], kv_lens % pages.page_size == 0)
    return shape


def flat_layout(pages: KVPages, sequences: Sequences, block_m: int, upload: Upload) -> FlatLayout:
    """One entry per sequence and tile."""
    phases, state = sequences.phases, sequences.state
    longest, num_rows = int(state.length.max()), len(sequences.owner)
    num_pages = -(-longest // pages.page_size)
    places = np.full(num_rows + -num_rows % ROW_MULTIPLE, -1)
    stored = sequences.stores()[sequences.owner].nonzero()[0]
    places[stored] = sequences.slot_mapping(pages, stored)
    tile_sequence, tile_row = tiles_of(sequences.num_rows, num_rows, block_m)
    selection = None
    if phases.selects.any():
        selection = FlatSelection(
            keep=upload(np.where(phases.selects, sequences.keep, 0)),
            block_start=upload(state.block_start),
            window_start=upload(sequences.window_start),
            window_end=upload(sequences.window_end),
            pool_kernel=upload(state.pool_kernel),
            max_candidates=longest,
        )
    return FlatLayout(
        block_m=block_m,
        query_starts=upload(sequences.query_starts),
        query_lens=upload(sequences.num_rows),
        kv_lens=upload(np.where(phases.refresh, 0, sequences.kv_lens)),
        block_tables=upload(pages.table[state.slots, sequences.uncond, :num_pages]),
        tile_sequence=upload(tile_sequence),
        tile_row=upload(tile_row),
        slot_mapping=upload(places),
        selection=selection,
    )


def grouped_layout(pages: KVPages, sequences: Sequences, upload: Upload) -> PackedLayout:
    """Group the sequences by shape and say where each row is stored."""
    assert sequences.shape is not None
    differs = (sequences.shape[1:] != sequences.shape[:-1]).any(axis=1)
    bounds = [0, *(differs.nonzero()[0] + 1).tolist(), len(sequences.shape)]
    fresh, paged = [], []
    for first, end in itertools.pairwise(bounds):
        members = slice(first, end)
        reuse, *shape = sequences.shape[first].tolist()
        if reuse:
            paged.append(_paged_group(pages, sequences, members, shape, upload))
        else:
            row = int(sequences.query_starts[first])
            select = shape[3] > 0
            selection = _selection(pages, sequences, members, shape, upload) if select else None
            fresh.append(FreshGroup(row, end - first, shape[0], selection))
    layout = PackedLayout(len(sequences.owner), tuple(fresh), tuple(paged))
    stored = sequences.stores()[sequences.owner].nonzero()[0]
    if not len(stored):
        return layout
    places = sequences.slot_mapping(pages, stored)
    return dataclasses.replace(layout, write_rows=upload(stored), slot_mapping=upload(places))


def _paged_group(
    pages: KVPages, sequences: Sequences, members: slice, shape: list[int], upload: Upload
) -> PagedGroup:
    width, num_pages, full = shape[:3]
    columns = np.arange(width)
    first, num_rows = sequences.query_starts[members, None], sequences.num_rows[members, None]
    kv_mask = None
    if not full:
        places = np.arange(num_pages * pages.page_size)
        kv_mask = upload((places < sequences.kv_lens[members, None])[:, None, None, :])
    return PagedGroup(
        query_rows=upload(first + np.minimum(columns, num_rows - 1)),
        out_rows=upload(np.where(columns < num_rows, first + columns, len(sequences.owner))),
        pages=upload(
            pages.table[sequences.state.slots[members], sequences.uncond[members], :num_pages]
        ),
        kv_mask=kv_mask,
    )


def _selection(
    pages: KVPages, sequences: Sequences, members: slice, shape: list[int], upload: Upload
) -> Selection:
    length, block, window, keep, pool_kernel = shape
    start, end = sequences.window_start[members, None], sequences.window_end[members, None]
    columns = np.arange(length - window)
    candidates = np.where(columns < start, columns, columns + window)
    first = sequences.query_starts[members, None]
    slots, uncond = sequences.state.slots[members, None], sequences.uncond[members, None]
    return Selection(
        block_rows=upload(first + end - block + np.arange(block)),
        candidate_rows=upload(first + candidates),
        slot_mapping=upload(pages.slot_mapping(slots, uncond, np.arange(keep)[None])),
        pool_kernel=pool_kernel,
    )
