"""Translates Python's and JavaScript's regular expressions to the syntax of Rust's crate regex.

What is generated is a part of what the expression allows: classes such as `\\w` are those of ASCII,
which all engines agree on. A schema's `pattern` is about the characters of a string, but the
automaton reads the string as JSON writes it, with escapes: so each piece is translated.
"""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Mapping
from re import _constants as sre  # type: ignore[attr-defined]
from re import _parser  # type: ignore[attr-defined]
from typing import Any

from dllm_engine.structured import regex

_BEGIN = (sre.AT_BEGINNING, sre.AT_BEGINNING_STRING)
_END = (sre.AT_END, sre.AT_END_STRING)
_CATEGORIES = {
    sre.CATEGORY_DIGIT: "0-9",
    sre.CATEGORY_NOT_DIGIT: r" !-/:-~",
    sre.CATEGORY_SPACE: r" \t\n\r",
    sre.CATEGORY_NOT_SPACE: r"!-~",
    sre.CATEGORY_WORD: "A-Za-z0-9_",
    sre.CATEGORY_NOT_WORD: r" !-/:-@\[-\^`{-~",
}
#: The larger reading of what a class leaves out, in any engine.
_WIDE = {
    sre.CATEGORY_DIGIT: r"\d",
    sre.CATEGORY_SPACE: r"\s\x{1c}-\x{1f}\x{feff}",
    sre.CATEGORY_WORD: r"\w",
}
#: No `.` matches what some engine takes for the end of a line.
_LINE_ENDS = r"\n\r\x{85}\x{2028}\x{2029}"
_UNBOUNDED = 1 << 30


class Unsupported(ValueError):
    """The expression uses what cannot be held."""


@dataclasses.dataclass(frozen=True)
class _Writing:
    """How characters are written."""

    #: A class: the characters that are written as they are.
    plain: str
    #: How others are written, by code point.
    escaped: Mapping[int, str]


_TEXT = _Writing(r"[^\x00\x{fffd}]", {})
_JSON = _Writing(
    regex.PLAIN,
    {
        ord('"'): r"\\\"",
        ord("\\"): r"\\\\",
        8: r"\\b",
        9: r"\\t",
        10: r"\\n",
        12: r"\\f",
        13: r"\\r",
    },
)


def whole_text(expression: str) -> str:
    """Translate an expression that a whole text must match.

    Raises:
        Unsupported: says what cannot be held.
    """
    parts = []
    _, branches = _parsed(expression)
    for branch in branches:
        inner, _, _ = _unanchored(branch)
        parts.append(_Translator(_TEXT).sequence(inner))
    return regex.any_of(parts)


def inside_json_string(pattern: str) -> tuple[str, int, int]:
    """Translate a pattern that is searched for in a string, which JSON writes.

    Returns:
        The expression of all between the quotes, and the least and largest number of characters
        that match.

    Raises:
        Unsupported: says what cannot be held.
    """
    parts, shortest, longest = [], _UNBOUNDED, 0
    tree, branches = _parsed(pattern)
    for branch in branches:
        inner, begins, ends = _unanchored(branch)
        before, behind = ("" if anchored else f"{regex.CHARACTER}*" for anchored in (begins, ends))
        parts.append(before + _Translator(_JSON).sequence(inner) + behind)
        least, most = _parser.SubPattern(tree.state, inner).getwidth()
        shortest = min(shortest, least)
        longest = max(longest, most if begins and ends else _UNBOUNDED)
    return regex.any_of(parts), shortest, longest


def _parsed(expression: str) -> tuple[Any, list[Any]]:
    """Python's reading of an expression, and its alternatives."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            tree = _parser.parse(expression, re.UNICODE)
    except (re.error, RecursionError, OverflowError, Warning) as error:
        raise Unsupported(f"not a regular expression: {error}") from error
    if tree.state.flags & ~re.UNICODE:
        raise Unsupported("flags")
    items = list(tree)
    # Python moves a prefix that all alternatives share before them.
    alone = len(items) == 1 and items[0][0] is sre.BRANCH
    if not alone and len(items) == 2 and items[0][0] is sre.AT and items[1][0] is sre.BRANCH:
        return tree, [[items[0], *branch] for branch in items[1][1][1]]
    return tree, items[0][1][1] if alone else [items]


def _unanchored(branch: Any) -> tuple[list[Any], bool, bool]:
    """The branch without the anchors at its ends, and which of them it has."""
    items = list(branch)
    begins = bool(items) and items[0][0] is sre.AT and items[0][1] in _BEGIN
    ends = len(items) > begins and items[-1][0] is sre.AT and items[-1][1] in _END
    return items[begins : len(items) - ends], begins, ends


class _Translator:
    def __init__(self, writing: _Writing) -> None:
        self._plain, self._escaped = writing.plain, writing.escaped

    def sequence(self, items: Any) -> str:
        return "".join(self._item(kind, value) for kind, value in items)

    def _item(self, kind: Any, value: Any) -> str:
        if kind is sre.LITERAL:
            return self._character(value)
        if kind is sre.NOT_LITERAL:
            return self._class([(sre.NEGATE, None), (sre.LITERAL, value)])
        if kind is sre.ANY:
            return f"[{self._plain}&&[^{_LINE_ENDS}]]"
        if kind is sre.IN:
            return self._class(value)
        if kind is sre.BRANCH:
            return regex.any_of(self.sequence(branch) for branch in value[1])
        if kind is sre.SUBPATTERN:
            _, add, drop, inner = value
            if add or drop:
                raise Unsupported("flags")
            return f"(?:{self.sequence(inner)})"
        if kind in (sre.MAX_REPEAT, sre.MIN_REPEAT):
            least, most, inner = value
            limit = None if most == sre.MAXREPEAT else int(most)
            return regex.repeated(self.sequence(inner), int(least), limit)
        raise Unsupported(f"{str(kind).lower()} inside the expression")

    def _character(self, code: int) -> str:
        if code in self._escaped:
            return self._escaped[code]
        least = 32 if self._escaped else 1
        if code < least or 0xD800 <= code < 0xE000 or code == 0xFFFD:
            raise Unsupported(f"the character U+{code:04X}")
        return regex.literal(chr(code))

    def _class(self, items: Any) -> str:
        negated = items[0][0] is sre.NEGATE
        inside, escaped = [], []
        for kind, value in items[negated:]:
            if kind is sre.CATEGORY:
                text = (_WIDE if negated else _CATEGORIES).get(value)
                if text is None:
                    raise Unsupported(r"\D, \S or \W in a class that begins with ^")
                inside.append(text)
                continue
            low, high = value if kind is sre.RANGE else (value, value)
            if low < 0xE000 and high >= 0xD800:
                if not low < 0xD800 <= 0xDFFF < high:
                    raise Unsupported("surrogates")
                inside.append(f"\\x{{{low:x}}}-\\x{{d7ff}}")
                low = 0xE000
            inside.append(f"\\x{{{low:x}}}-\\x{{{high:x}}}")
            escaped += [text for code, text in self._escaped.items() if low <= code <= high]
        text = "".join(inside)
        if negated:
            return f"[{self._plain}&&[^{text}]]"
        return regex.any_of([f"[{self._plain}&&[{text}]]", *escaped])
