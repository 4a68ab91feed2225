"""Several tritonservers as one: each has a monitor, and a request goes to the least busy one.

gRPC could balance calls, but it only sees connections: a server that is loading, or whose model has
died, accepts them too.
"""

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager
from types import TracebackType
from typing import Self

from adapter.engine.monitor import EngineMonitor, EngineState
from adapter.engine.validation_cache import ValidationCache
from adapter.errors import EngineError, InvalidRequest, Overloaded
from adapter.telemetry.metrics import INFLIGHT, count_usage
from adapter.telemetry.tracing import add_step, request_span, set_failed
from adapter.types import Engine, Event, Inputs, ModelInfo

FIRST_PAUSE = 0.25
LONGEST_PAUSE = 8.0
#: Longest wait for an engine to say which model it serves.
DESCRIBE_SECONDS = 2.0


class Endpoint:
    """One engine, its monitor, and this worker's requests in flight there.

    `share_prefixes`: whether requests of different API keys share the engine's prefix cache.
    """

    def __init__(
        self, name: str, engine: Engine, monitor: EngineMonitor, *, share_prefixes: bool = False
    ) -> None:
        self._share_prefixes = share_prefixes
        self.name = name
        self.engine = engine
        self.monitor = monitor
        self.inflight = 0
        self._accepted = ValidationCache()
        self._described: tuple[int, ModelInfo] | None = None
        self._pause = 0.0
        self._not_before = 0.0
        self._failed_at = 0.0

    @property
    def available(self) -> bool:
        """Whether to send it jobs: it responds, and has done so since its last failure.

        Otherwise jobs would go on to an engine that hangs until the monitor takes it for dead.
        """
        responds = self.monitor.state.ok and self.monitor.last_heartbeat >= self._failed_at
        return responds and self.backoff_left <= 0

    @property
    def backoff_left(self) -> float:
        """Seconds until it may get requests again; negative when it may."""
        return self._not_before - _now()

    def salted(self, inputs: Inputs, api_key: str | None) -> Inputs:
        """The inputs with the salt of the key: only requests of one salt share cached prefixes.

        Otherwise a caller could learn, from `cached_tokens` or the time to an answer, whether
        another one has sent a prompt with the same beginning.
        """
        if api_key is None or self._share_prefixes:
            return inputs
        return {**inputs, "cache_salt": api_key}

    @contextmanager
    def track(self, request_id: str) -> Iterator[Callable[[Event], None]]:
        """Account for one request while it runs here; call the result with each of its events."""
        self.inflight += 1
        INFLIGHT.inc()
        span = request_span(request_id)

        def observe(event: Event) -> None:
            self.monitor.heartbeat()
            if not event.is_queued:
                add_step(span, event)
            if event.finish_reason:
                self._pause = 0.0
                if event.usage is not None:
                    count_usage(event.usage)

        try:
            yield observe
        except InvalidRequest as error:
            set_failed(span, error)
            raise
        except EngineError as error:
            set_failed(span, error)
            self._back_off()
            if not isinstance(error, Overloaded):
                self._failed_at = _now()
                self.monitor.request_probe()
            raise
        finally:
            self.inflight -= 1
            INFLIGHT.dec()
            span.end()

    async def check(self, requests: Sequence[Inputs]) -> dict[int, str]:
        """Ask which requests it would refuse; the reasons by index. Raises an `EngineError`."""
        epoch = self.monitor.epoch
        unknown = [
            index
            for index, inputs in enumerate(requests)
            if not self._accepted.covers(inputs, epoch)
        ]
        if not unknown:
            return {}
        results = await self.engine.check([requests[index] for index in unknown])
        self.monitor.heartbeat()
        found = dict(zip(unknown, results, strict=True))
        for index, result in found.items():
            if not result.refusal:
                self._accepted.add(requests[index], epoch, headroom=result.headroom)
        return {index: result.refusal for index, result in found.items() if result.refusal}

    async def describe(self) -> ModelInfo:
        """Ask which model is served, once for each process. Raises an `AdapterError`."""
        epoch = self.monitor.epoch
        if self._described is None or self._described[0] != epoch:
            self._described = epoch, await self.engine.describe()
        return self._described[1]

    def _back_off(self) -> None:
        now = _now()
        if now >= self._not_before:  # one of many failures at once: they lengthen the pause once
            self._pause = min(LONGEST_PAUSE, max(FIRST_PAUSE, 2 * self._pause))
            self._not_before = now + self._pause


class EnginePool:
    """All endpoints; a context manager that runs their monitors and closes their engines."""

    def __init__(self, endpoints: Sequence[Endpoint]) -> None:
        self.endpoints = tuple(endpoints)
        self._turn = 0
        self._exit = AsyncExitStack()

    @property
    def state(self) -> EngineState:
        """Ready if one endpoint is; else the reasons of all."""
        states = [endpoint.monitor.state for endpoint in self.endpoints]
        for state in states:
            if state.ok:
                return state
        if len(states) == 1:
            return states[0]
        reasons = [f"{m.name}: {m.monitor.state.reason}" for m in self.endpoints]
        return EngineState(ok=False, reason="; ".join(reasons))

    @property
    def available(self) -> bool:
        """Whether `pick` finds an endpoint."""
        return any(endpoint.available for endpoint in self.endpoints)

    @property
    def backoff_left(self) -> float:
        """Seconds until an endpoint that answers stops backing off."""
        return min((m.backoff_left for m in self.endpoints if m.monitor.state.ok), default=0.0)

    @property
    def unavailable_reason(self) -> str:
        """Why `pick` finds no endpoint."""
        return self.state.reason or "the engine has just refused requests"

    def pick(self, *, include_backing_off: bool = False) -> Endpoint | None:
        """The endpoint with the fewest requests of this worker in flight, or None.

        `include_backing_off`: also one that is backing off, for a caller that cannot wait.
        Equals take turns, since a request counts only once its stream is open.
        """
        self._turn += 1
        count = len(self.endpoints)
        in_turn = (self.endpoints[(self._turn + step) % count] for step in range(count))
        available = [
            endpoint
            for endpoint in in_turn
            if endpoint.available or (include_backing_off and endpoint.monitor.state.ok)
        ]
        return min(available, key=lambda endpoint: endpoint.inflight, default=None)

    async def describe(self) -> ModelInfo:
        """An engine's description of its model; empty while no engine answers.

        An engine of an earlier release knows no such question.
        """
        endpoint = self.pick(include_backing_off=True)
        if endpoint is None:
            return ModelInfo()
        try:
            async with asyncio.timeout(DESCRIBE_SECONDS):
                return await endpoint.describe()
        except (TimeoutError, EngineError, InvalidRequest):
            return ModelInfo()

    def cancel(self, request_id: str) -> None:
        """Cancel the requests with this id at every endpoint."""
        for endpoint in self.endpoints:
            endpoint.engine.cancel(request_id)

    def subscribe(self, listener: Callable[[], None]) -> None:
        """Call `listener` after every change of an endpoint's state."""
        for endpoint in self.endpoints:
            endpoint.monitor.subscribe(listener)

    async def __aenter__(self) -> Self:
        for endpoint in self.endpoints:
            self._exit.push_async_callback(endpoint.engine.close)
            await self._exit.enter_async_context(endpoint.monitor)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._exit.aclose()


def _now() -> float:
    return asyncio.get_running_loop().time()
