"""Weight-only quantisation: weights of 8 bits, for which torchao makes the products.

A quantised weight is to `torch.nn.functional.linear` a tensor like any other; what goes in and
comes out keeps its type. Why, and what it costs: docs/decisions/015.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from dllm_engine.errors import InvalidConfig

#: Bytes of each row besides its numbers: a float32 scale, to which int8 adds a zero point.
_ROW_BYTES = {"int8": 5, "fp8": 4}


def make_quantizer(kind: str) -> Callable[[Tensor], Tensor]:
    """The function that turns a weight [out, in] of a float type into one of 8 bits a number.

    Symmetric, with one scale for each row, that is for each output: int8 in steps of 1/127 of the
    row's largest magnitude, fp8 (e4m3) with three bits of mantissa.

    Args:
        kind: "int8" or "fp8".

    Raises:
        InvalidConfig: the library is missing, or does not go with this torch.
    """
    # torchao brings libraries for GPUs of which nothing is used here; it warns where they do not
    # load, as on every CPU.
    log = logging.getLogger("torchao")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        from torchao.quantization import Float8Tensor, Int8Tensor, PerRow
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
        else:
            # A row of zeros must not divide by a scale of zero; scales have the weight's own type.
            least = torch.finfo(torch.float8_e4m3fn).max * torch.finfo(weight.dtype).tiny
            made = Float8Tensor.from_hp(weight, granularity=PerRow(), hp_value_lb=least)
        return made

    return quantize


def is_quantized(weight: Tensor) -> bool:
    """Whether a weight is one of the library's tensors, of which torch's own type is a base."""
    return type(weight) not in (Tensor, nn.Parameter)


def quantized_bytes(shape: Sequence[int], kind: str) -> int:
    """Bytes of a weight of `shape` once it is quantised."""
    return math.prod(shape) + shape[0] * _ROW_BYTES[kind]
