"""Which requests an engine need not be asked about, since it has taken one like them.

Asking costs a call some milliseconds, and most callers send the same parameters again and again
with other prompts.
"""

import json
from collections import OrderedDict
from collections.abc import Hashable

from adapter.types import Inputs

MAX_SHAPES = 1024
#: Text of any length; token ids, which must be looked at one by one; what is valid in any case.
WORDS = ("text_input", "suffix")
IDS = ("input_ids", "canvas_ids")
FREE = ("seed",)


class Verdicts:
    """Kinds of requests that were taken, each with the bytes of text that surely fit."""

    def __init__(self) -> None:
        self._room: OrderedDict[Hashable, int] = OrderedDict()

    def add(self, inputs: Inputs, incarnation: int, *, room: int) -> None:
        """The engine would take this, and the same with `room` tokens more in its prompt.

        Then it takes any text of `room` bytes in its place: a token is a byte at least, and what
        the template adds is less than all of this prompt.
        """
        if not inputs.keys().isdisjoint(IDS):
            return
        shape, _ = _measure(inputs)
        key = (incarnation, shape)
        self._room[key] = max(room, self._room.pop(key, 0))
        if len(self._room) > MAX_SHAPES:
            self._room.popitem(last=False)

    def cover(self, inputs: Inputs, incarnation: int) -> bool:
        """Whether what was said of others holds for this one."""
        if not inputs.keys().isdisjoint(IDS):
            return False
        shape, size = _measure(inputs)
        return size <= self._room.get((incarnation, shape), -1)


def _measure(inputs: Inputs) -> tuple[Hashable, int]:
    """All of a request but its words, and how many bytes these have."""
    rest: dict[str, Hashable] = {}
    words = []
    for name, value in inputs.items():
        if name in WORDS:
            rest[name] = None
            words.append(str(value))
        elif name == "messages":
            messages = json.loads(str(value))
            rest[name] = tuple(message["role"] for message in messages)
            words += [message["content"] for message in messages]
        elif name not in FREE:
            rest[name] = tuple(value) if isinstance(value, list) else value
    return frozenset(rest.items()), sum(len(text.encode()) for text in words)
