"""Attention over packed sequences, to fresh rows and stored rows."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from dllm_engine.ops.layout import FreshGroup, LayerPages, PackedLayout, PagedGroup
from dllm_engine.ops.selection import store_selection

#: Bytes of stored rows to gather at once, unless one sequence takes more. On a CPU few, so that
#: gathered rows are still in cache when they are read; on a GPU enough to keep it busy. The memory
#: plan reserves them.
GATHER_BYTES = {"cpu": 2**21, "cuda": 2**28}
#: Rows of a prompt's chunk that read each key so often that a copy of the keys by head pays: on a
#: CPU 512 rows take a third less time.
_MANY_ROWS = 64


def packed_attention(
    q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout, pages: LayerPages | None = None
) -> Tensor:
    """Softmax attention of every row to the rows of its own sequence, including stored rows.

    A row sees all of them, or as many as the layout's limit allows it.

    Args:
        q: [rows, num_heads, head_dim].
        k, v: [rows, num_kv_heads, head_dim]; each serves num_heads / num_kv_heads query heads.
        layout: the sequences; rows behind the last sequence are padding and return zeros.
        pages: stored keys and values; the rows that the layout stores are written before any read.

    Returns:
        [rows, num_heads * head_dim].
    """
    out = q.new_empty(
        q.shape[0] + 1, *q.shape[1:]
    )  # the last row takes the results of repeated rows
    if layout.write_rows is not None and layout.slot_mapping is not None:
        assert pages is not None
        rows = layout.write_rows
        pages.write(layout.slot_mapping, k.index_select(0, rows), v.index_select(0, rows))
    for group in layout.fresh:
        _attend_fresh(out, q, k, v, group)
        if group.selection is not None:
            assert pages is not None
            store_selection(q, k, v, group.selection, pages)
    for paged in layout.paged:
        assert pages is not None
        _attend_paged(out, q, paged, pages)
    out[layout.num_rows :] = 0
    return out[:-1].flatten(1)


def _attend_fresh(out: Tensor, q: Tensor, k: Tensor, v: Tensor, group: FreshGroup) -> None:
    rows = slice(group.start, group.start + group.count * group.length)
    shape = (group.count, group.length, -1, q.shape[-1])
    mixed = F.scaled_dot_product_attention(
        q[rows].view(shape).transpose(1, 2),
        k[rows].view(shape).transpose(1, 2),
        v[rows].view(shape).transpose(1, 2),
        attn_mask=group.mask,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    out[rows].view(shape).copy_(mixed.transpose(1, 2))


def _attend_paged(out: Tensor, q: Tensor, group: PagedGroup, pages: LayerPages) -> None:
    at_once = sequences_at_once(q, group, pages)
    for first in range(0, len(group.pages), at_once):
        some = slice(first, first + at_once)
        # index_select copies whole pages and rows; plain indexing copies number by number.
        keys, values = (_take(source, group.pages[some]) for source in (pages.keys, pages.values))
        mask = None if group.kv_mask is None else group.kv_mask[some]
        if mask is not None:
            # What an earlier request left behind the last row may be NaN, which no mask hides.
            exists = mask.any(dim=2).view(*keys.shape[:3], 1, 1)
            absent = ~exists[:, -1]
            keys[:, -1].masked_fill_(absent, 0)
            values[:, -1].masked_fill_(absent, 0)
        keys, values = (x.flatten(1, 2).transpose(1, 2) for x in (keys, values))
        if mask is not None and mask.shape[2] >= _MANY_ROWS:
            keys, values = keys.contiguous(), values.contiguous()
        mixed = F.scaled_dot_product_attention(
            _take(q, group.query_rows[some]).transpose(1, 2),
            keys,
            values,
            attn_mask=mask,
            enable_gqa=q.shape[1] != pages.keys.shape[2],
        )
        out.index_copy_(0, group.out_rows[some].flatten(), mixed.transpose(1, 2).flatten(0, 1))


def sequences_at_once(q: Tensor, group: PagedGroup, pages: LayerPages) -> int:
    """Number of a group's sequences whose stored rows are gathered at once."""
    stored = 2 * group.pages.shape[1] * pages.keys[0].nbytes
    fresh = 2 * group.query_rows.shape[1] * q[0].nbytes  # queries and results
    return max(1, GATHER_BYTES[q.device.type] // (stored + fresh))


def _take(source: Tensor, index: Tensor) -> Tensor:
    """source[index], for an index [G, n] into the first dimension."""
    return source.index_select(0, index.flatten()).unflatten(0, index.shape)  # type: ignore[no-untyped-call,no-any-return]
