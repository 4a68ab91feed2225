"""Limits on connections, which no middleware sees: a protocol for uvicorn (`python -m adapter`).

uvicorn closes a connection that is idle between two calls. It keeps one that never sends a call, or
sends it in drops, or never reads the response, and it keeps headers of any size.
"""

import asyncio
from collections import Counter
from functools import cache
from typing import Any, ClassVar

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from adapter.settings import Settings, load_settings

#: Largest request line and headers together.
MAX_HEAD_BYTES = 64 * 1024


@cache
def process_settings() -> Settings:
    """The settings of this process; reading them takes longer than a call."""
    return load_settings()


class Connection(HttpToolsProtocol):
    """One connection of a client. It is cut if the client exceeds a limit."""

    #: How many are open in this process, by the client's address.
    open: ClassVar[Counter[str]] = Counter()

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        settings = process_settings()
        self._max_of_address = settings.max_connections_per_address
        self._receive_timeout = settings.body_timeout
        self._send_timeout = settings.send_timeout
        self._address = ""
        #: Bytes of the head that is being received; None behind its end.
        self._head_bytes: int | None = 0
        self._receiving: asyncio.TimerHandle | None = None
        self._sending: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take the connection, unless its address has too many."""
        super().connection_made(transport)
        self._address = self.client[0] if self.client else ""
        self.open[self._address] += 1
        if self.open[self._address] > self._max_of_address:
            transport.abort()
        else:
            self._wait_for_data()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        super().connection_lost(exc)
        self._forget()
        self.resume_writing()

    def data_received(self, data: bytes) -> None:
        """Parse the data, and refuse a head that is too large."""
        if self._head_bytes is not None:
            self._head_bytes += len(data)
        super().data_received(data)
        if self._head_bytes is not None and self._head_bytes > MAX_HEAD_BYTES:
            self.send_400_response("The request line and headers are too large.")
        elif self.cycle is not None and self.cycle.response_complete and self._head_bytes is None:
            # The rest of a body that no route has read: it must end in time, too.
            self._wait_for_data()

    def on_message_begin(self) -> None:
        """A call begins: its head must be complete in time."""
        super().on_message_begin()
        self._head_bytes = self._head_bytes or 0
        self._wait_for_data()

    def on_headers_complete(self) -> None:
        """The head is complete; the application limits the time of the body."""
        self._head_bytes = None
        self._stop_waiting()
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """The body is complete."""
        super().on_message_complete()
        self._stop_waiting()

    def handle_websocket_upgrade(self) -> None:
        """Give the connection to a protocol without limits, which does not tell when it ends."""
        self._forget()
        super().handle_websocket_upgrade()

    def pause_writing(self) -> None:
        """The client does not read what is sent: it must go on in time."""
        super().pause_writing()
        self._sending = self.loop.call_later(self._send_timeout, self.transport.abort)

    def resume_writing(self) -> None:
        """The client reads."""
        super().resume_writing()
        if self._sending is not None:
            self._sending.cancel()
            self._sending = None

    def _forget(self) -> None:
        self.open[self._address] -= 1
        if not self.open[self._address]:
            del self.open[self._address]
        self._stop_waiting()

    def _wait_for_data(self) -> None:
        if self._receiving is None:
            self._receiving = self.loop.call_later(self._receive_timeout, self.transport.abort)

    def _stop_waiting(self) -> None:
        if self._receiving is not None:
            self._receiving.cancel()
            self._receiving = None
