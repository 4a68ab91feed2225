"""A matrix product that computes each row the same way for any number of rows."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dllm_engine.ops.kernels.operands import Tile, operand_type, precision

# The same tile for every number of rows: a different tile may sum a row in a different order, as
# libraries do that choose tiles by shape. Operands of float32 are in registers.
_TILES = {4: Tile(64, 128, 32, 8, 3), 2: Tile(64, 128, 64, 4, 3)}


def invariant_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias; a row's result does not depend on the other rows or their number.

    Args:
        x: [rows, in_features].
        weight: [out_features, in_features].
        bias: [out_features].
    """
    x, weight = x.contiguous(), weight.contiguous()
    rows, inner = x.shape
    columns = weight.shape[0]
    tile = _TILES[x.element_size()]
    out = torch.empty(rows, columns, dtype=x.dtype, device=x.device)
    if rows:
        # Rows first: programs that run at the same time share columns of the weight.
        grid = (triton.cdiv(rows, tile.rows), triton.cdiv(columns, tile.columns))
        _linear[grid](
            x,
            weight,
            weight if bias is None else bias,
            out,
            rows,
            columns,
            inner,
            bias is not None,
            tile.rows,
            tile.columns,
            tile.depth,
            operand_type(x.dtype),
            precision(x.dtype),
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
    return out


def add_invariant_linear(residual: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """residual + x @ weight.T, with the same guarantee."""
    return residual + invariant_linear(x, weight)


# One compilation for any number of rows.
@triton.jit(do_not_specialize=["rows"])
def _linear(
    x,
    weight,
    bias,
    out,
    rows,
    columns,
    INNER_SIZE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(0, INNER_SIZE, INNER):
        place = first + tl.arange(0, INNER)
        left = tl.load(
            x + row[:, None] * INNER_SIZE + place[None, :],
            mask=(row < rows)[:, None] & (place < INNER_SIZE)[None, :],
            other=0.0,
        )
        right = tl.load(
            weight + column[:, None] * INNER_SIZE + place[None, :],
            mask=(column < columns)[:, None] & (place < INNER_SIZE)[None, :],
            other=0.0,
        )
        total += tl.dot(left.to(OPERAND), tl.trans(right.to(OPERAND)), input_precision=PRECISION)
    if HAS_BIAS:
        total += tl.load(bias + column, mask=column < columns, other=0.0).to(tl.float32)[None, :]
    tl.store(
        out + row[:, None] * columns + column[None, :],
        total.to(out.dtype.element_ty),
        mask=(row < rows)[:, None] & (column < columns)[None, :],
    )
