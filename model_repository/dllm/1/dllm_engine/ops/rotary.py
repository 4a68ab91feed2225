"""Rotary position embedding in the half-split layout (GPT-NeoX) of Llama and Qwen."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True, kw_only=True)
class Yarn:
    """YaRN (Peng et al. 2023, arXiv 2309.00071): low frequencies are divided by `factor`."""

    factor: float
    #: Context of the model before its frequencies were changed, in tokens.
    original_context: int
    #: Rotations over that context above which a frequency stays, and below which it is divided.
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    #: Factor of all cosines and sines.
    attention_factor: float = 1.0
    #: Whether the two dimensions that the betas stand for are rounded outwards.
    truncate: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class QueryScaling:
    """Llama 4's factor of queries: 1 + beta * ln(1 + floor(position / original_context))."""

    beta: float
    original_context: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rope:
    """Which rotary embedding a model has."""

    theta: float
    yarn: Yarn | None = None
    query_scaling: QueryScaling | None = None

    def frequencies(self, head_dim: int) -> Tensor:
        """Radians per position of each pair of dimensions: [head_dim / 2] float32."""
        exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).to(torch.float32) / head_dim
        plain = 1.0 / (self.theta**exponents)
        if self.yarn is None:
            return plain
        kept = 1 - self._ramp(head_dim, self.yarn)
        divided = 1.0 / (self.yarn.factor * self.theta**exponents)
        return divided * (1 - kept) + plain * kept

    def _ramp(self, head_dim: int, yarn: Yarn) -> Tensor:
        """How far each frequency is divided, 0 to 1: [head_dim / 2]."""
        low, high = (
            head_dim
            * math.log(yarn.original_context / (rotations * 2 * math.pi))
            / (2 * math.log(self.theta))
            for rotations in (yarn.beta_fast, yarn.beta_slow)
        )
        if yarn.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, head_dim - 1)
        if low == high:
            high += 0.001
        dims = torch.arange(head_dim // 2, dtype=torch.float32)
        return ((dims - low) / (high - low)).clamp(0, 1)


class RotaryTable:
    """Cosines and sines of every position, computed once in float32 or wider.

    Source: Su et al. 2021, eq. 34, with the halves of a head rotated against each other.
    """

    def __init__(
        self, head_dim: int, max_positions: int, rope: Rope, *, device: str, dtype: torch.dtype
    ) -> None:
        wide = torch.promote_types(dtype, torch.float32)
        positions = torch.arange(max_positions, dtype=torch.float32)
        angles = torch.outer(positions, rope.frequencies(head_dim))
        factor = rope.yarn.attention_factor if rope.yarn else 1.0
        cos, sin = factor * angles.cos(), factor * angles.sin()
        self._cos = torch.cat([cos, cos], dim=-1).to(device=device, dtype=wide)
        # The sines carry the sign that rotates one half against the other.
        self._sin = torch.cat([-sin, sin], dim=-1).to(device=device, dtype=wide)
        self._query_scale: Tensor | None = None
        if scaling := rope.query_scaling:
            contexts = (positions / scaling.original_context).floor()
            scale = 1 + scaling.beta * contexts.log1p()
            self._query_scale = scale.to(device=device, dtype=dtype)

    def at(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and signed sines, each [rows, 1, head_dim], for int64 positions [rows]."""
        return self._cos[positions].unsqueeze(1), self._sin[positions].unsqueeze(1)

    def query_scale(self, positions: Tensor) -> Tensor | None:
        """Factors of the queries at int64 positions [rows]: [rows, 1, 1]; None: all are 1."""
        return None if self._query_scale is None else self._query_scale[positions][:, None, None]


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate heads to their positions; computed in float32 or wider, returned in `x`'s type.

    Args:
        x: [rows, heads, head_dim].
        cos, sin: [rows, 1, head_dim], from `RotaryTable.at`.
    """
    wide = x.to(cos.dtype)
    swapped = wide.roll(x.shape[-1] // 2, dims=-1)
    return (wide * cos).addcmul_(swapped, sin).to(x.dtype)
