"""Sends the turns of a conversation to one engine, whose prefix cache has the turns before."""

import hashlib
import json
import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import Protocol, TypeVar

from adapter.types import Inputs

MAX_CONVERSATIONS = 10_000
#: A conversation stays where it was while that engine has at most this multiple of its share.
MAX_LOAD = 1.25


class Target(Protocol):
    """A server that can take a request."""

    @property
    def name(self) -> str: ...

    @property
    def inflight(self) -> int: ...


T = TypeVar("T", bound=Target)


class Affinity:
    """Remembers at which engine this worker's conversations were.

    For a conversation of another worker, its hash tells (rendezvous hashing), so all workers choose
    the same engine, and one that comes or goes moves few conversations. The load of an engine is
    bounded (Mirrokni, Thorup, Zadimoghaddam: Consistent Hashing with Bounded Loads, 2018).
    """

    def __init__(self) -> None:
        self._homes: OrderedDict[bytes, str] = OrderedDict()

    def choose(self, inputs: Inputs, targets: Sequence[T]) -> T:
        """One of the targets, which are at least one.

        A request with an earlier answer goes where its conversation was, unless there is too much
        to do. All others go where there is least to do, the first in order among equals.
        """
        least = min(targets, key=lambda target: target.inflight)
        conversation = _conversation(inputs)
        if conversation is None:
            return least
        key, is_first_turn = conversation
        chosen = least if is_first_turn else self._bounded(key, targets)
        self._homes[key] = chosen.name
        self._homes.move_to_end(key)
        if len(self._homes) > MAX_CONVERSATIONS:
            self._homes.popitem(last=False)
        return chosen

    def _bounded(self, key: bytes, targets: Sequence[T]) -> T:
        """The first target in the conversation's order that has room."""
        home = self._homes.get(key)
        total = sum(target.inflight for target in targets) + 1
        most = math.ceil(MAX_LOAD * total / len(targets))
        with_room = (target for target in targets if target.inflight < most)
        return max(with_room, key=lambda t: (t.name == home, _weight(key, t.name)))


def _conversation(inputs: Inputs) -> tuple[bytes, bool] | None:
    """The hash of what all turns of a conversation begin with, and whether this is the first."""
    if "messages" not in inputs:
        return None
    messages = json.loads(str(inputs["messages"]))
    roles = [message["role"] for message in messages]
    if "user" not in roles:
        return None
    beginning = messages[: roles.index("user") + 1]
    key = hashlib.blake2b(json.dumps(beginning).encode(), digest_size=16).digest()
    return key, "assistant" not in roles


def _weight(key: bytes, name: str) -> bytes:
    return hashlib.blake2b(name.encode(), key=key, digest_size=8).digest()
