"""Cache of accepted request shapes, so that similar requests skip the engine's check.

The check costs a submission some milliseconds, and most clients send the same parameters again and
again with other prompts.
"""

import json
from collections import OrderedDict
from collections.abc import Hashable

from adapter.types import Inputs

MAX_SHAPES = 1024
#: Inputs that hold text, those that hold token ids (the engine checks each id), and those that are
#: always valid.
WORDS = ("text_input", "suffix")
IDS = ("input_ids", "canvas_ids")
FREE = ("seed",)


class ValidationCache:
    """Shapes of accepted requests, each with the bytes of text that surely fit."""

    def __init__(self) -> None:
        self._sizes: OrderedDict[Hashable, int] = OrderedDict()

    def add(self, inputs: Inputs, epoch: int, *, headroom: int) -> None:
        """Record that the engine accepts this request, and a prompt longer by `headroom` tokens.

        It then accepts any text of `headroom` bytes instead: a token has at least one byte, and
        the chat template adds less than this whole prompt.
        """
        if not inputs.keys().isdisjoint(IDS):
            return
        shape, _ = _measure(inputs)
        key = (epoch, shape)
        self._sizes[key] = max(headroom, self._sizes.pop(key, 0))
        if len(self._sizes) > MAX_SHAPES:
            self._sizes.popitem(last=False)

    def covers(self, inputs: Inputs, epoch: int) -> bool:
        """Whether a recorded request shows that the engine accepts this one."""
        if not inputs.keys().isdisjoint(IDS):
            return False
        shape, size = _measure(inputs)
        return size <= self._sizes.get((epoch, shape), -1)


def _measure(inputs: Inputs) -> tuple[Hashable, int]:
    """The request without its text, and the bytes of the text."""
    rest: dict[str, Hashable] = {}
    words = []
    for name, value in inputs.items():
        if name in WORDS:
            rest[name] = None
            words.append(str(value))
        elif name == "messages":
            messages = json.loads(str(value))
            words += [message.pop("content") for message in messages]
            rest[name] = json.dumps(messages)
        elif name not in FREE:
            rest[name] = tuple(value) if isinstance(value, list) else value
    return frozenset(rest.items()), sum(len(text.encode()) for text in words)
