"""RMSNorm and rotary embedding, each in one pass over its rows."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _rms_norm(x, weight, out, eps, DIM: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    there = column < DIM
    wide = tl.load(x + row * DIM + column, mask=there, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, axis=0) / DIM + eps)
    # Rounded before the weight, as Llama does.
    normed = (wide * scale).to(out.dtype.element_ty).to(tl.float32)
    gain = tl.load(weight + column, mask=there, other=0.0).to(tl.float32)
    tl.store(out + row * DIM + column, (normed * gain).to(out.dtype.element_ty), mask=there)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `ops.norm.rms_norm`."""
    x = x.contiguous()
    out = torch.empty_like(x)
    rows, dim = x.shape
    if rows:
        _rms_norm[(rows,)](x, weight, out, eps, dim, triton.next_power_of_2(dim))
    return out


@triton.jit
def _rotary(
    x,
    cos,
    sin,
    row_stride,
    HEADS: tl.constexpr,
    HEADS_BLOCK: tl.constexpr,
    HALF: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, HEADS_BLOCK)[:, None]
    column = tl.arange(0, HALF_BLOCK)[None, :]
    there = (head < HEADS) & (column < HALF)
    place = x + row * row_stride + head * (2 * HALF) + column
    left = tl.load(place, mask=there, other=0.0).to(tl.float32)
    right = tl.load(place + HALF, mask=there, other=0.0).to(tl.float32)
    angle = row * (2 * HALF) + column
    inside = column < HALF
    # The table's sines carry the sign: of the left half it is negative.
    cos_left = tl.load(cos + angle, mask=inside, other=0.0).to(tl.float32)
    sin_left = tl.load(sin + angle, mask=inside, other=0.0).to(tl.float32)
    cos_right = tl.load(cos + angle + HALF, mask=inside, other=0.0).to(tl.float32)
    sin_right = tl.load(sin + angle + HALF, mask=inside, other=0.0).to(tl.float32)
    tl.store(place, (left * cos_left + right * sin_left).to(x.dtype.element_ty), mask=there)
    tl.store(
        place + HALF, (right * cos_right + left * sin_right).to(x.dtype.element_ty), mask=there
    )


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """See `ops.rotary.apply_rotary`; rotates `x` where it lies."""
    rows, heads, head_dim = x.shape
    assert x.stride()[1:] == (head_dim, 1)
    if rows:
        half = head_dim // 2
        _rotary[(rows,)](
            x,
            cos,
            sin,
            x.stride(0),
            heads,
            triton.next_power_of_2(heads),
            half,
            triton.next_power_of_2(half),
        )
    return x
