"""The engines of one model: each has a monitor, and a request goes to the least busy one.

gRPC could balance calls, but it only sees connections: a server that is loading, or whose model has
died, accepts them too.
"""

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Self

from adapter.engine.affinity import Affinity
from adapter.engine.monitor import EngineMonitor, EngineState
from adapter.engine.validation_cache import ValidationCache
from adapter.errors import EngineError, InvalidRequest, Overloaded
from adapter.telemetry.metrics import ModelMetrics
from adapter.telemetry.tracing import add_step, request_span, set_failed
from adapter.types import Engine, Event, Inputs, ModelInfo

FIRST_PAUSE = 0.25
LONGEST_PAUSE = 8.0
#: Between two looks whether an engine that gets no more requests has finished its last ones. A
#: request that has just been given to it counts once its stream is open.
RETIRE_SECONDS = 3.0
#: Longest wait for an engine to say which model it serves.
DESCRIBE_SECONDS = 2.0


class Endpoint:
    """One engine, its monitor, and this worker's requests in flight there.

    `share_prefixes`: whether requests of different API keys share the engine's prefix cache.
    """

    def __init__(
        self,
        name: str,
        engine: Engine,
        monitor: EngineMonitor,
        metrics: ModelMetrics,
        *,
        share_prefixes: bool = False,
    ) -> None:
        self._share_prefixes = share_prefixes
        self.name = name
        self.engine = engine
        self.monitor = monitor
        self._metrics = metrics
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
        self._metrics.inflight.inc()
        span = request_span(request_id)

        def observe(event: Event) -> None:
            self.monitor.heartbeat()
            if not event.is_queued:
                add_step(span, event)
            if event.finish_reason:
                self._pause = 0.0
                if event.usage is not None:
                    self._metrics.count_usage(event.usage)

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
            self._metrics.inflight.dec()
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

    async def close(self) -> None:
        """Stop the monitor and close the connection."""
        await self.monitor.__aexit__()
        await self.engine.close()

    def _back_off(self) -> None:
        now = _now()
        if now >= self._not_before:  # one of many failures at once: they lengthen the pause once
            self._pause = min(LONGEST_PAUSE, max(FIRST_PAUSE, 2 * self._pause))
            self._not_before = now + self._pause


class EnginePool:
    """The endpoints of one model; a context manager that runs their monitors and closes them.

    Endpoints may come and go meanwhile.
    """

    def __init__(self, model: str, served_name: str = "") -> None:
        #: The model's name at Triton.
        self.model = model
        #: Its name in calls.
        self.served_name = served_name or model
        self.metrics = ModelMetrics(model)
        self.endpoints: tuple[Endpoint, ...] = ()
        self._retiring: dict[str, tuple[Endpoint, asyncio.Task[None]]] = {}
        self._affinity = Affinity()
        self._listeners: list[Callable[[], None]] = []
        self._turn = 0

    async def add(self, endpoint: Endpoint) -> None:
        """Give requests to this endpoint, too."""
        for listener in self._listeners:
            endpoint.monitor.subscribe(listener)
        await endpoint.monitor.__aenter__()
        self.endpoints = (*self.endpoints, endpoint)

    def bring_back(self, name: str) -> bool:
        """Give requests again to the endpoint of this name if it has not finished its last ones."""
        endpoint, task = self._retiring.pop(name, (None, None))
        if endpoint is None or task is None:
            return False
        task.cancel()
        self.endpoints = (*self.endpoints, endpoint)
        return True

    def retire(self, endpoint: Endpoint) -> None:
        """Give this endpoint no more requests, and close it once it has finished its last ones."""
        self.endpoints = tuple(other for other in self.endpoints if other is not endpoint)
        task = asyncio.create_task(self._finish(endpoint), name=f"retire-{endpoint.name}")
        self._retiring[endpoint.name] = (endpoint, task)

    async def _finish(self, endpoint: Endpoint) -> None:
        while True:
            await asyncio.sleep(RETIRE_SECONDS)
            if not endpoint.inflight:
                break
        del self._retiring[endpoint.name]
        await endpoint.close()

    @property
    def state(self) -> EngineState:
        """Ready if one endpoint is; else the reasons of all."""
        states = [endpoint.monitor.state for endpoint in self.endpoints]
        for state in states:
            if state.ok:
                return state
        if not states:
            return EngineState(ok=False, reason=f"no tritonserver has the model {self.model!r}")
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

    def pick(
        self, inputs: Inputs | None = None, *, include_backing_off: bool = False
    ) -> Endpoint | None:
        """The endpoint for a request, or None: see `Affinity.choose`.

        Without `inputs`, it is the one with the fewest requests of this worker in flight.
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
        if len(available) > 1 and inputs is not None:
            return self._affinity.choose(inputs, available)
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
        for endpoint in self._all():
            endpoint.engine.cancel(request_id)

    def subscribe(self, listener: Callable[[], None]) -> None:
        """Call `listener` after every change of an endpoint's state."""
        self._listeners.append(listener)
        for endpoint in self._all():
            endpoint.monitor.subscribe(listener)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        for _endpoint, task in self._retiring.values():
            task.cancel()
        for endpoint in self._all():
            await endpoint.close()

    def _all(self) -> list[Endpoint]:
        return [*self.endpoints, *(endpoint for endpoint, _ in self._retiring.values())]


def _now() -> float:
    return asyncio.get_running_loop().time()
