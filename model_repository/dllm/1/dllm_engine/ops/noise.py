"""Random numbers that are a pure function of (seed, step, position, token).

A counter-based generator: a request's numbers do not depend on the rest of the batch or on the
order of calls, and are the same after a restart. A row has one key, mixed with splitmix64 (Steele,
Lea, Flood 2014) from its seed, step and position. A token's noise is made from that key and the
token in 32-bit integers and float32 (docs/decisions/001), since a row needs as many numbers as the
vocabulary has tokens. torch has no unsigned operators; all arithmetic here wraps in signed numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: Separate streams for separate uses of the same (seed, step, position).
STREAM_TOKEN = 1
STREAM_ORDER = 2
#: Bounds of uniform numbers in float32, so that both logarithms of the noise are finite.
LEAST, MOST = 2.0**-62, 1 - 2.0**-24


def _signed(x: int, bits: int = 64) -> int:
    """The signed integer with the same lowest bits as `x`."""
    return (x + (1 << bits - 1)) % (1 << bits) - (1 << bits - 1)


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_MIX_1 = _signed(0xBF58476D1CE4E5B9)
_MIX_2 = _signed(0x94D049BB133111EB)
#: The same for 32 bits: the golden ratio, and the factors of Wellons' lowbias32 (2018).
GOLDEN_32 = 0x9E3779B9
LOWBIAS_1, LOWBIAS_2 = 0x7FEB352D, 0x846CA68B
_LOW_31 = 2**31 - 1


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical (zero-filling) right shift of int64 or int32."""
    return (x >> bits).bitwise_and_((1 << (8 * x.element_size() - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    """Mix the bits of each int64, in place."""
    for bits, factor in ((30, _MIX_1), (27, _MIX_2)):
        x ^= _shift_right(x, bits)
        x *= factor
    x ^= _shift_right(x, 31)
    return x


def _mix_32(x: Tensor, key: Tensor | int = 0) -> Tensor:
    """Mix the bits of each int32 (lowbias32), and of a key with them. In place."""
    x ^= _shift_right(x, 16)
    x *= _signed(LOWBIAS_1, 32)
    x ^= _shift_right(x, 15)
    x += key
    x *= _signed(LOWBIAS_2, 32)
    x ^= _shift_right(x, 16)
    return x


def row_keys(seed: Tensor, step: Tensor, position: Tensor, stream: int) -> Tensor:
    """One key per row from int64 [rows] seeds, steps and positions; int64 [rows]."""
    key = _mix(seed + _signed(stream * _GOLDEN))
    key = _mix(key + (step + 1) * _GOLDEN)
    return _mix(key + (position + 1) * _GOLDEN)


def uniform(keys: Tensor) -> Tensor:
    """A number in the open interval (0, 1) for each key: float64 [rows]."""
    bits = _shift_right(_mix(keys + _GOLDEN), 11)
    return bits.to(torch.float64).add_(0.5).mul_(2.0**-53)


def token_uniform(keys: Tensor, count: int, first: int = 0) -> Tensor:
    """Uniform numbers in (0, 1) for tokens `first` to `first + count` of each key.

    Numbers near 0 keep all 24 bits of a float32, down to 2⁻⁶²: they become the largest noise, which
    decides whether an unlikely token is drawn. Their low bits come from the token's hash and the
    other half of the key. The bits are the same on every device.

    Returns:
        float32 [rows, count].
    """
    place = torch.arange(first + 1, first + count + 1, device=keys.device, dtype=torch.int32)
    token = _mix_32(place * _signed(GOLDEN_32, 32))
    low, high = keys.to(torch.int32).unsqueeze(1), (keys >> 32).to(torch.int32).unsqueeze(1)
    bits = _mix_32(token ^ low, high).bitwise_and_(_LOW_31)
    tail = (token ^ high).bitwise_and_(_LOW_31).to(torch.float32)
    # Both factors are powers of two, so a fused multiplication and addition rounds the same.
    numbers = bits.to(torch.float32).mul_(2.0**-31).add_(tail, alpha=2.0**-62)
    return numbers.clamp_(LEAST, MOST)


def gumbel(keys: Tensor, count: int, first: int = 0) -> Tensor:
    """Standard Gumbel noise for tokens `first` to `first + count`, float32 [rows, count]."""
    return token_uniform(keys, count, first).neg_().log1p_().neg_().log_().neg_()
