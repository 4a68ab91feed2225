"""Numerical building blocks; they know tensors and nothing of requests."""

from .attention import GATHER_BYTES, packed_attention, sequences_at_once
from .dispatch import TORCH, Operations, choose_operations
from .head import LOWEST, TILE, Choice, Head, HeadStatistics
from .layout import (
    FlatLayout,
    FlatSelection,
    FreshGroup,
    LayerPages,
    Layout,
    PackedLayout,
    PagedGroup,
    Selection,
)
from .linear import GatedLinear, Linear
from .norm import rms_norm
from .quantization import make_quantizer, quantized_bytes
from .rotary import RotaryTable, apply_rotary
from .selection import select_positions
from .transfer import UPLOAD_BYTES, Array, Download, Upload

__all__ = [
    "GATHER_BYTES",
    "LOWEST",
    "TILE",
    "TORCH",
    "UPLOAD_BYTES",
    "Array",
    "Choice",
    "Download",
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
    "Upload",
    "apply_rotary",
    "choose_operations",
    "make_quantizer",
    "packed_attention",
    "quantized_bytes",
    "rms_norm",
    "select_positions",
    "sequences_at_once",
]
