"""Runs the requests of one OpenAI call: all of them or none."""

import asyncio
import json
import secrets
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import AsyncExitStack, aclosing

from fastapi import Request
from fastapi.sse import KEEPALIVE_COMMENT
from pydantic import BaseModel

from adapter.api.deps import request_context, services
from adapter.api.openai.errors import length_name, status_and_body
from adapter.api.openai.formatters import ResponseFormatter
from adapter.api.openai.logprobs import text_tokens
from adapter.api.openai.requests import StreamedUsage
from adapter.api.schemas import GenerateRequest
from adapter.api.sse import FIRST_EVENT_TIMEOUT, EventStream, cancel_on_disconnect, sse
from adapter.engine.pool import EnginePool
from adapter.engine.streaming import StreamingRequest
from adapter.errors import AdapterError
from adapter.types import Event, StreamDetail

#: Server-sent events.
Events = AsyncGenerator[bytes, None]


class CompletionRunner:
    """Runs the requests of one call; a disconnect cancels them."""

    def __init__(self, call: Request, pool: EnginePool) -> None:
        context = request_context(call)
        self._call = call
        self._pool = pool
        self._live = services(call).live
        #: Longest pause between events of a stream, in seconds.
        self._heartbeat = services(call).settings.heartbeat_interval
        self._api_key = context.api_key
        self._request_id = context.request_id or secrets.token_hex(8)

    async def results(self, requests: Sequence[GenerateRequest]) -> list[Event]:
        """Return the results in order. Raises the error of any request that fails."""
        async with AsyncExitStack() as stack:
            running = await self._begin(requests, StreamDetail.RESULT, stack)
            return await cancel_on_disconnect(self._call, _results(running))

    async def stream(
        self,
        requests: Sequence[GenerateRequest],
        formatter: ResponseFormatter,
        usage: StreamedUsage,
    ) -> EventStream:
        """Return a stream of chunks. Raises if the requests fail before the first event."""

        def chunks(running: Sequence[StreamingRequest], beat: float, length: str) -> Events:
            return _chunks(running, formatter, usage, heartbeat=beat, length=length)

        return await self.stream_events(requests, chunks)

    async def stream_events(
        self,
        requests: Sequence[GenerateRequest],
        events: Callable[[Sequence[StreamingRequest], float, str], Events],
    ) -> EventStream:
        """Return a stream of what `events` makes of the running requests.

        `events` also gets the longest pause in seconds, and the call's name for the length.
        Raises if the requests fail before the first event.
        """
        async with AsyncExitStack() as stack:
            running = await self._begin(requests, StreamDetail.TEXT, stack)
            # They start together, so the engine refuses either all or none.
            await cancel_on_disconnect(self._call, running[0].wait_accepted(FIRST_EVENT_TIMEOUT))
            release = stack.pop_all().aclose
        return EventStream(events(running, self._heartbeat, length_name(self._call)), release)

    async def _begin(
        self, requests: Sequence[GenerateRequest], detail: StreamDetail, stack: AsyncExitStack
    ) -> list[StreamingRequest]:
        """Start the requests, each as long as fits; closing `stack` cancels them."""
        running = []
        inputs_of_all = [request.inputs() for request in requests]
        fitted = await self._live.fit(inputs_of_all, api_key=self._api_key, pool=self._pool)
        for index, (request, inputs) in enumerate(zip(requests, fitted, strict=True)):
            begun = self._live.start(
                inputs,
                request_id=f"{self._request_id}-{index}" if index else self._request_id,
                detail=detail,
                priority=request.priority,
                timeout=request.timeout,
                api_key=self._api_key,
                pool=self._pool,
            )
            stack.push_async_callback(begun.close)
            running.append(begun)
        return running


async def _results(running: Sequence[StreamingRequest]) -> list[Event]:
    return [await request.result() for request in running]


async def _chunks(
    running: Sequence[StreamingRequest],
    formatter: ResponseFormatter,
    usage: StreamedUsage,
    *,
    heartbeat: float,
    length: str,
) -> AsyncGenerator[bytes, None]:
    def sent(chunk: BaseModel) -> bytes:
        # With `include_usage` every chunk has the field, null but in the last one.
        has_usage = usage is not StreamedUsage.NONE
        return sse(chunk.model_dump_json(exclude=None if has_usage else {"usage"}))

    now = asyncio.get_running_loop().time
    spoke = now()
    lengths, counts = [0] * len(running), [0] * len(running)
    results: dict[int, Event] = {}
    try:
        for index in range(len(running)):
            if (opening := formatter.opening(index, running[index].seed)) is not None:
                yield sent(opening)
        async with aclosing(_merged(running, heartbeat)) as updates:
            async for update in updates:
                if update is None or now() - spoke >= heartbeat:
                    yield KEEPALIVE_COMMENT
                    spoke = now()
                if update is None:
                    continue
                index, event = update
                tokens = text_tokens(event)
                new = None if tokens is None else tokens[counts[index] :]
                content = formatter.content(event)
                if len(content) > lengths[index]:
                    piece = content[lengths[index] :]
                    each = usage is StreamedUsage.EACH
                    yield sent(formatter.piece(index, piece, event, new, has_usage=each))
                    lengths[index], spoke = len(content), now()
                    counts[index] += len(new or ())
                    new = None
                for call in formatter.calls(index, event):
                    yield sent(call)
                    spoke = now()
                if event.finish_reason:
                    results[index] = event
                    yield sent(formatter.ending(index, event, new))
    except AdapterError as error:
        yield sse(json.dumps(status_and_body(error, length)[1]))
        return
    if usage is not StreamedUsage.NONE:
        yield sent(formatter.usage(list(results.values())))
    yield sse("[DONE]")


async def _merged(
    running: Sequence[StreamingRequest], heartbeat: float
) -> AsyncGenerator[tuple[int, Event] | None, None]:
    """Merge the events of all requests, with their index; None after a silent `heartbeat`."""
    waiting = {asyncio.create_task(r.next_event()): index for index, r in enumerate(running)}
    try:
        while waiting:
            done, _ = await asyncio.wait(
                waiting, timeout=heartbeat, return_when=asyncio.FIRST_COMPLETED
            )
            if not done:
                yield None
            for task in done:
                index = waiting.pop(task)
                event = task.result()
                assert event is not None
                yield index, event
                if not event.finish_reason:
                    waiting[asyncio.create_task(running[index].next_event())] = index
    finally:
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
