"""Rotary position embedding in the half-split layout (GPT-NeoX) of LLaDA and Qwen2."""

from __future__ import annotations

import torch
from torch import Tensor


class RotaryTable:
    """Cosines and sines of every position, computed once in float32 or wider.

    Source: Su et al. 2021, eq. 34, with the halves of a head rotated against each other.
    """

    def __init__(
        self, head_dim: int, max_positions: int, theta: float, *, device: str, dtype: torch.dtype
    ) -> None:
        wide = torch.promote_types(dtype, torch.float32)
        exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).to(torch.float32) / head_dim
        frequencies = 1.0 / (theta**exponents)
        angles = torch.outer(torch.arange(max_positions, dtype=torch.float32), frequencies)
        cos, sin = angles.cos(), angles.sin()
        self._cos = torch.cat([cos, cos], dim=-1).to(device=device, dtype=wide)
        # The sines carry the sign that rotates one half against the other.
        self._sin = torch.cat([-sin, sin], dim=-1).to(device=device, dtype=wide)

    def at(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and signed sines, each [rows, 1, head_dim], for int64 positions [rows]."""
        return self._cos[positions].unsqueeze(1), self._sin[positions].unsqueeze(1)


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate heads to their positions; computed in float32 or wider, returned in `x`'s type.

    Args:
        x: [rows, heads, head_dim].
        cos, sin: [rows, 1, head_dim], from `RotaryTable.at`.
    """
    wide = x.to(cos.dtype)
    swapped = wide.roll(x.shape[-1] // 2, dims=-1)
    return (wide * cos).addcmul_(swapped, sin).to(x.dtype)
