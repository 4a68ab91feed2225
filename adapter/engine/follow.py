"""Following one request through an engine, from its submission to its last event."""

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

from adapter.engine.pool import Endpoint
from adapter.errors import DeadlineExceeded, StreamInterrupted
from adapter.types import DEFAULT_PRIORITY, Event, Inputs, StreamDetail


async def follow(
    endpoint: Endpoint,
    inputs: Inputs,
    on_event: Callable[[Event], None],
    *,
    request_id: str,
    detail: StreamDetail = StreamDetail.RESULT,
    priority: int = DEFAULT_PRIORITY,
    api_key: str | None = None,
    deadline: float | None,
    idle_timeout: float,
) -> Event:
    """Run a request, call `on_event` with each of its events, and return the last one.

    `api_key` is the name of the caller's key, see `Endpoint.salted`.
    Both limits are in seconds: `deadline` for the whole request, `idle_timeout` between two events.
    Raises `DeadlineExceeded`, `InvalidRequest` or an `EngineError`, which is `StreamInterrupted`
    for a stream without a result.
    """
    limit = asyncio.timeout(deadline)
    try:
        async with limit:
            with endpoint.track(request_id) as observe:
                events = endpoint.engine.generate(
                    endpoint.salted(inputs, api_key),
                    request_id=request_id,
                    detail=detail,
                    priority=priority,
                )
                async with aclosing(events):
                    while True:
                        event = await _next(events, idle_timeout)
                        observe(event)
                        if event.finish_reason:
                            break
                        on_event(event)
    except TimeoutError:
        if not limit.expired():
            raise
        msg = f"not done within the timeout of {deadline:g} s"
        raise DeadlineExceeded(msg) from None
    if event.finish_reason == "cancelled":
        msg = "the engine cancelled the request"
        raise StreamInterrupted(msg)
    on_event(event)
    return event


async def _next(events: AsyncGenerator[Event, None], idle_timeout: float) -> Event:
    try:
        async with asyncio.timeout(idle_timeout):
            event = await anext(events, None)
    except TimeoutError:
        msg = f"the stream was silent for {idle_timeout:g} s"
        raise StreamInterrupted(msg) from None
    if event is None:
        msg = "the engine ended the stream without a result"
        raise StreamInterrupted(msg)
    return event
