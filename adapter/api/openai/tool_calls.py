"""Reads calls of tools from an answer's text: JSON between `<tool_call>` and `</tool_call>`."""

import json
from collections.abc import Set
from dataclasses import dataclass
from typing import Any, NoReturn

from adapter.api.openai.tools import CLOSE, OPEN
from adapter.api.schemas import SURROGATE


@dataclass(frozen=True, slots=True)
class FoundCall:
    """A call: the function's name, and the arguments as JSON."""

    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer in two parts; what it has of an unfinished text, it keeps."""

    content: str
    calls: tuple[FoundCall, ...]


def read_reply(text: str, names: Set[str], *, finished: bool) -> Reply:
    """The text outside of calls, and the calls, in their order.

    A call is an object with the `name` of an offered function and an object of `arguments`. All
    else between tags stays text. In an unfinished text everything from the first tag on that may
    become a call, and white space that may stand before one, is left out until that is certain.

    Args:
        text: the answer, or the part from its beginning that is final.
        names: the functions that were offered.
        finished: whether the answer is whole; its last call then needs no closing tag.
    """
    kept: list[str] = []
    calls: list[FoundCall] = []
    start = 0
    while (found := text.find(OPEN, start)) >= 0:
        call, end = _call(text, found + len(OPEN), names, finished)
        if call is None and not finished:
            return Reply(_content([*kept, text[start:found]]), tuple(calls))
        if call is None:
            kept.append(text[start : found + len(OPEN)])
            start = found + len(OPEN)
            continue
        kept.append(text[start:found])
        calls.append(call)
        # White space behind a call belongs to it.
        start = end + len(text[end:]) - len(text[end:].lstrip())
    rest = text[start:]
    if not finished:
        rest = rest[: len(rest) - _begun(rest)]
    content = "".join([*kept, rest])
    return Reply(content if finished and not calls else content.rstrip(), tuple(calls))


def _content(pieces: list[str]) -> str:
    return "".join(pieces).rstrip()


def _begun(text: str) -> int:
    """Length of the longest end of `text` that a tag may begin with."""
    longest = min(len(text), len(OPEN) - 1)
    return next((n for n in range(longest, 0, -1) if OPEN.startswith(text[-n:])), 0)


def _call(text: str, start: int, names: Set[str], finished: bool) -> tuple[FoundCall | None, int]:
    """The call that begins behind the tag, and where it ends; None if it is no whole call."""
    while start < len(text) and text[start].isspace():
        start += 1
    try:
        value, end = _DECODER.raw_decode(text, start)
    except (ValueError, RecursionError):
        return None, start
    rest = text[end:].lstrip()
    end = len(text) - len(rest)
    if rest.startswith(CLOSE):
        end += len(CLOSE)
    elif rest or not finished:
        return None, start
    if not isinstance(value, dict):
        return None, start
    name, arguments = value.get("name"), value.get("arguments", {})
    if not isinstance(name, str) or name not in names or not isinstance(arguments, dict):
        return None, start
    return FoundCall(name, _json(arguments)), end


def _json(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return json.dumps(value) if SURROGATE.search(text) else text


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


_DECODER = json.JSONDecoder(parse_constant=_no_number)
