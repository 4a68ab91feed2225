"""Attention over packed sequences of any lengths, to fresh and stored rows, in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dllm_engine.ops.kernels.operands import Tile, operand_type, precision
from dllm_engine.ops.kernels.selection import store_selection
from dllm_engine.ops.layout import FlatLayout, LayerPages

#: By bytes of a number. The rows of a tile are rows times query heads that share a KV head; its
#: columns are keys. float32 is multiplied without tensor cores, with its operands in registers:
#: larger tiles spill.
_TILES = {4: Tile(32, 32, 0, 8, 2), 2: Tile(64, 64, 0, 4, 2)}

#: Arguments that vary with the batch. Triton must not compile variants for their alignment or size.
_BY_BATCH = [
    "tile_sequence",
    "tile_row",
    "query_starts",
    "query_lens",
    "kv_lens",
    "block_tables",
    "key_limits",
    "num_sequences",
    "table_stride",
]
#: Numbers of keys, and of values, that one program stores.
_STORE_NUMBERS = 2048


def program_lanes(dtype: torch.dtype) -> int:
    """Rows times query heads that share a KV head, in one program (a tile)."""
    return _TILES[dtype.itemsize].rows


def packed_attention(
    q: Tensor, k: Tensor, v: Tensor, layout: FlatLayout, pages: LayerPages | None = None
) -> Tensor:
    """See `ops.attention.packed_attention`."""
    rows, num_heads, head_dim = q.shape
    num_kv_heads = k.shape[1]
    out = torch.zeros(rows, num_heads, head_dim, dtype=q.dtype, device=q.device)
    if pages is not None and layout.slot_mapping is not None:
        _store_rows(k, v, layout, pages)
    # Without pages no row is stored, and the kernel never follows these pointers.
    keys, values = (k, v) if pages is None else (pages.keys, pages.values)
    limits = layout.key_limits
    tile = _TILES[q.element_size()]
    group = num_heads // num_kv_heads
    padded = triton.next_power_of_2(group)
    _attend[(len(layout.tile_sequence), num_kv_heads)](
        q,
        k,
        v,
        out,
        keys,
        values,
        layout.tile_sequence,
        layout.tile_row,
        layout.query_starts,
        layout.query_lens,
        layout.kv_lens,
        layout.block_tables,
        layout.query_starts if limits is None else limits,
        len(layout.query_starts),
        layout.block_tables.stride(0),
        q.stride(0),
        k.stride(0),
        v.stride(0),
        head_dim**-0.5,
        num_kv_heads,
        group,
        padded,
        head_dim,
        max(16, triton.next_power_of_2(head_dim)),
        # A tile of the tensor cores has at least 16 rows.
        max(layout.block_m, 16 // padded),
        layout.block_m,
        tile.columns,
        1 if pages is None else pages.keys.shape[1],
        operand_type(q.dtype),
        precision(q.dtype),
        limits is not None,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    if layout.selection is not None:
        assert pages is not None
        store_selection(q, k, v, layout, pages)
    return out.flatten(1)


@triton.jit
def _fold(
    query,
    keys,
    values,
    there,
    scale,
    row_max,
    row_sum,
    mixed,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add a block of keys and values to the online softmax.

    `there` is [1, keys] or [rows, keys]: which keys exist, or which keys each row sees.
    """
    product = tl.dot(query, tl.trans(keys.to(OPERAND)), input_precision=PRECISION)
    scores = tl.where(there, product * scale, float("-inf"))
    highest = tl.maximum(row_max, tl.max(scores, axis=1))
    weight = tl.exp(scores - highest[:, None])
    rescale = tl.exp(row_max - highest)
    mixed = mixed * rescale[:, None] + tl.dot(
        weight.to(values.dtype).to(OPERAND), values.to(OPERAND), input_precision=PRECISION
    )
    return highest, row_sum * rescale + tl.sum(weight, axis=1), mixed


