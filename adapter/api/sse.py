"""Calls that hold their connection: who left is noticed, and what they asked for is let go."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import StreamingResponse
from fastapi.sse import format_sse_event
from pydantic import BaseModel
from starlette.types import Receive, Scope, Send

from adapter.errors import CallerGone

T = TypeVar("T")

#: Some clients take these for ends of lines, which a string in JSON may hold as they are.
LINE_ENDS = {ord(end): f"\\u{ord(end):04x}" for end in "\x85\u2028\u2029"}
#: How long a streaming call may wait for its first event before it is answered with a stream all
#: the same. What goes wrong earlier is told by the status, later by an event.
SETTLING_SECONDS = 5.0
#: Proxies that buffer, or a cache, would make a stream of a whole.
STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


class EventStream(StreamingResponse):
    """Server-sent events; however the call ends, `release` is awaited then."""

    media_type = "text/event-stream"

    def __init__(
        self, events: AsyncGenerator[bytes, None], release: Callable[[], Awaitable[None]]
    ) -> None:
        super().__init__(events, headers=STREAM_HEADERS)
        self._events = events
        self._release = release

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events until they end or the caller leaves."""
        try:
            async with aclosing(self._events):
                await super().__call__(scope, receive, send)
        finally:
            await self._release()


def sse(data: BaseModel | str, event: str | None = None) -> bytes:
    """One server-sent event; a model goes out as JSON, a string must be such or a word."""
    text = data if isinstance(data, str) else data.model_dump_json()
    return format_sse_event(data_str=text.translate(LINE_ENDS), event=event)


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The outcome of `work`, which is cancelled when the caller hangs up: `CallerGone`.

    Whoever only awaits never learns of that, and the engine would work for nobody.
    """
    working = asyncio.ensure_future(work)
    leaving = asyncio.create_task(_hung_up(request))
    try:
        await asyncio.wait([working, leaving], return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        msg = "the caller has gone"
        raise CallerGone(msg)
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.wait([working, leaving])


async def _hung_up(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
