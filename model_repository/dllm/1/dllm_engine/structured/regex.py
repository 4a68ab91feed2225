"""Pieces of regular expressions, in the syntax of Rust's crate regex."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

_META = frozenset("\\.+*?()|[]{}^$#&-~")
#: A character that a JSON string holds as it is; and any character of a string. Control characters
#: but the usual ones cannot be written. U+FFFD is what decoders write for broken UTF-8.
PLAIN = r'[^"\\\x00-\x1f\x{fffd}]'
CHARACTER = rf'(?:{PLAIN}|\\["\\/bfnrt])'
STRING = f'"{CHARACTER}*"'
#: Numbers that a double holds to the last digit, and no more digits than it has.
INTEGER = "(?:0|-?[1-9][0-9]{0,14})"
NUMBER = r"-?(?:0|[1-9][0-9]{0,14})(?:\.[0-9]{1,15})?(?:[eE][+-]?[0-9]{1,2})?"


def literal(text: str) -> str:
    """Match exactly this text."""
    return "".join(f"\\{c}" if c in _META else c for c in text)


def json_literal(value: Any) -> str:
    """Match exactly this value as compact JSON."""
    return literal(json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False))


def any_of(expressions: Iterable[str]) -> str:
    """Match any of these."""
    given = list(dict.fromkeys(expressions))
    return given[0] if len(given) == 1 else f"(?:{'|'.join(given)})"


def repeated(expression: str, least: int, most: int | None) -> str:
    """Match it so many times; `most` None: without a limit."""
    if most == 0:
        return ""
    return f"(?:{expression}){{{least},{'' if most is None else most}}}"


def listed(item: str, least: int, most: int | None) -> str:
    """Match so many of it, with commas between them."""
    if most == 0:
        return ""
    more = repeated(f",{item}", max(0, least - 1), None if most is None else most - 1)
    return f"{item}{more}" if least else f"(?:{item}{more})?"


def integers(low: int | None, high: int | None) -> str | None:
    """Match the integers from `low` to `high`, None without a limit; None if there are none."""
    most = 10**15 - 1
    low, high = max(-most, -most if low is None else low), min(most, most if high is None else high)
    if low > high:
        return None
    parts = []
    if low < 0:
        parts += [f"-{part}" for part in _naturals(max(1, -high), -low)]
    if high >= 0:
        parts += _naturals(max(0, low), high)
    return any_of(parts)


def _naturals(low: int, high: int) -> list[str]:
    """Match numbers from `low` to `high`, both at least 0, without leading zeros."""
    parts = []
    for digits in range(len(str(low)), len(str(high)) + 1):
        first = max(low, 10 ** (digits - 1) if digits > 1 else 0)
        last = min(high, 10**digits - 1)
        parts += same_length(str(first), str(last))
    return parts


def same_length(low: str, high: str) -> list[str]:
    """Match the strings of digits from `low` to `high`, which are equally long."""
    if not low:
        return [""]
    if low[0] == high[0]:
        return [low[0] + rest for rest in same_length(low[1:], high[1:])]
    rest = len(low) - 1
    any_rest = f"[0-9]{{{rest}}}" if rest else ""
    parts, first, last = [], int(low[0]), int(high[0])
    if low[1:] != "0" * rest:
        parts += [low[0] + tail for tail in same_length(low[1:], "9" * rest)]
        first += 1
    ends_early = high[1:] != "9" * rest
    last -= ends_early
    if first <= last:
        parts.append(f"[{first}-{last}]{any_rest}")
    if ends_early:
        parts += [high[0] + tail for tail in same_length("0" * rest, high[1:])]
    return parts