@triton.jit(do_not_specialize=_BY_BATCH)
def _attend(
    q,
    k,
    v,
    out,
    page_keys,
    page_values,
    tile_sequence,
    tile_row,
    query_starts,
    query_lens,
    kv_lens,
    block_tables,
    key_limits,
    num_sequences,
    table_stride,
    q_stride,
    k_stride,
    v_stride,
    scale,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    ROW_BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    LIMITED: tl.constexpr,
):
    # A program takes some rows of one sequence and all query heads that share a KV head, so that
    # keys and values are loaded once for them. Online softmax (Milakov & Gimelshein 2018) over
    # blocks of keys, as in FlashAttention (Dao et al. 2022).
    tile = tl.program_id(0)
    kv_head = tl.program_id(1)
    sequence = tl.load(tile_sequence + tile)
    if sequence < num_sequences:
        start = tl.load(query_starts + sequence)
        count = tl.load(query_lens + sequence)
        stored = tl.load(kv_lens + sequence)
        lane = tl.arange(0, ROW_BLOCK * GROUP_BLOCK)
        step = lane // GROUP_BLOCK
        row = tl.load(tile_row + tile) + step
        head = lane % GROUP_BLOCK
        live = (step < BLOCK_M) & (row < count) & (head < GROUP)
        d = tl.arange(0, DIM_BLOCK)
        inside = d < HEAD_DIM
        query_place = (kv_head * GROUP + head) * HEAD_DIM
        query = tl.load(
            q + ((start + row) * q_stride + query_place)[:, None] + d[None, :],
            mask=live[:, None] & inside[None, :],
            other=0.0,
        ).to(OPERAND)
        fresh = tl.where(stored > 0, 0, count)
        if LIMITED:
            # Every limit is at least 1, so a row's first keys always hold one that it sees. Keys
            # behind the tile's largest limit are not read.
            limit = tl.load(key_limits + start + row, mask=live, other=1)
            stored = tl.minimum(stored, tl.max(limit, axis=0))
            fresh = tl.minimum(fresh, tl.max(limit, axis=0))
        row_max = tl.full([ROW_BLOCK * GROUP_BLOCK], float("-inf"), tl.float32)
        row_sum = tl.zeros([ROW_BLOCK * GROUP_BLOCK], tl.float32)
        mixed = tl.zeros([ROW_BLOCK * GROUP_BLOCK, DIM_BLOCK], tl.float32)
        # One loop for stored and one for fresh keys, since conditional loads are not pipelined. One
        # of them has no iterations.
        for first in range(0, stored, KEY_BLOCK):
            n = first + tl.arange(0, KEY_BLOCK)
            there = n < stored
            both = there[:, None] & inside[None, :]
            page = tl.load(
                block_tables + sequence * table_stride + n // PAGE_SIZE, mask=there, other=0
            )
            place = ((page * PAGE_SIZE + n % PAGE_SIZE) * KV_HEADS + kv_head) * HEAD_DIM
            keys = tl.load(page_keys + place[:, None] + d[None, :], mask=both, other=0.0)
            values = tl.load(page_values + place[:, None] + d[None, :], mask=both, other=0.0)
            seen = there[None, :]
            if LIMITED:
                seen = seen & (n[None, :] < limit[:, None])
            row_max, row_sum, mixed = _fold(
                query, keys, values, seen, scale, row_max, row_sum, mixed, OPERAND, PRECISION
            )
        for first in range(0, fresh, KEY_BLOCK):
            n = first + tl.arange(0, KEY_BLOCK)
            there = n < fresh
            both = there[:, None] & inside[None, :]
            key_place = (start + n) * k_stride + kv_head * HEAD_DIM
            value_place = (start + n) * v_stride + kv_head * HEAD_DIM
            keys = tl.load(k + key_place[:, None] + d[None, :], mask=both, other=0.0)
            values = tl.load(v + value_place[:, None] + d[None, :], mask=both, other=0.0)
            seen = there[None, :]
            if LIMITED:
                seen = seen & (n[None, :] < limit[:, None])
            row_max, row_sum, mixed = _fold(
                query, keys, values, seen, scale, row_max, row_sum, mixed, OPERAND, PRECISION
            )
        out_place = (start + row) * (KV_HEADS * GROUP * HEAD_DIM) + query_place
        tl.store(
            out + out_place[:, None] + d[None, :],
            (mixed / row_sum[:, None]).to(out.dtype.element_ty),
            mask=live[:, None] & inside[None, :],
        )


@triton.jit(do_not_specialize=["places", "rows"])
def _store(
    k,
    v,
    page_keys,
    page_values,
    places,
    rows,
    k_stride,
    v_stride,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    place = tl.load(places + row, mask=row < rows, other=-1)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    there = (place >= 0) & (column < WIDTH)
    key = tl.load(k + row[:, None] * k_stride + column, mask=there)
    value = tl.load(v + row[:, None] * v_stride + column, mask=there)
    tl.store(page_keys + place * WIDTH + column, key, mask=there)
    tl.store(page_values + place * WIDTH + column, value, mask=there)


def _store_rows(k: Tensor, v: Tensor, layout: FlatLayout, pages: LayerPages) -> None:
    rows, width = k.shape[0], k.shape[1] * k.shape[2]
    columns = triton.next_power_of_2(width)
    per_program = max(1, _STORE_NUMBERS // columns)
    _store[(triton.cdiv(rows, per_program),)](
        k,
        v,
        pages.keys,
        pages.values,
        layout.slot_mapping,
        rows,
        k.stride(0),
        v.stride(0),
        width,
        columns,
        per_program,
    )
