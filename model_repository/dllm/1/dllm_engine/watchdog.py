"""A bound on how long a step may take."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import TracebackType

#: Looks at the clock within the time that is given.
_LOOKS = 8


class Alarm:
    """Rings once if a `with` block takes longer than `seconds`.

    Args:
        ring: called on a thread of the alarm's own, while the block is still at work.
    """

    def __init__(self, seconds: float, ring: Callable[[], object]) -> None:
        self._seconds, self._ring = seconds, ring
        self._since: float | None = None
        self._closed = threading.Event()
        threading.Thread(target=self._watch, name="dllm-alarm", daemon=True).start()

    def __enter__(self) -> None:
        self._since = time.monotonic()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._since = None

    def close(self) -> None:
        """Never ring from now on."""
        self._closed.set()

    def _watch(self) -> None:
        # The block is not slowed down by waking anybody.
        while not self._closed.wait(self._seconds / _LOOKS):
            since = self._since
            if since is not None and time.monotonic() - since > self._seconds:
                self._ring()
                return
