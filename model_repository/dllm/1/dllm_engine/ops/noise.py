"""Random numbers that are a pure function of (seed, step, position, token).

A counter-based generator: a request's numbers do not depend on the rest of the batch or on the
order of calls, and are the same after a restart. The mixing function is splitmix64 (Steele, Lea,
Flood 2014), in wrapping int64 arithmetic since torch has no unsigned 64-bit operators.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: Separate streams for separate uses of the same (seed, step, position).
STREAM_TOKEN = 1
STREAM_ORDER = 2


def _signed(x: int) -> int:
    """The int64 with the same bits as `x` modulo 2^64."""
    return (x + 2**63) % 2**64 - 2**63


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_MIX_1 = _signed(0xBF58476D1CE4E5B9)
_MIX_2 = _signed(0x94D049BB133111EB)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical (zero-filling) right shift of int64."""
    return (x >> bits).bitwise_and_((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    """Mix the bits of each number. In place, since noise for millions of tokens is made at once."""
    for bits, factor in ((30, _MIX_1), (27, _MIX_2)):
        x ^= _shift_right(x, bits)
        x *= factor
    x ^= _shift_right(x, 31)
    return x


def row_keys(seed: Tensor, step: Tensor, position: Tensor, stream: int) -> Tensor:
    """One key per row from int64 [rows] seeds, steps and positions; int64 [rows]."""
    key = _mix(seed + _signed(stream * _GOLDEN))
    key = _mix(key + (step + 1) * _GOLDEN)
    return _mix(key + (position + 1) * _GOLDEN)


def uniform(keys: Tensor, count: int, first: int = 0) -> Tensor:
    """Numbers `first` to `first + count` of each key, in the open interval (0, 1).

    Returns:
        float64 [rows, count].
    """
    places = torch.arange(first + 1, first + count + 1, device=keys.device, dtype=torch.int64)
    counters = places * _GOLDEN
    bits = _shift_right(_mix(keys.unsqueeze(1) + counters), 11)
    return bits.to(torch.float64).add_(0.5).mul_(2.0**-53)


def gumbel(keys: Tensor, count: int, first: int = 0) -> Tensor:
    """Standard Gumbel noise for tokens `first` to `first + count`, float64 [rows, count]."""
    return uniform(keys, count, first).log_().neg_().log_().neg_()
