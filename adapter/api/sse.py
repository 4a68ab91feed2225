"""Server-sent events, and cancelling work when the client disconnects."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import StreamingResponse
from fastapi.sse import format_sse_event
from pydantic import BaseModel
from starlette.types import Receive, Scope, Send

from adapter.errors import ClientDisconnected

T = TypeVar("T")

#: JSON strings may contain these, but some clients take them for line ends.
LINE_ENDS = {ord(end): f"\\u{ord(end):04x}" for end in "\x85\u2028\u2029"}
#: How long a streaming call waits for its first event before the response starts anyway. An error
#: before that sets the HTTP status; a later one is an event of the stream.
FIRST_EVENT_TIMEOUT = 5.0
#: Keep proxies and caches from buffering the stream.
STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


class EventStream(StreamingResponse):
    """Response of server-sent events; awaits `release` when the call ends, for any reason."""

    media_type = "text/event-stream"

    def __init__(
        self, events: AsyncGenerator[bytes, None], release: Callable[[], Awaitable[None]]
    ) -> None:
        super().__init__(events, headers=STREAM_HEADERS)
        self._events = events
        self._release = release

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events until they end or the client disconnects."""
        try:
            async with aclosing(self._events):
                await super().__call__(scope, receive, send)
        finally:
            await self._release()


def sse(data: BaseModel | str, event: str | None = None) -> bytes:
    """Format one event: a model becomes JSON, a string is sent unchanged."""
    text = data if isinstance(data, str) else data.model_dump_json()
    return format_sse_event(data_str=text.translate(LINE_ENDS), event=event)


async def cancel_on_disconnect(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Await `work`, but cancel it and raise `ClientDisconnected` if the client disconnects.

    Awaiting alone would not notice a disconnect, and the engine would go on for nothing.
    """
    working = asyncio.ensure_future(work)
    disconnect = asyncio.create_task(_disconnected(request))
    try:
        await asyncio.wait([working, disconnect], return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        msg = "the client disconnected"
        raise ClientDisconnected(msg)
    finally:
        for task in (working, disconnect):
            task.cancel()
        await asyncio.wait([working, disconnect])


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
