"""The engine's random numbers in plain unsigned arithmetic: splitmix64 (Steele, Lea, Flood 2014).

It uses Python's integers, or NumPy's 64-bit integers for many numbers of one key.
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

_ALL = 2**64 - 1
_GOLDEN, _MIX_1, _MIX_2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
#: Purpose of a number: a position's token, or its place in the order.
TOKEN, ORDER = 1, 2

Word = TypeVar("Word", int, "np.typing.NDArray[np.uint64]")


def mix(x: Word) -> Word:
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


def gumbel(key: int, count: int) -> Tensor:
    """The first `count` numbers of a key as standard Gumbel noise, float64."""
    words = mix(np.arange(1, count + 1, dtype=np.uint64) * np.uint64(_GOLDEN) + np.uint64(key))
    numbers = torch.from_numpy(((words >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53)
    return -(-numbers.log()).log()
