"""Requests whose caller stays on the line: no job is kept, and a caller who leaves cancels."""

import asyncio
import secrets
from collections.abc import AsyncGenerator
from contextlib import aclosing
from types import TracebackType
from typing import Self

from adapter.engine.monitor import EngineMonitor
from adapter.engine.pool import EnginePool
from adapter.errors import (
    AdapterError,
    DeadlineExceeded,
    StreamInterrupted,
    TooManyCalls,
    Unavailable,
)
from adapter.telemetry.logs import get_logger
from adapter.types import DEFAULT_PRIORITY, Detail, Event, Inputs

log = get_logger()


class LiveRequest:
    """One request on its way through the engine.

    It runs at the engine's pace, however slowly its events are fetched: one that nobody has
    fetched gives way to the next, which says all that it said and more.
    """

    def __init__(
        self,
        events: AsyncGenerator[Event, None],
        monitor: EngineMonitor,
        *,
        idle_timeout: float,
        timeout: float | None,
    ) -> None:
        self._monitor = monitor
        self._idle_timeout = idle_timeout
        self._newest: Event | None = None
        self._error: AdapterError | None = None
        self._changed = asyncio.Event()
        self._settled = asyncio.Event()
        self._generation = monitor.epoch
        #: Ends with the engine's events.
        self.task = asyncio.create_task(self._run(events, timeout), name="live-request")

    @property
    def outlived(self) -> bool:
        """The engine that runs it was replaced; its successor knows nothing of it."""
        return self._generation < self._monitor.epoch

    async def settled_in(self, seconds: float) -> None:
        """Wait until the engine has taken it, but not for longer. Raises what went wrong."""
        try:
            async with asyncio.timeout(seconds):
                await self._settled.wait()
        except TimeoutError:
            return
        if self._newest is None and self._error is not None:
            raise self._error

    async def next_event(self, patience: float | None = None) -> Event | None:
        """The newest event, once; None if there is none for `patience` seconds.

        Raises what ended the request, after its last event: `InvalidRequest` or `EngineError`.
        """
        try:
            async with asyncio.timeout(patience):
                await self._changed.wait()
        except TimeoutError:
            return None
        event, self._newest = self._newest, None
        if event is not None:
            if self._error is None:
                self._changed.clear()
            return event
        assert self._error is not None
        raise self._error

    async def result(self) -> Event:
        """The last event. Raises what `next_event` raises."""
        while True:
            event = await self.next_event()
            if event is not None and event.finish_reason:
                return event

    def lose(self, reason: str) -> None:
        """The engine will never answer: end the request with this reason."""
        self._fail(StreamInterrupted(reason))
        self.task.cancel()

    async def close(self) -> None:
        """Cancel the request in the engine, unless it has ended."""
        self.task.cancel()
        await asyncio.wait([self.task])

    async def _run(self, stream: AsyncGenerator[Event, None], timeout: float | None) -> None:
        deadline = asyncio.timeout(timeout)
        try:
            async with deadline:
                await self._follow(stream)
        except TimeoutError:
            if not deadline.expired():
                raise
            self._fail(DeadlineExceeded(f"not done within the timeout of {timeout:g} s"))
        except AdapterError as error:
            if isinstance(error, StreamInterrupted):
                self._monitor.request_probe()
            self._fail(error)

    async def _follow(self, stream: AsyncGenerator[Event, None]) -> None:
        async with aclosing(stream) as events:
            while True:
                try:
                    async with asyncio.timeout(self._idle_timeout):
                        event = await anext(events, None)
                except TimeoutError:
                    msg = f"the engine has been silent for {self._idle_timeout:g} s"
                    raise StreamInterrupted(msg) from None
                if event is None:
                    msg = "the engine ended the stream without a result"
                    raise StreamInterrupted(msg)
                if event.finish_reason == "cancelled":
                    msg = "the engine cancelled the request"
                    raise StreamInterrupted(msg)
                self._settled.set()
                if event.waits:  # there is nothing to show yet
                    continue
                self._newest = event
                self._changed.set()
                if event.finish_reason:
                    return

    def _fail(self, error: AdapterError) -> None:
        if self._error is None:
            self._error = error
            self._changed.set()
            self._settled.set()


class LiveRequests:
    """The live requests of one worker; a context manager that leaves none behind."""

    def __init__(self, pool: EnginePool, *, limit: int, idle_timeout: float) -> None:
        self._pool = pool
        self._limit = limit
        self._idle_timeout = idle_timeout
        self._running: dict[asyncio.Task[None], LiveRequest] = {}

    @property
    def inflight(self) -> int:
        """How many run now."""
        return len(self._running)

    def start(
        self,
        inputs: Inputs,
        *,
        request_id: str,
        detail: Detail,
        priority: int = DEFAULT_PRIORITY,
        timeout: float | None = None,
    ) -> LiveRequest:
        """Begin a request; whoever calls this closes it. Raises `TooManyCalls`, `Unavailable`."""
        if len(self._running) >= self._limit:
            msg = f"{self._limit} calls wait for their answers, as many as may (DLLM_MAX_LIVE)"
            raise TooManyCalls(msg)
        # One request's failure must not turn away the next caller, who would not wait.
        endpoint = self._pool.pick() or self._pool.pick(include_backing_off=True)
        if endpoint is None:
            raise Unavailable(self._pool.unavailable_reason)
        # Nobody else's, whatever callers choose: it can be cancelled by that.
        own = f"{request_id}-{secrets.token_hex(4)}"
        events = endpoint.generate(inputs, request_id=own, detail=detail, priority=priority)
        request = LiveRequest(
            events, endpoint.monitor, idle_timeout=self._idle_timeout, timeout=timeout
        )
        self._running[request.task] = request
        request.task.add_done_callback(self._ended)
        return request

    async def __aenter__(self) -> Self:
        self._pool.subscribe(self._engines_changed)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for request in list(self._running.values()):
            await request.close()

    def _ended(self, task: asyncio.Task[None]) -> None:
        request = self._running.pop(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("live_request_broken", exc_info=error)
            request.lose("the adapter met an error of its own")

    def _engines_changed(self) -> None:
        for request in list(self._running.values()):
            if request.outlived:
                request.lose("the engine that ran it was replaced")
