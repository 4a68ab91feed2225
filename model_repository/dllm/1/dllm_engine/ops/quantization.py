"""Quantisation to 8 bits, of weights alone or of activations too; torchao computes the products.

`torch.nn.functional.linear` takes a quantised weight like any other tensor; inputs and outputs keep
their type. Reasons and costs: docs/decisions/015.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from dllm_engine.errors import InvalidConfig

#: Bytes of each row besides its numbers: a float32 scale, and for int8 a zero point.
_ROW_BYTES = {"int8": 5, "fp8": 4, "w8a8": 5}


def make_quantizer(kind: str) -> Callable[[Tensor], Tensor]:
    """A function that quantises a weight [out, in] of a float type to 8 bits per number.

    Symmetric, with one scale per row (output): int8 in steps of 1/127 of the row's largest
    magnitude, fp8 (e4m3) with three bits of mantissa. w8a8 rounds weights as int8, and the
    activations of each product too, with one scale per row, so that integers are multiplied. Their
    sums are exact: a row's result does not depend on the rows beside it. A CPU without VNNI adds
    pairs of products in 16 bits; there w8a8 keeps 7 bits of weights and activations.

    Args:
        kind: "int8", "fp8" or "w8a8".

    Raises:
        InvalidConfig: torchao is missing, or does not work with this torch.
    """
    # torchao comes with GPU libraries that this engine does not use; it warns if they do not load,
    # as on every CPU.
    log = logging.getLogger("torchao")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        from torchao.quantization import Float8Tensor, Int8Tensor, PerRow
        from torchao.quantization.quantize_.workflows.int8.int8_tensor import (
            QuantizeTensorToInt8Kwargs,
        )
        from torchao.utils import should_reduce_range
    except ImportError as error:
        raise InvalidConfig(
            f"DLLM_QUANTIZATION: {kind} needs torchao, which cannot be imported ({error}); install "
            "it with: pip install 'dllm-serve[quantization]'"
        ) from error
    finally:
        log.setLevel(before)

    def quantize(weight: Tensor) -> Tensor:
        made: Tensor
        if kind == "int8":
            made = Int8Tensor.from_hp(weight, PerRow())
        elif kind == "w8a8":
            reduce = should_reduce_range(weight.device)
            activations = QuantizeTensorToInt8Kwargs(PerRow(), reduce_range=reduce)
            made = Int8Tensor.from_hp(
                weight, PerRow(), act_quant_kwargs=activations, reduce_range=reduce
            )
        else:
            # A row of zeros must not divide by a scale of zero; scales have the weight's own type.
            least = torch.finfo(torch.float8_e4m3fn).max * torch.finfo(weight.dtype).tiny
            made = Float8Tensor.from_hp(weight, granularity=PerRow(), hp_value_lb=least)
        return made

    return quantize


def is_quantized(weight: Tensor) -> bool:
    """Whether a weight is quantised: torchao's tensors are subclasses of torch's."""
    return type(weight) not in (Tensor, nn.Parameter)


def quantized_bytes(shape: Sequence[int], kind: str) -> int:
    """Bytes of a quantised weight of `shape`."""
    return math.prod(shape) + shape[0] * _ROW_BYTES[kind]
