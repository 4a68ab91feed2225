"""Numerical building blocks: functions of tensors that know nothing of requests."""

from dllm_engine.ops.attention import GATHER_BYTES, sequences_at_once
from dllm_engine.ops.dispatch import TORCH, Operations, choose_operations
from dllm_engine.ops.head import Head
from dllm_engine.ops.head_types import TILE, HeadOptions, HeadStatistics
from dllm_engine.ops.layout import (
    FlatLayout,
    FlatSelection,
    FreshGroup,
    LayerPages,
    Layout,
    PackedLayout,
    PagedGroup,
    Selection,
)
from dllm_engine.ops.linear import GatedLinear, Linear
from dllm_engine.ops.quantization import make_quantizer, quantized_bytes
from dllm_engine.ops.rotary import RotaryTable
from dllm_engine.ops.rows import ROW_MULTIPLE
from dllm_engine.ops.transfer import UPLOAD_BYTES, Array, Download, Upload

__all__ = [
    "GATHER_BYTES",
    "ROW_MULTIPLE",
    "TILE",
    "TORCH",
    "UPLOAD_BYTES",
    "Array",
    "Download",
    "FlatLayout",
    "FlatSelection",
    "FreshGroup",
    "GatedLinear",
    "Head",
    "HeadOptions",
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
    "choose_operations",
    "make_quantizer",
    "quantized_bytes",
    "sequences_at_once",
]
