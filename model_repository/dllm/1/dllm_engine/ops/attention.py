"""Bidirectional attention over packed sequences: fresh rows, and rows stored before."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .layout import FreshGroup, LayerPages, PackedLayout, PagedGroup
from .selection import store_selection

#: Keys and values that are gathered at once on a CPU.
_GATHER_BYTES = 2**21


def packed_attention(
    q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout, pages: LayerPages | None = None
) -> Tensor:
    """Softmax attention of every row to every row of its own sequence, stored ones included.

    Args:
        q: [rows, num_heads, head_dim].
        k, v: [rows, num_kv_heads, head_dim]; each serves num_heads / num_kv_heads query heads.
        layout: the sequences; rows behind the last one are padding and come back as zeros.
        pages: stored keys and values; what the layout says is written before it is read.

    Returns:
        [rows, num_heads * head_dim].
    """
    out = torch.empty_like(q)
    out[layout.num_rows :] = 0
    if layout.write_rows is not None and layout.write_places is not None:
        assert pages is not None
        rows = layout.write_rows
        pages.write(layout.write_places, k.index_select(0, rows), v.index_select(0, rows))
    for group in layout.fresh:
        _attend_fresh(out, q, k, v, group)
        if group.selection is not None:
            assert pages is not None
            store_selection(q, k, v, group.selection, pages)
    for paged in layout.paged:
        assert pages is not None
        _attend_paged(out, q, paged, pages)
    return out.flatten(1)


def _attend_fresh(out: Tensor, q: Tensor, k: Tensor, v: Tensor, group: FreshGroup) -> None:
    rows = slice(group.start, group.start + group.count * group.length)
    shape = (group.count, group.length, -1, q.shape[-1])
    mixed = F.scaled_dot_product_attention(
        q[rows].view(shape).transpose(1, 2),
        k[rows].view(shape).transpose(1, 2),
        v[rows].view(shape).transpose(1, 2),
        enable_gqa=q.shape[1] != k.shape[1],
    )
    out[rows].view(shape).copy_(mixed.transpose(1, 2))


def _attend_paged(out: Tensor, q: Tensor, group: PagedGroup, pages: LayerPages) -> None:
    count, num_pages = group.pages.shape
    sequence_bytes = 2 * num_pages * pages.keys[0].nbytes
    # On a CPU a few sequences at a time: what is gathered is still in cache when it is read.
    chunk = max(1, _GATHER_BYTES // sequence_bytes) if q.device.type == "cpu" else count
    parts = []
    for first in range(0, count, chunk):
        some = slice(first, first + chunk)
        # Whole pages and rows are copied by index_select; plain indexing goes number by number.
        mixed = F.scaled_dot_product_attention(
            _take(q, group.query_rows[some]).transpose(1, 2),
            _take(pages.keys, group.pages[some]).flatten(1, 2).transpose(1, 2),
            _take(pages.values, group.pages[some]).flatten(1, 2).transpose(1, 2),
            attn_mask=None if group.held is None else group.held[some],
            enable_gqa=q.shape[1] != pages.keys.shape[2],
        )
        parts.append(mixed.transpose(1, 2).flatten(0, 1))
    rows = torch.cat(parts)
    out[group.rows] = rows if group.kept is None else rows.index_select(0, group.kept)


def _take(source: Tensor, index: Tensor) -> Tensor:
    """source[index], for an index [G, n] into the first dimension."""
    return source.index_select(0, index.flatten()).unflatten(0, index.shape)  # type: ignore[no-untyped-call,no-any-return]
