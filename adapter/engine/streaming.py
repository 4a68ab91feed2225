"""Requests whose client holds the connection: nothing is stored, a disconnect cancels."""

import asyncio
import secrets
from collections import defaultdict
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Self

from adapter.engine.fit import fit_lengths
from adapter.engine.fleet import Fleet
from adapter.engine.follow import follow
from adapter.engine.pool import Endpoint, EnginePool
from adapter.errors import AdapterError, StreamInterrupted, Unavailable
from adapter.shares import Shares
from adapter.telemetry.logs import get_logger
from adapter.telemetry.metrics import TokenTimer
from adapter.types import DEFAULT_PRIORITY, Event, Inputs, StreamDetail

log = get_logger()


class StreamingRequest:
    """One request in flight, and a mailbox that holds its newest event.

    The request runs at the engine's pace. If the client reads more slowly, a newer event replaces
    an unread one; it holds all that the older one held.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        inputs: Inputs,
        *,
        request_id: str,
        detail: StreamDetail,
        priority: int,
        api_key: str | None,
        timeout: float | None,
        idle_timeout: float,
    ) -> None:
        self._monitor = endpoint.monitor
        self._timer = None if detail is StreamDetail.RESULT else TokenTimer()
        #: The seed that repeats it; known once the engine has accepted it.
        self.seed: int | None = None
        self._newest: Event | None = None
        self._error: AdapterError | None = None
        self._changed = asyncio.Event()
        self._accepted = asyncio.Event()
        run = partial(
            follow,
            endpoint,
            inputs,
            self._put,
            request_id=request_id,
            detail=detail,
            priority=priority,
            api_key=api_key,
            deadline=timeout,
            idle_timeout=idle_timeout,
        )
        #: Ends with the engine's events.
        self.task = asyncio.create_task(self._run(run), name="streaming-request")

    async def wait_accepted(self, seconds: float) -> None:
        """Wait for the engine to accept it, at most for so long. Raises what ended it before."""
        try:
            async with asyncio.timeout(seconds):
                await self._accepted.wait()
        except TimeoutError:
            return
        if self._newest is None and self._error is not None:
            raise self._error

    async def next_event(self, patience: float | None = None) -> Event | None:
        """Take the newest event out; None if there is none for `patience` seconds.

        After the last event, raises what ended the request: `InvalidRequest` or `EngineError`.
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

    def fail(self, error: AdapterError) -> None:
        """End the request with this error, unless it has one."""
        self._set_error(error)
        self.task.cancel()

    async def close(self) -> None:
        """Cancel the request in the engine, unless it has ended."""
        self.task.cancel()
        await asyncio.wait([self.task])

    async def _run(self, run: Callable[[], Awaitable[Event]]) -> None:
        try:
            await run()
        except AdapterError as error:
            self._set_error(error)

    def _put(self, event: Event) -> None:
        self._accepted.set()
        self.seed = event.seed
        if self._timer is not None:
            self._timer.observe(event)
        if not event.is_queued:  # before that there is nothing to show
            self._newest = event
            self._changed.set()

    def _set_error(self, error: AdapterError) -> None:
        if self._error is None:
            self._error = error
            self._changed.set()
            self._accepted.set()


class StreamingRequests:
    """The streaming requests of one worker; a context manager that ends those that remain.

    `pool` is the model that a call names, the default without one. Each has a limit of its own,
    made by `make_shares`.
    """

    def __init__(
        self, fleet: Fleet, *, make_shares: Callable[[], Shares], idle_timeout: float
    ) -> None:
        self._fleet = fleet
        self._shares: defaultdict[str, Shares] = defaultdict(make_shares)
        self._idle_timeout = idle_timeout
        self._running: dict[asyncio.Task[None], StreamingRequest] = {}

    @property
    def inflight(self) -> int:
        """How many run now."""
        return len(self._running)

    def most_at_once(self, api_key: str | None) -> int:
        """The most requests that one call may ever have."""
        return self._shares[self._fleet.default.model].most_of(api_key)

    async def fit(
        self,
        requests: Sequence[Inputs],
        *,
        api_key: str | None,
        pool: EnginePool | None = None,
    ) -> list[Inputs]:
        """The requests of one call, shortened to what fits the model's context.

        Raises `TooManyCalls` before it asks an engine, and what `fit_lengths` raises.
        """
        pool = pool or self._fleet.default
        self._shares[pool.model].require(api_key, len(requests))
        return await fit_lengths(pool, requests)

    def start(
        self,
        inputs: Inputs,
        *,
        request_id: str,
        detail: StreamDetail,
        priority: int = DEFAULT_PRIORITY,
        timeout: float | None = None,
        api_key: str | None = None,
        pool: EnginePool | None = None,
    ) -> StreamingRequest:
        """Begin a request, which the caller closes. Raises `TooManyCalls`, `Unavailable`."""
        pool = pool or self._fleet.default
        shares = self._shares[pool.model]
        shares.require(api_key)
        # The client would not retry, so one failed request must not have the next one rejected.
        endpoint = pool.pick(inputs) or pool.pick(inputs, include_backing_off=True)
        if endpoint is None:
            raise Unavailable(pool.unavailable_reason)
        request = StreamingRequest(
            endpoint,
            inputs,
            # Unique, whatever clients choose, since requests are cancelled by it.
            request_id=f"{request_id}-{secrets.token_hex(4)}",
            detail=detail,
            priority=priority,
            api_key=api_key,
            timeout=timeout,
            idle_timeout=self._idle_timeout,
        )
        shares.take(api_key)
        self._running[request.task] = request
        request.task.add_done_callback(partial(self._ended, shares, api_key))
        return request

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        for request in list(self._running.values()):
            await request.close()

    def _ended(self, shares: Shares, api_key: str | None, task: asyncio.Task[None]) -> None:
        shares.give_back(api_key)
        request = self._running.pop(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("streaming_request_failed", exc_info=error)
            request.fail(StreamInterrupted("internal error of the adapter"))
