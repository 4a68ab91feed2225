"""Head-centric selection, and writing the kept keys and values to their pages."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dllm_engine.ops.kernels.operands import operand_type, precision
from dllm_engine.ops.layout import FlatLayout, FlatSelection, LayerPages

#: Bytes of a number to rows and candidates multiplied at once, and warps. Operands of float32 are
#: in registers.
_SCORED = {4: (16, 8), 2: (32, 4)}
#: Candidates that one program moves at once.
_MOVED = 32
#: `_keep` is compiled for numbers of candidates that are powers of two, starting with this.
_LEAST_CANDIDATES = 1024
#: Candidates per warp of `_keep`, limited by registers.
_WARP_CANDIDATES = 512
#: Arguments that vary with the batch. Triton must not compile variants for their alignment or size.
_BY_SEQUENCE = [
    "query_starts",
    "query_lens",
    "block_tables",
    "keep",
    "block_start",
    "window_start",
    "window_end",
    "pool_kernel",
    "max_candidates",
    "table_stride",
]


def candidate_sizes(longest: int) -> list[int]:
    """Numbers of candidates to compile `_keep` for, for sequences of up to `longest`."""
    sizes = [_LEAST_CANDIDATES]
    while sizes[-1] < longest:
        sizes.append(2 * sizes[-1])
    return sizes


def store_selection(q: Tensor, k: Tensor, v: Tensor, layout: FlatLayout, pages: LayerPages) -> None:
    """Select and store densely, as `ops.selection.store_selection` does.

    Only sequences with `keep` above 0 take part; all their rows are packed, in order.
    """
    selection = layout.selection
    assert selection is not None
    scores = score_positions(q, k, layout, selection)
    store_best(scores, k, v, layout, selection, pages)


def score_positions(q: Tensor, k: Tensor, layout: FlatLayout, selection: FlatSelection) -> Tensor:
    """Scores before pooling: float32 [S, num_kv_heads, max_candidates], undefined behind each
    sequence's last candidate."""
    num_heads, head_dim = q.shape[1:]
    num_kv_heads = k.shape[1]
    sequences = len(layout.query_starts)
    shape = (sequences, num_kv_heads, selection.max_candidates)
    scores = torch.empty(shape, dtype=torch.float32, device=q.device)
    block, warps = _SCORED[q.element_size()]
    blocks = triton.cdiv(selection.max_candidates, block)
    _score[(blocks, sequences, num_kv_heads)](
        q,
        k,
        scores,
        layout.query_starts,
        layout.query_lens,
        selection.keep,
        selection.block_start,
        selection.window_start,
        selection.window_end,
        q.stride(0),
        k.stride(0),
        selection.max_candidates,
        head_dim**-0.5,
        num_kv_heads,
        num_heads // num_kv_heads,
        head_dim,
        max(16, triton.next_power_of_2(head_dim)),
        block,
        operand_type(q.dtype),
        precision(q.dtype),
        num_warps=warps,
    )
    return scores


