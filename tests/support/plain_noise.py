"""The engine's random numbers in plain unsigned arithmetic.

Keys are mixed by splitmix64 (Steele, Lea, Flood 2014) in Python's integers; a key's numbers for
many tokens are made in NumPy's 32-bit integers.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_ALL = 2**64 - 1
_GOLDEN, _MIX_1, _MIX_2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
#: Purpose of a number: a position's token, or its place in the order.
TOKEN, ORDER = 1, 2

Words = npt.NDArray[np.uint32]


def mix(x: int) -> int:
    """splitmix64's output function, modulo 2^64."""
    x = ((x ^ (x >> 30)) * _MIX_1) & _ALL
    x = ((x ^ (x >> 27)) * _MIX_2) & _ALL
    return x ^ (x >> 31)


def key(seed: int, step: int, position: int, use: int) -> int:
    """The key of one position in one step."""
    mixed = mix((seed + use * _GOLDEN) & _ALL)
    mixed = mix((mixed + (step + 1) * _GOLDEN) & _ALL)
    return mix((mixed + (position + 1) * _GOLDEN) & _ALL)


def uniform(key: int) -> float:
    """The first number of a key, in (0, 1)."""
    return ((mix((key + _GOLDEN) & _ALL) >> 11) + 0.5) * 2.0**-53


def mix_32(x: Words, key: int = 0) -> Words:
    """lowbias32 (Wellons 2018), with a key added between its two multiplications."""
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> np.uint32(15))) + np.uint32(key)
    x = x * np.uint32(0x846CA68B)
    return x ^ (x >> np.uint32(16))


def token_uniform(key: int, count: int) -> Tensor:
    """Numbers of a key for the first `count` tokens: 31 bits, and 31 lower ones; float32."""
    low, high = np.uint32(key & 0xFFFFFFFF), np.uint32(key >> 32)
    token = mix_32(np.arange(1, count + 1, dtype=np.uint32) * np.uint32(0x9E3779B9))
    bits = mix_32(token ^ low, int(high)) & np.uint32(2**31 - 1)
    tail = (token ^ high) & np.uint32(2**31 - 1)
    numbers = bits.astype(np.float32) * np.float32(2.0**-31)
    numbers += tail.astype(np.float32) * np.float32(2.0**-62)
    return torch.from_numpy(numbers.clip(np.float32(2.0**-62), np.float32(1 - 2.0**-24)))


def gumbel(key: int, count: int) -> Tensor:
    """Standard Gumbel noise of a key for the first `count` tokens, float64."""
    return -(-(-token_uniform(key, count).double()).log1p()).log()


def order_gumbel(key: int) -> float:
    """The first number of a key as standard Gumbel noise."""
    return -math.log(-math.log(uniform(key)))
