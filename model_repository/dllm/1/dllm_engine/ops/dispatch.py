"""Chooses the implementation of the operations: torch, or kernels in the Triton language."""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
import os
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from dllm_engine.errors import InvalidConfig
from dllm_engine.ops import attention, draw, head_statistics, linear, norm, rotary
from dllm_engine.ops.head_types import Filters, HeadOptions, HeadStatistics, TiledHead
from dllm_engine.ops.layout import LayerPages, Layout
from dllm_engine.ops.linear import AddedProduct, Product, SiluMul

logger = logging.getLogger("dllm_engine")


@dataclasses.dataclass(frozen=True)
class Operations:
    """One implementation of the model's operations."""

    #: `attention.packed_attention`; takes the form of layout that belongs to it.
    packed_attention: Callable[[Tensor, Tensor, Tensor, Layout, LayerPages | None], Tensor]
    #: `norm.rms_norm`.
    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    #: `rotary.apply_rotary`; may rotate `x` in place.
    apply_rotary: Callable[[Tensor, Tensor, Tensor], Tensor]
    linear: Product
    add_linear: AddedProduct
    silu_mul: SiluMul
    #: `Head.statistics` and `Head.statistics_bytes`.
    head_statistics: Callable[[TiledHead, Tensor, HeadOptions, Tensor | None], HeadStatistics]
    head_statistics_bytes: Callable[[TiledHead, bool, bool], int]
    #: `draw.draw` and `draw.draw_bytes`; a kernel also takes logits of 16 bits.
    draw: Callable[[Tensor, HeadOptions, Filters], HeadStatistics]
    draw_bytes: Callable[[int, int], tuple[int, int]]
    #: Whether these are kernels, which take flat layouts and unpacked weights.
    kernels: bool
    #: Rows times query heads that share a KV head, in one program of the attention kernel.
    lanes: int = 0

    def block_m(self, num_heads: int, num_kv_heads: int) -> int | None:
        """Rows per tile of a flat layout; None where layouts are grouped."""
        shared = 1 << (num_heads // num_kv_heads - 1).bit_length()
        return max(1, self.lanes // shared) if self.kernels else None


TORCH = Operations(
    attention.packed_attention,  # type: ignore[arg-type]
    norm.rms_norm,
    rotary.apply_rotary,
    F.linear,
    linear.add_linear,
    linear.silu_mul,
    head_statistics.head_statistics,
    head_statistics.head_statistics_bytes,
    draw.draw,
    draw.draw_bytes,
    kernels=False,
)


def choose_operations(
    choice: str, device: str, dtype: torch.dtype, *, batch_invariant: bool = False
) -> Operations:
    """The implementation to use on this device for `choice`, one of `config.KERNELS`.

    Args:
        batch_invariant: a row's numbers must not depend on other rows. On a CPU, torch's never
            do (docs/decisions/002).

    Raises:
        InvalidConfig: kernels are requested, or required, and cannot run.
    """
    operations = _choose(choice, device, dtype)
    if batch_invariant and operations.kernels:
        from dllm_engine.ops.kernels.linear import add_invariant_linear, invariant_linear

        return dataclasses.replace(
            operations, linear=invariant_linear, add_linear=add_invariant_linear
        )
    if batch_invariant and device.startswith("cuda"):
        raise InvalidConfig("DLLM_BATCH_INVARIANT: on a GPU needs kernels (DLLM_KERNELS=triton)")
    return operations


def _choose(choice: str, device: str, dtype: torch.dtype) -> Operations:
    installed = importlib.util.find_spec("triton") is not None
    on_gpu = device.startswith("cuda")
    if choice == "torch" or (choice == "auto" and not on_gpu):
        return TORCH
    problem = None
    if not installed:
        problem = "needs the package triton, which is not installed"
    elif dtype == torch.float64:
        problem = "has no kernels for float64 (DLLM_DTYPE)"
    elif not on_gpu and os.environ.get("TRITON_INTERPRET") != "1":
        problem = f"needs a GPU; the device is {device} (TRITON_INTERPRET=1 runs them slowly)"
    if problem is None:
        logger.info("layers, head and filters run on kernels (DLLM_KERNELS)")
        return _triton_operations(dtype)
    if choice == "auto":
        logger.warning("layers, head and filters run on torch's operations: triton %s", problem)
        return TORCH
    raise InvalidConfig(f"DLLM_KERNELS: {choice} {problem}")


def _triton_operations(dtype: torch.dtype) -> Operations:
    # Not at the top: the package is optional.
    from dllm_engine.ops.kernels import attention as attention_kernels
    from dllm_engine.ops.kernels import draw as draw_kernels
    from dllm_engine.ops.kernels import head as head_kernels
    from dllm_engine.ops.kernels import norm as norm_kernels

    return Operations(
        attention_kernels.packed_attention,  # type: ignore[arg-type]
        norm_kernels.rms_norm,
        norm_kernels.apply_rotary,
        F.linear,
        linear.add_linear_in_place,
        norm_kernels.silu_mul,
        head_kernels.head_statistics,
        head_kernels.head_statistics_bytes,
        draw_kernels.draw,
        draw_kernels.draw_bytes,
        kernels=True,
        lanes=attention_kernels.program_lanes(dtype),
    )
