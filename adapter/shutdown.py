"""Noticing a shutdown signal early.

uvicorn and gunicorn close connections first and tell the application last, so a held poll would
delay the shutdown for as long as it is held.
"""

import asyncio
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


@contextmanager
def on_shutdown_signal(callback: Callable[[], None]) -> Iterator[None]:
    """Call `callback` on SIGTERM and SIGINT, then the server's own handler.

    Enter it on the event loop. A signal that the server does not handle keeps its effect; outside
    the main thread there are no signals.
    """
    loop = asyncio.get_running_loop()
    original: dict[int, Callable[[int, FrameType | None], Any]] = {}

    def handle(number: int, frame: FrameType | None) -> None:
        loop.call_soon_threadsafe(callback)
        original[number](number, frame)

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGINT):
            handler = signal.getsignal(number)
            if callable(handler) and handler is not signal.default_int_handler:
                original[number] = handler
                signal.signal(number, handle)
    try:
        yield
    finally:
        for replaced, handler in original.items():
            if signal.getsignal(replaced) is handle:
                signal.signal(replaced, handler)
