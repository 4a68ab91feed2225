"""Attention of libraries, to compare with our kernel; see `gpu_kernels`.

torch's own, and FlashInfer if it is installed (the extra `flashinfer`). Their interfaces take only
one kind of sequence per call.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from dllm_engine.ops.layout import LayerPages
from torch import Tensor

from benchmarks.gpu_arithmetic import Sequences

_WORKSPACE_BYTES = 256 * 2**20


def library_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pages: LayerPages,
    block_tables: Tensor,
    groups: Sequence[Sequences],
) -> dict[str, Callable[[], object]]:
    """Calls by name; each prepares itself at its first run."""
    if len(groups) != 1:
        return {}
    (group,) = groups
    found: dict[str, Callable[[], object]] = {}
    if group.kv_len:
        found["scaled_dot_product_attention, keys already gathered"] = _sdpa_stored(
            q, pages, block_tables, group
        )
    else:
        found["scaled_dot_product_attention"] = _sdpa_fresh(q, k, v, group)
        if q.is_cuda and importlib.util.find_spec("torch.nn.attention.varlen"):
            found["varlen_attn"] = _varlen(q, k, v, group)
    if q.is_cuda and importlib.util.find_spec("flashinfer"):
        found["FlashInfer"] = _flashinfer(q, k, v, pages, block_tables, group)
    return found


def _sdpa_fresh(q: Tensor, k: Tensor, v: Tensor, group: Sequences) -> Callable[[], object]:
    def heads_first(x: Tensor) -> Tensor:
        return x.unflatten(0, (group.count, group.rows)).transpose(1, 2)

    return lambda: F.scaled_dot_product_attention(
        heads_first(q), heads_first(k), heads_first(v), enable_gqa=q.shape[1] != k.shape[1]
    )


def _sdpa_stored(
    q: Tensor, pages: LayerPages, block_tables: Tensor, group: Sequences
) -> Callable[[], object]:
    gathered: list[Tensor] = []

    def run() -> object:
        if not gathered:
            for pool in (pages.keys, pages.values):
                gathered.append(pool[block_tables].flatten(1, 2).transpose(1, 2).contiguous())
        queries = q.unflatten(0, (group.count, group.rows)).transpose(1, 2)
        grouped = q.shape[1] != gathered[0].shape[1]
        keys, values = gathered
        return F.scaled_dot_product_attention(queries, keys, values, enable_gqa=grouped)

    return run


def _borders(count: int, length: int, device: torch.device) -> Tensor:
    return torch.arange(0, (count + 1) * length, length, dtype=torch.int32, device=device)


def _varlen(q: Tensor, k: Tensor, v: Tensor, group: Sequences) -> Callable[[], object]:
    from torch.nn.attention.varlen import varlen_attn

    borders, longest = _borders(group.count, group.rows, q.device), group.rows
    lengths = (borders, borders, longest, longest)
    if q.shape[1] != k.shape[1]:
        return lambda: varlen_attn(q, k, v, *lengths, enable_gqa=True)
    return lambda: varlen_attn(q, k, v, *lengths)


def _flashinfer(
    q: Tensor, k: Tensor, v: Tensor, pages: LayerPages, block_tables: Tensor, group: Sequences
) -> Callable[[], object]:
    """FlashInfer plans a step on the host once for all layers; only its run is timed."""
    planned: list[Callable[[], object]] = []

    def run() -> object:
        if not planned:
            planned.append(_plan_flashinfer(q, k, v, pages, block_tables, group))
        return planned[0]()

    return run


def _plan_flashinfer(
    q: Tensor, k: Tensor, v: Tensor, pages: LayerPages, block_tables: Tensor, group: Sequences
) -> Callable[[], object]:
    import flashinfer

    workspace = torch.empty(_WORKSPACE_BYTES, dtype=torch.uint8, device=q.device)
    borders = _borders(group.count, group.rows, q.device)
    sizes = (q.shape[1], k.shape[1], q.shape[2])
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    if not group.kv_len:
        ragged = flashinfer.BatchPrefillWithRaggedKVCacheWrapper(workspace, "NHD")
        ragged.plan(borders, borders, *sizes, causal=False, q_data_type=q.dtype)
        return lambda: ragged.run(q, k, v)
    page_size = pages.keys.shape[1]
    each = group.kv_len // page_size
    paged = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD")
    paged.plan(
        borders,
        _borders(group.count, each, q.device),
        block_tables[:, :each].flatten().to(torch.int32),
        torch.full((group.count,), page_size, dtype=torch.int32, device=q.device),
        *sizes,
        page_size,
        causal=False,
        q_data_type=q.dtype,
    )
    return lambda: paged.run(q, (pages.keys, pages.values))
