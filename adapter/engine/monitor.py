"""Tells whether an engine answers. Each worker has a monitor for each engine."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

from adapter.errors import EngineDead, EngineError, InvalidRequest
from adapter.periodic import PeriodicTask
from adapter.telemetry.logs import get_logger
from adapter.telemetry.metrics import ENGINE_READY, TASK_LAST_STEP, forget
from adapter.types import Engine

log = get_logger()

MAX_TICK_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class EngineState:
    """Whether requests may be sent to the engine."""

    ok: bool
    reason: str = ""
    #: Only a new process can help.
    dead: bool = False


READY = EngineState(ok=True)


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """The outcome of one probe."""

    state: EngineState
    #: When the probe began, on the event loop's clock.
    began: float


class EngineMonitor:
    """Probes one engine when it is silent; a context manager.

    Any event of any stream and any answered probe is a heartbeat.
    """

    def __init__(
        self,
        name: str,
        engine: Engine,
        *,
        model: str,
        probe_interval: float,
        idle_timeout: float,
    ) -> None:
        self._labels = (name, model)
        self._engine = engine
        self._interval = probe_interval
        self._idle_timeout = idle_timeout
        self._tick = min(MAX_TICK_SECONDS, probe_interval)
        self._state = EngineState(ok=False, reason="the engine has not answered yet")
        self._epoch = 0
        self._last_heartbeat = 0.0
        self._last_probe = 0.0
        self._probe_requested = False
        self._probe: asyncio.Task[ProbeResult] | None = None
        self._listeners: list[Callable[[], None]] = []
        #: The task that probes.
        self.loop = PeriodicTask(f"engine-monitor-{model}-{name}", self._step)

    @property
    def state(self) -> EngineState:
        """Ready, or why not."""
        return self._state

    @property
    def epoch(self) -> int:
        """How often the engine has become ready; it may be another process each time."""
        return self._epoch

    @property
    def last_heartbeat(self) -> float:
        """When this worker last heard from the engine, on the event loop's clock."""
        return self._last_heartbeat

    def subscribe(self, listener: Callable[[], None]) -> None:
        """Call `listener` after every change of `state`."""
        self._listeners.append(listener)

    def heartbeat(self) -> None:
        """Note that a stream has brought an event."""
        self._last_heartbeat = _now()

    def request_probe(self) -> None:
        """Probe the engine soon: a request has failed."""
        self._probe_requested = True
        self.loop.wake()

    async def __aenter__(self) -> Self:
        self._last_heartbeat = _now()
        ENGINE_READY.labels(*self._labels).set(0)
        await self.loop.__aenter__()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.loop.__aexit__()
        if self._probe is not None:
            self._probe.cancel()
            await asyncio.wait([self._probe])
        forget(ENGINE_READY, *self._labels)
        forget(TASK_LAST_STEP, self.loop.name)

    async def _step(self) -> float:
        if self._probe is not None and self._probe.done():
            probe, self._probe = self._probe, None  # gone even if its result is an error
            self._apply_probe(probe.result())
        if self._probe is None and self._probe_due() <= _now():
            self._start_probe()
        if self._probe is not None:
            return self._tick
        return min(self._tick, max(0.0, self._probe_due() - _now()))

    def _probe_due(self) -> float:
        soonest = self._last_probe + self._tick
        if self._state.ok and not self._probe_requested:
            return max(soonest, self._last_heartbeat + self._interval)
        return soonest

    def _start_probe(self) -> None:
        self._probe_requested = False
        self._probe = asyncio.create_task(self._run_probe(), name="engine-probe")
        self._probe.add_done_callback(lambda _task: self.loop.wake())

    async def _run_probe(self) -> ProbeResult:
        began = _now()
        try:
            async with asyncio.timeout(self._idle_timeout):
                await self._engine.probe()
            state = READY
        except TimeoutError:
            reason = f"the engine has not answered for {self._idle_timeout:g} s"
            state = EngineState(ok=False, reason=reason, dead=True)
        except EngineDead as error:
            state = EngineState(ok=False, reason=str(error), dead=True)
        except InvalidRequest:  # the engine has read the probe
            state = READY
        except EngineError as error:
            state = EngineState(ok=False, reason=str(error))
        finally:
            self._last_probe = _now()
        return ProbeResult(state, began)

    def _apply_probe(self, result: ProbeResult) -> None:
        if result.state.ok:
            self.heartbeat()
        elif result.state.dead and self._last_heartbeat > result.began:
            # A host short of processor time: Triton reports a process as dead that still answers.
            self._probe_requested = True
            return
        self._set_state(result.state)

    def _set_state(self, state: EngineState) -> None:
        if state == self._state:
            return
        if state.ok != self._state.ok:
            write = log.info if state.ok else log.warning
            name, model = self._labels
            write("engine_state", engine=name, model=model, ok=state.ok, reason=state.reason)
            self._epoch += state.ok
        self._state = state
        ENGINE_READY.labels(*self._labels).set(state.ok)
        for listener in self._listeners:
            listener()


def _now() -> float:
    return asyncio.get_running_loop().time()
