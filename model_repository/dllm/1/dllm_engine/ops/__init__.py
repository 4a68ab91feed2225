"""Numerical building blocks; they know tensors and nothing of requests."""

from .attention import packed_attention
from .dispatch import KERNELS, TORCH, Layout, Operations, choose_operations
from .head import LOWEST, TILE, Choice, Head, HeadStatistics
from .layout import (
    FlatLayout,
    FlatSelection,
    FreshGroup,
    LayerPages,
    PackedLayout,
    PagedGroup,
    Selection,
)
from .linear import GatedLinear, Linear
from .norm import rms_norm
from .rotary import RotaryTable, apply_rotary
from .selection import select_positions

__all__ = [
    "KERNELS",
    "LOWEST",
    "TILE",
    "TORCH",
    "Choice",
    "FlatLayout",
    "FlatSelection",
    "FreshGroup",
    "GatedLinear",
    "Head",
    "HeadStatistics",
    "LayerPages",
    "Layout",
    "Linear",
    "Operations",
    "PackedLayout",
    "PagedGroup",
    "RotaryTable",
    "Selection",
    "apply_rotary",
    "choose_operations",
    "packed_attention",
    "rms_norm",
    "select_positions",
]
