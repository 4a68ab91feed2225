"""Regular expressions of decimal numbers between bounds."""

from __future__ import annotations

import math
from collections.abc import Mapping
from decimal import Decimal

from dllm_engine.structured import regex


def whole_bounds(given: Mapping[str, Decimal], scale: int) -> tuple[int | None, int | None]:
    """The bounds times `scale`, as whole numbers that are within them."""
    lows, highs = [], []
    for name, value in given.items():
        scaled = value * scale
        if name == "minimum":
            lows.append(math.ceil(scaled))
        elif name == "exclusiveMinimum":
            lows.append(math.floor(scaled) + 1)
        elif name == "maximum":
            highs.append(math.floor(scaled))
        elif name == "exclusiveMaximum":
            highs.append(math.ceil(scaled) - 1)
    return max(lows, default=None), min(highs, default=None)


def decimals(low: int | None, high: int | None, digits: int) -> str | None:
    """Numbers of `digits` decimals whose digits, without the point, are from `low` to `high`."""
    most = 10**15 - 1
    low, high = max(-most, -most if low is None else low), min(most, most if high is None else high)
    if low > high:
        return None
    parts = []
    if low < 0:
        parts += [f"-{part}" for part in _points(max(1, -high), -low, digits)]
    if high >= 0:
        parts += _points(max(0, low), high, digits)
    return regex.any_of(parts)


def _points(low: int, high: int, digits: int) -> list[str]:
    scale = 10**digits
    first, last = low // scale, high // scale
    if first == last:
        return [f"{first}\\.{part}" for part in _fraction(low % scale, high % scale, digits)]
    parts = []
    if low % scale:
        parts += [f"{first}\\.{part}" for part in _fraction(low % scale, scale - 1, digits)]
        first += 1
    ends_early = high % scale != scale - 1
    if first <= last - ends_early:
        whole = regex.integers(first, last - ends_early)
        parts.append(rf"{whole}(?:\.[0-9]{{1,{digits}}})?")
    if ends_early:
        parts += [f"{last}\\.{part}" for part in _fraction(0, high % scale, digits)]
        if not high % scale:
            parts.append(str(last))
    return parts


def _fraction(low: int, high: int, digits: int) -> list[str]:
    return regex.same_length(f"{low:0{digits}d}", f"{high:0{digits}d}")
