"""Numerical building blocks; they know tensors and nothing of requests."""

from .attention import PackedLayout, packed_attention
from .norm import rms_norm
from .rotary import RotaryTable, apply_rotary

__all__ = ["PackedLayout", "RotaryTable", "apply_rotary", "packed_attention", "rms_norm"]
