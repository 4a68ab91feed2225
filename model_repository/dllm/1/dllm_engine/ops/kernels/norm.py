"""RMSNorm, rotary embedding and the gate of an MLP, each in one pass over its rows."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

#: Numbers per program: enough to keep its threads busy, few enough for its registers.
_NUMBERS = 4096
#: Gated numbers of a row per program; it reads two for each.
_GATED = 2048


# One compilation for any number of rows, here and below.
@triton.jit(do_not_specialize=["rows"])
def _rms_norm(
    x,
    weight,
    out,
    rows,
    row_stride,
    eps,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    # With several heads, `row` counts pairs of a row of `x` and a head.
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    there = (row < rows) & (column < DIM)
    place = x + row // HEADS * row_stride + row % HEADS * DIM + column
    wide = tl.load(place, mask=there, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, axis=1) / DIM + eps)
    # Rounded before multiplying by the weight, as in Llama.
    normed = (wide * scale[:, None]).to(out.dtype.element_ty).to(tl.float32)
    gain = tl.load(weight + row % HEADS * DIM + column, mask=there, other=0.0).to(tl.float32)
    tl.store(out + row * DIM + column, (normed * gain).to(out.dtype.element_ty), mask=there)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `ops.norm.rms_norm`."""
    heads, dim = (1, *x.shape[1:])[-2:]
    if x.stride()[1:] != (dim, 1)[-x.dim() + 1 :]:
        x = x.contiguous()
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows = x.shape[0] * heads
    columns = triton.next_power_of_2(dim)
    per_program = max(1, _NUMBERS // columns)
    if rows:
        grid = (triton.cdiv(rows, per_program),)
        _rms_norm[grid](x, weight, out, rows, x.stride(0), eps, heads, dim, columns, per_program)
    return out


@triton.jit(do_not_specialize=["pairs"])
def _rotary(
    x,
    cos,
    sin,
    pairs,
    row_stride,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    COLUMNS: tl.constexpr,
    PAIRS: tl.constexpr,
):
    # A pair is a row and a head.
    pair = tl.program_id(0).to(tl.int64) * PAIRS + tl.arange(0, PAIRS)[:, None]
    row = pair // HEADS
    column = tl.arange(0, COLUMNS)[None, :]
    there = (pair < pairs) & (column < HALF)
    place = x + row * row_stride + pair % HEADS * (2 * HALF) + column
    left = tl.load(place, mask=there, other=0.0).to(tl.float32)
    right = tl.load(place + HALF, mask=there, other=0.0).to(tl.float32)
    angle = row * (2 * HALF) + column
    # The table's sines carry the sign: negative in the left half.
    cos_left = tl.load(cos + angle, mask=there, other=0.0).to(tl.float32)
    sin_left = tl.load(sin + angle, mask=there, other=0.0).to(tl.float32)
    cos_right = tl.load(cos + angle + HALF, mask=there, other=0.0).to(tl.float32)
    sin_right = tl.load(sin + angle + HALF, mask=there, other=0.0).to(tl.float32)
    turned_left = left * cos_left + right * sin_left
    turned_right = right * cos_right + left * sin_right
    tl.store(place, turned_left.to(x.dtype.element_ty), mask=there)
    tl.store(place + HALF, turned_right.to(x.dtype.element_ty), mask=there)


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """See `ops.rotary.apply_rotary`; rotates `x` in place."""
    rows, heads, head_dim = x.shape
    assert x.stride()[1:] == (head_dim, 1)
    half, pairs = head_dim // 2, rows * heads
    columns = triton.next_power_of_2(half)
    per_program = max(1, _NUMBERS // (4 * columns))
    if rows:
        grid = (triton.cdiv(pairs, per_program),)
        _rotary[grid](x, cos, sin, pairs, x.stride(0), heads, half, columns, per_program)
    return x


@triton.jit(do_not_specialize=["rows"])
def _silu_mul(gate_up, out, rows, DIM: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    there = (row < rows) & (column < DIM)
    place = gate_up + row * (2 * DIM) + column
    gate = tl.load(place, mask=there, other=0.0).to(tl.float32)
    up = tl.load(place + DIM, mask=there, other=0.0).to(tl.float32)
    # Rounded before the product, as torch's two operations do.
    silu = (gate / (1.0 + tl.exp(-gate))).to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + row * DIM + column, (silu * up).to(out.dtype.element_ty), mask=there)


def silu_mul(gate_up: Tensor) -> Tensor:
    """See `ops.linear.silu_mul`."""
    gate_up = gate_up.contiguous()
    rows, dim = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty(rows, dim, dtype=gate_up.dtype, device=gate_up.device)
    columns = min(_GATED, triton.next_power_of_2(dim))
    per_program = _GATED // columns
    if rows:
        grid = (triton.cdiv(rows, per_program), triton.cdiv(dim, columns))
        _silu_mul[grid](gate_up, out, rows, dim, columns, per_program)
    return out
