"""Numerical building blocks; they know tensors and nothing of requests."""

from .attention import packed_attention
from .head import TILE, Head
from .layout import FreshGroup, LayerPages, PackedLayout, PagedGroup, Selection
from .linear import GatedLinear, Linear
from .norm import rms_norm
from .rotary import RotaryTable, apply_rotary
from .selection import select_positions

__all__ = [
    "TILE",
    "FreshGroup",
    "GatedLinear",
    "Head",
    "LayerPages",
    "Linear",
    "PackedLayout",
    "PagedGroup",
    "RotaryTable",
    "Selection",
    "apply_rotary",
    "packed_attention",
    "rms_norm",
    "select_positions",
]
