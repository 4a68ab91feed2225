"""Noise of tokens in kernels: the same numbers as `ops.noise`."""

from __future__ import annotations

import triton
import triton.language as tl

from dllm_engine.ops import noise

_GOLDEN = tl.constexpr(noise.GOLDEN_32)
_MIX_1 = tl.constexpr(noise.LOWBIAS_1)
_MIX_2 = tl.constexpr(noise.LOWBIAS_2)
_LEAST, _MOST = tl.constexpr(noise.LEAST), tl.constexpr(noise.MOST)
_LOW_31 = tl.constexpr(2**31 - 1)
_TO_UNIT, _TO_TAIL = tl.constexpr(2.0**-31), tl.constexpr(2.0**-62)


@triton.jit
def _mix(x, key):
    x = (x ^ (x >> 16)) * _MIX_1
    x = (x ^ (x >> 15)) + key
    x = x * _MIX_2
    return x ^ (x >> 16)


@triton.jit
def uniform(keys, tokens):
    """Uniform numbers of int64 keys for tokens, bitwise those of `ops.noise.token_uniform`."""
    low, high = keys.to(tl.uint32), (keys >> 32).to(tl.uint32)
    token = _mix((tokens + 1).to(tl.uint32) * _GOLDEN, 0)
    bits = (_mix(token ^ low, high) & _LOW_31).to(tl.int32).to(tl.float32)
    tail = ((token ^ high) & _LOW_31).to(tl.int32).to(tl.float32)
    numbers = bits * _TO_UNIT + tail * _TO_TAIL
    return tl.minimum(tl.maximum(numbers, _LEAST), _MOST)


@triton.jit
def gumbel(keys, tokens):
    """Standard Gumbel noise in float32, of rounding error below 10⁻⁶.

    A GPU's logarithm is exact in proportion except near 1. There, −ln(1 − u) is u times a
    polynomial, interpolated at Chebyshev's nodes for u up to ½.
    """
    u = uniform(keys, tokens)
    ratio = 1.4079567193984985 * u - 1.6302117109298706
    ratio = ratio * u + 1.2050138711929321
    ratio = ratio * u - 0.18157164752483368
    ratio = ratio * u + 0.26454758644104004
    ratio = ratio * u + 0.24343743920326233
    ratio = ratio * u + 0.3336620032787323
    ratio = ratio * u + 0.4999937415122986
    ratio = ratio * u + 1.0
    return -tl.log(tl.where(u < 0.5, u * ratio, -tl.log(1.0 - u)))
