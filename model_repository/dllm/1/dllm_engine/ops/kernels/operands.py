"""In which type the kernels multiply matrices."""

from __future__ import annotations

import os

import torch
import triton.language as tl

_NATIVE = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def operand_type(dtype: torch.dtype) -> tl.dtype:
    """The type of a matrix product's operands: that of the tensors.

    Triton's interpreter multiplies the bit patterns of bfloat16 as if they were whole numbers;
    float32 holds each of its numbers, and each product of two, exactly.
    """
    if dtype == torch.bfloat16 and os.environ.get("TRITON_INTERPRET") == "1":
        return tl.float32
    return _NATIVE[dtype]


def precision(dtype: torch.dtype) -> str:
    """How float32 is multiplied: in full, since float32 is asked for where that matters."""
    return "ieee" if dtype == torch.float32 else "tf32"
