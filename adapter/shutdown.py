"""Learning in time that this process is to end.

uvicorn and gunicorn close the connections first and tell the application last, so that a held poll
would hold up the end for as long as it is held.
"""

import asyncio
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


@contextmanager
def before_the_end(callback: Callable[[], None]) -> Iterator[None]:
    """Call back when the process is told to end, and then let the server do as it would.

    To be entered in the event loop. Where no server listens to a signal, its effect stays as it
    is; outside the main thread there are no signals.
    """
    loop = asyncio.get_running_loop()
    theirs: dict[int, Callable[[int, FrameType | None], Any]] = {}

    def handle(number: int, frame: FrameType | None) -> None:
        loop.call_soon_threadsafe(callback)
        theirs[number](number, frame)

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGINT):
            handler = signal.getsignal(number)
            if callable(handler) and handler is not signal.default_int_handler:
                theirs[number] = handler
                signal.signal(number, handle)
    try:
        yield
    finally:
        for replaced, handler in theirs.items():
            if signal.getsignal(replaced) is handle:
                signal.signal(replaced, handler)
