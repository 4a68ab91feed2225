"""Root-mean-square normalisation."""

import functools

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm (Zhang & Sennrich 2019) as in Llama: statistics in float32 or wider.

    Args:
        x: [rows, dim] or [rows, heads, dim], any float type.
        weight: [dim] or [heads, dim], same type.
        eps: added to the mean square.

    Returns:
        Shape and type of `x`.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    # One pass over the rows; squaring and summing would take two.
    norm: Tensor = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    floor = _constant(eps, wide.dtype, wide.device)
    scale = torch.addcmul(floor, norm, norm, value=1 / x.shape[-1]).rsqrt_()
    return (wide * scale).to(x.dtype).mul_(weight)


@functools.cache
def _constant(value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A number on its device: torch converts a Python number at every call."""
    return torch.full((), value, dtype=dtype, device=device)
