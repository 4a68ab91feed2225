"""Bounds how long a step may take."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

#: How often the watchdog looks at the clock within its time-out.
_CHECKS = 8


class Watchdog:
    """Calls `on_timeout`, once, when a `with` block takes longer than `seconds`.

    Args:
        seconds: 0: a block may take for ever.
        on_timeout: called on the watchdog's own thread, while the block is still running.
    """

    def __init__(self, seconds: float, on_timeout: Callable[[], object]) -> None:
        self._seconds, self._on_timeout = seconds, on_timeout
        self._since: float | None = None
        self._closed = threading.Event()
        if seconds:
            threading.Thread(target=self._watch, name="dllm-watchdog", daemon=True).start()

    def __enter__(self) -> None:
        self._since = time.monotonic()

    def __exit__(self, *_: object) -> None:
        self._since = None

    def close(self) -> None:
        """Stop watching."""
        self._closed.set()

    def _watch(self) -> None:
        # The thread polls, so that entering and leaving a block costs nothing.
        while not self._closed.wait(self._seconds / _CHECKS):
            since = self._since
            if since is not None and time.monotonic() - since > self._seconds:
                self._on_timeout()
                return
