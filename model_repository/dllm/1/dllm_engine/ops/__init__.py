"""Numerical building blocks; they know tensors and nothing of requests."""

from .attention import packed_attention
from .layout import FreshGroup, LayerPages, PackedLayout, PagedGroup, Selection
from .norm import rms_norm
from .rotary import RotaryTable, apply_rotary
from .selection import select_positions

__all__ = [
    "FreshGroup",
    "LayerPages",
    "PackedLayout",
    "PagedGroup",
    "RotaryTable",
    "Selection",
    "apply_rotary",
    "packed_attention",
    "rms_norm",
    "select_positions",
]