@triton.jit(do_not_specialize=_BY_SEQUENCE)
def _score(
    q,
    k,
    scores,
    query_starts,
    query_lens,
    keep,
    block_start,
    window_start,
    window_end,
    q_stride,
    k_stride,
    max_candidates,
    scale,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    block = tl.program_id(0)
    sequence = tl.program_id(1).to(tl.int64)
    kv_head = tl.program_id(2)
    begin = tl.load(window_start + sequence)
    end = tl.load(window_end + sequence)
    candidates = tl.load(query_lens + sequence) - (end - begin)
    if (tl.load(keep + sequence) > 0) & (block * BLOCK < candidates):
        start = tl.load(query_starts + sequence)
        c = block * BLOCK + tl.arange(0, BLOCK)
        there = c < candidates
        position = tl.where(c < begin, c, c + end - begin)
        d = tl.arange(0, DIM_BLOCK)
        inside = d < HEAD_DIM
        key_place = (start + position) * k_stride + kv_head * HEAD_DIM
        keys = tl.load(
            k + key_place[:, None] + d[None, :],
            mask=there[:, None] & inside[None, :],
            other=0.0,
        ).to(OPERAND)
        best = tl.full([BLOCK], float("-inf"), tl.float32)
        for shared in range(GROUP):
            # log Σ exp over the active block's rows, some at a time.
            max_logit = tl.full([BLOCK], float("-inf"), tl.float32)
            sum_exp = tl.zeros([BLOCK], tl.float32)
            for first in range(tl.load(block_start + sequence), end, BLOCK):
                row = first + tl.arange(0, BLOCK)
                asks = row < end
                query_place = (start + row) * q_stride + (kv_head * GROUP + shared) * HEAD_DIM
                query = tl.load(
                    q + query_place[:, None] + d[None, :],
                    mask=asks[:, None] & inside[None, :],
                    other=0.0,
                ).to(OPERAND)
                product = tl.dot(query, tl.trans(keys), input_precision=PRECISION) * scale
                product = tl.where(asks[:, None], product, float("-inf"))
                highest = tl.maximum(max_logit, tl.max(product, axis=0))
                sum_exp = sum_exp * tl.exp(max_logit - highest)
                sum_exp += tl.sum(tl.exp(product - highest[None, :]), axis=0)
                max_logit = highest
            best = tl.maximum(best, max_logit + tl.log(sum_exp))
        place = (sequence * KV_HEADS + kv_head) * max_candidates + c
        tl.store(scores + place, best, mask=there)


def store_best(
    scores: Tensor,
    k: Tensor,
    v: Tensor,
    layout: FlatLayout,
    selection: FlatSelection,
    pages: LayerPages,
) -> None:
    """Pool the scores, keep the best, and write their keys and values, in one launch."""
    sequences, num_kv_heads, max_candidates = scores.shape
    head_dim = k.shape[2]
    size = candidate_sizes(max_candidates)[-1]
    order = torch.empty(scores.shape, dtype=torch.int32, device=scores.device)
    _keep[(sequences, num_kv_heads)](
        scores,
        order,
        k,
        v,
        pages.keys,
        pages.values,
        layout.query_starts,
        layout.query_lens,
        layout.block_tables,
        selection.keep,
        selection.window_start,
        selection.window_end,
        selection.pool_kernel,
        k.stride(0),
        v.stride(0),
        layout.block_tables.stride(0),
        max_candidates,
        num_kv_heads,
        head_dim,
        triton.next_power_of_2(head_dim),
        size,
        _MOVED,
        pages.keys.shape[1],
        num_warps=min(16, max(4, size // _WARP_CANDIDATES)),
    )


@triton.jit(do_not_specialize=_BY_SEQUENCE)
def _keep(
    scores,
    order,
    k,
    v,
    page_keys,
    page_values,
    query_starts,
    query_lens,
    block_tables,
    keep,
    window_start,
    window_end,
    pool_kernel,
    k_stride,
    v_stride,
    table_stride,
    max_candidates,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    CANDIDATES: tl.constexpr,
    BLOCK: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
):
    sequence = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    kept = tl.load(keep + sequence)
    if kept > 0:
        begin = tl.load(window_start + sequence)
        window = tl.load(window_end + sequence) - begin
        candidates = tl.load(query_lens + sequence) - window
        mine = (sequence * KV_HEADS + kv_head) * max_candidates
        c = tl.arange(0, CANDIDATES)
        there = c < candidates
        reach = tl.load(pool_kernel + sequence) // 2
        pooled = tl.full([CANDIDATES], float("-inf"), tl.float32)
        for shift in range(-reach, reach + 1):
            neighbour = c + shift
            exists = there & (neighbour >= 0) & (neighbour < candidates)
            score = tl.load(scores + mine + neighbour, mask=exists, other=float("-inf"))
            pooled = tl.maximum(pooled, score)
        # Integers in the order of the scores; adding 0 turns −0 into 0.
        bits = (pooled + 0.0).to(tl.int32, bitcast=True)
        rank = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)
        rank = tl.where(there, rank, -(2**31))
        # The least kept score: the largest bound that `kept` candidates reach.
        low = tl.full([], -(2**31), tl.int64)
        high = tl.full([], 2**31, tl.int64)
        for _ in range(32):
            middle = (low + high) // 2
            enough = tl.sum((there & (rank >= middle)).to(tl.int32), axis=0) >= kept
            low = tl.where(enough, middle, low)
            high = tl.where(enough, high, middle)
        above = there & (rank > low)
        equal = there & (rank == low)
        missing = kept - tl.sum(above.to(tl.int32), axis=0)
        chosen = above | (equal & (tl.cumsum(equal.to(tl.int32), axis=0) <= missing))
        place_kept = tl.cumsum(chosen.to(tl.int32), axis=0) - 1
        tl.store(order + mine + c, tl.where(chosen, place_kept, -1), mask=there)
        # Other threads of this program read what these wrote.
        tl.debug_barrier()
        start = tl.load(query_starts + sequence)
        d = tl.arange(0, DIM_BLOCK)
        inside = d < HEAD_DIM
        for first in range(0, candidates, BLOCK):
            n = first + tl.arange(0, BLOCK)
            exists = n < candidates
            target = tl.load(order + mine + n, mask=exists, other=-1)
            stays = target >= 0
            position = tl.where(n < begin, n, n + window)
            page = tl.load(
                block_tables + sequence * table_stride + target // PAGE_SIZE, mask=stays, other=0
            )
            to = ((page * PAGE_SIZE + target % PAGE_SIZE) * KV_HEADS + kv_head) * HEAD_DIM
            both = stays[:, None] & inside[None, :]
            key_place = (start + position) * k_stride + kv_head * HEAD_DIM
            key = tl.load(k + key_place[:, None] + d[None, :], mask=both)
            tl.store(page_keys + to[:, None] + d[None, :], key, mask=both)
            value_place = (start + position) * v_stride + kv_head * HEAD_DIM
            value = tl.load(v + value_place[:, None] + d[None, :], mask=both)
            tl.store(page_values + to[:, None] + d[None, :], value, mask=both)
