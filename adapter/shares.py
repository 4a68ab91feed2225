"""The share of a common limit that one API key may hold."""

import math
from collections import Counter

from adapter.errors import TooManyCalls


def share_of(limit: int, share: float) -> int:
    """How many of `limit` one key may hold; at least one."""
    return max(1, math.floor(limit * share))


class Shares:
    """Counts what is held now, in all and by each key. Calls without a key have no limit of a key.

    Args:
        limit: how many may be held in all.
        share: the part of them that one key may hold.
        what: what is held, for errors.
        setting: the setting of the limit, for errors.
    """

    def __init__(self, limit: int, share: float, *, what: str, setting: str) -> None:
        self._limit = limit
        self._limit_of_key = share_of(limit, share)
        self._what = what
        self._setting = setting
        self._held: Counter[str | None] = Counter()

    @property
    def held(self) -> int:
        """How many are held now."""
        return self._held.total()

    def most_of(self, key: str | None) -> int:
        """How many may ever be held by this key, or without a key."""
        return self._limit if key is None else self._limit_of_key

    def require(self, key: str | None, count: int = 1) -> None:
        """Raise `TooManyCalls` if `count` more would be too many."""
        if self.held + count > self._limit:
            msg = f"{self.held} {self._what}, and at most {self._limit} may ({self._setting})"
            raise TooManyCalls(msg)
        if key is not None and self._held[key] + count > self.most_of(key):
            msg = (
                f"{self._held[key]} {self._what} for this key, and at most {self._limit_of_key} "
                f"may ({self._setting}, DLLM_KEY_SHARE)"
            )
            raise TooManyCalls(msg)

    def take(self, key: str | None) -> None:
        """Hold one more. Raises `TooManyCalls`."""
        self.require(key)
        self._held[key] += 1

    def give_back(self, key: str | None) -> None:
        """Hold one less."""
        self._held[key] -= 1
        if not self._held[key]:
            del self._held[key]
