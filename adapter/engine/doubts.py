"""Is a process dead that Triton says is dead, while the engine goes on sending events?

On a host short of CPU, Triton says so of one that goes on answering. And of an engine with several
processes (instances of the model), one may be dead while the events are those of another. So they
are asked until every one of them has answered, or one has missed its turns.
"""

import math
import re

#: Each process would have had so many turns, were they dealt evenly.
TURNS = 4
_PROCESS = re.compile(r"stub process '([^']*)'", re.IGNORECASE)


class Doubts:
    """What was said of one engine's processes since it was last known to be whole."""

    def __init__(self) -> None:
        self._reported: dict[str, float] = {}
        self._answered: set[str] = set()
        self._probes = 0

    def __bool__(self) -> bool:
        return bool(self._reported)

    def clear(self) -> None:
        """All of them answer, or are others now."""
        self._reported.clear()
        self._answered.clear()
        self._probes = 0

    def report(self, reason: str, now: float) -> None:
        """Triton says that a process is dead; `now` is a time of the caller's clock."""
        self._reported.setdefault(_process(reason), now)

    def reported(self, reason: str) -> float:
        """When the process of which this says so was first said to be dead; ∞: never."""
        return self._reported.get(_process(reason), math.inf)

    def probed(self, answered_by: str | None, *, processes: int) -> None:
        """A probe was answered by this process of so many, or was not for want of one."""
        self._probes += 1
        if answered_by is not None:
            self._answered.add(answered_by)
            if len(self._answered) >= processes:
                self.clear()

    def confirmed(self, *, processes: int) -> bool:
        """Whether one of them is dead, whatever the others send."""
        return bool(self) and processes > 1 and self._probes >= TURNS * processes


def _process(reason: str) -> str:
    found = _PROCESS.search(reason)
    return found[1] if found else reason
