"""How the sequences of one step attend: which packed and stored rows they read and write.

The flat form is the layout of record: a feature of attention is added to it. Kernels take it as it
is; `grouped_layout` derives from it the groups of equal shape that torch's operations take.
"""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np

from dllm_engine.memory.cache_policy import CachePolicy
from dllm_engine.memory.kv_cache import KVPages
from dllm_engine.ops.layout import (
    FlatLayout,
    FlatSelection,
    FreshGroup,
    PackedLayout,
    PagedGroup,
    Selection,
    tiles_of,
)
from dllm_engine.ops.rows import ROW_MULTIPLE
from dllm_engine.ops.transfer import Array, Upload
from dllm_engine.state.slots import SlotState
from dllm_engine.state.step_plan import Sequences


@dataclasses.dataclass(frozen=True)
class AttentionMetadata:
    """The flat layout of S sequences with N packed rows, on the host; see `FlatLayout`."""

    #: [S].
    query_starts: Array
    query_lens: Array
    kv_lens: Array
    #: [S, pages of the longest sequence].
    block_tables: Array
    page_size: int
    #: [N, rounded up to `ROW_MULTIPLE`].
    slot_mapping: Array
    #: [S]; positions outside the window that each head keeps; 0: all rows are stored or none.
    keep: Array
    #: Has the windows and the pooling of sequences that keep a selection.
    state: SlotState
    #: [N, rounded up to `ROW_MULTIPLE`]; how many keys of its sequence each row sees; None: all.
    key_limits: Array | None
    #: [S, 6]; equal rows of consecutive sequences form a group; None: they are not ordered.
    shape: Array | None

    @classmethod
    def of(
        cls, sequences: Sequences, pages: KVPages, key_limits: Array | None
    ) -> AttentionMetadata:
        """Say where the planned sequences stand, and how many keys each row sees."""
        state = sequences.state
        num_pages = -(-int(np.maximum(state.kv_lens, state.keep).max()) // pages.page_size)
        if key_limits is not None:
            key_limits = np.pad(key_limits, (0, -len(key_limits) % ROW_MULTIPLE), constant_values=1)
        return cls(
            query_starts=sequences.query_starts,
            query_lens=state.num_rows,
            kv_lens=np.where(state.refresh, 0, state.kv_lens),
            block_tables=pages.table[state.slots, sequences.uncond, :num_pages],
            page_size=pages.page_size,
            slot_mapping=_slot_mapping(sequences, pages),
            keep=np.where(state.selects, state.keep, 0),
            state=state,
            key_limits=key_limits,
            shape=sequences.shape,
        )


def _slot_mapping(sequences: Sequences, pages: KVPages) -> Array:
    """Place in the pool where each packed row is stored, −1 where it is not."""
    num_rows, state = len(sequences.owner), sequences.state
    mapping = np.full(num_rows + -num_rows % ROW_MULTIPLE, -1)
    stores = ~state.refresh | (state.store & ~state.selects)
    rows = stores[sequences.owner].nonzero()[0]
    if len(rows):
        owner = sequences.owner[rows]
        # `sparse` stores the window behind what it keeps; the others store each row in its place.
        sparse = state.cache == int(CachePolicy.SPARSE)
        moved = np.where(sparse, state.keep - state.window_start, 0)
        mapping[rows] = pages.slot_mapping(
            state.slots[owner],
            sequences.uncond[owner],
            sequences.positions[rows] + moved[owner],
        )
    return mapping


def flat_layout(flat: AttentionMetadata, block_m: int, upload: Upload) -> FlatLayout:
    """Send the flat layout to the device, with a tile for every `block_m` rows."""
    num_rows = int(flat.query_lens.sum())
    tile_sequence, tile_row = tiles_of(flat.query_lens, num_rows, block_m)
    selection = None
    if flat.keep.any():
        selection = FlatSelection(
            keep=upload(flat.keep),
            block_start=upload(flat.state.block_start),
            window_start=upload(flat.state.window_start),
            window_end=upload(flat.state.block_end),
            pool_kernel=upload(flat.state.pool_kernel),
            max_candidates=int(flat.query_lens[flat.keep > 0].max()),
        )
    return FlatLayout(
        block_m=block_m,
        query_starts=upload(flat.query_starts),
        query_lens=upload(flat.query_lens),
        kv_lens=upload(flat.kv_lens),
        block_tables=upload(flat.block_tables),
        tile_sequence=upload(tile_sequence),
        tile_row=upload(tile_row),
        slot_mapping=upload(flat.slot_mapping),
        selection=selection,
        key_limits=None if flat.key_limits is None else upload(flat.key_limits),
    )


def grouped_layout(flat: AttentionMetadata, upload: Upload) -> PackedLayout:
    """Derive the groups of equal shape from the flat layout, and send them to the device."""
    assert flat.shape is not None
    differs = (flat.shape[1:] != flat.shape[:-1]).any(axis=1)
    bounds = [0, *(differs.nonzero()[0] + 1).tolist(), len(flat.shape)]
    fresh, paged = [], []
    for first, end in itertools.pairwise(bounds):
        members = slice(first, end)
        reuse, *shape = flat.shape[first].tolist()
        if reuse:
            paged.append(_paged_group(flat, members, shape, upload))
        else:
            row = int(flat.query_starts[first])
            select = shape[3] > 0
            selection = _selection(flat, members, shape, upload) if select else None
            mask = None
            if flat.key_limits is not None:
                rows = flat.query_starts[members, None] + np.arange(shape[0])
                mask = upload(_seen(flat.key_limits[rows], shape[0]))
            fresh.append(FreshGroup(row, end - first, shape[0], selection, mask))
    layout = PackedLayout(int(flat.query_lens.sum()), tuple(fresh), tuple(paged))
    stored = (flat.slot_mapping >= 0).nonzero()[0]
    if not len(stored):
        return layout
    places = flat.slot_mapping[stored]
    return dataclasses.replace(layout, write_rows=upload(stored), slot_mapping=upload(places))


def _paged_group(
    flat: AttentionMetadata, members: slice, shape: list[int], upload: Upload
) -> PagedGroup:
    width, num_pages, full, limited = shape[:4]
    columns = np.arange(width)
    first, num_rows = flat.query_starts[members, None], flat.query_lens[members, None]
    query_rows = first + np.minimum(columns, num_rows - 1)
    kv_mask = None
    if limited:
        assert flat.key_limits is not None
        kv_mask = upload(_seen(flat.key_limits[query_rows], num_pages * flat.page_size))
    elif not full:
        kv_mask = upload(_seen(flat.kv_lens[members, None], num_pages * flat.page_size))
    return PagedGroup(
        query_rows=upload(query_rows),
        out_rows=upload(np.where(columns < num_rows, first + columns, int(flat.query_lens.sum()))),
        pages=upload(flat.block_tables[members, :num_pages]),
        kv_mask=kv_mask,
    )


def _seen(limits: Array, num_keys: int) -> Array:
    """Masks of limits [G, Q]: bool [G, 1, Q, num_keys]."""
    return (np.arange(num_keys) < limits[:, :, None])[:, None]


def _selection(
    flat: AttentionMetadata, members: slice, shape: list[int], upload: Upload
) -> Selection:
    length, block, window, keep, pool_kernel = shape
    start, end = flat.state.window_start[members, None], flat.state.block_end[members, None]
    columns = np.arange(length - window)
    candidates = np.where(columns < start, columns, columns + window)
    first, kept = flat.query_starts[members, None], np.arange(keep)
    pages = flat.block_tables[members][:, kept // flat.page_size]
    return Selection(
        block_rows=upload(first + end - block + np.arange(block)),
        candidate_rows=upload(first + candidates),
        slot_mapping=upload(pages * flat.page_size + kept % flat.page_size),
        pool_kernel=pool_kernel,
    )
