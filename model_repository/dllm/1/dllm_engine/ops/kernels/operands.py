"""Number types in which the kernels multiply matrices."""

from __future__ import annotations

import os
from typing import NamedTuple

import torch
import triton.language as tl


class Tile(NamedTuple):
    """The tile that one program multiplies, its warps and its loads in flight."""

    rows: int
    columns: int
    depth: int
    warps: int
    #: Loads in flight from memory: the next block loads while one is multiplied.
    stages: int


_NATIVE = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def operand_type(dtype: torch.dtype) -> tl.dtype:
    """The type of a matrix product's operands: the tensors' own type.

    Triton's interpreter multiplies the bit patterns of bfloat16 as if they were integers. Use
    float32 there: it represents each bfloat16, and each product of two, exactly.
    """
    if dtype == torch.bfloat16 and os.environ.get("TRITON_INTERPRET") == "1":
        return tl.float32
    return _NATIVE[dtype]


def precision(dtype: torch.dtype) -> str:
    """Precision of products: full for float32, since users choose that type for its precision."""
    return "ieee" if dtype == torch.float32 else "tf32"
