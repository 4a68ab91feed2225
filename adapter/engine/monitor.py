"""Is the engine alive? One monitor per worker, agreeing with the others through `HealStore`."""

import asyncio
from collections.abc import Callable
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from adapter.engine.doubts import Doubts
from adapter.engine.reload_lease import EngineRecord, HealStore
from adapter.engine.reloader import Healer
from adapter.errors import EngineDead, EngineError, InvalidRequest, StoreUnavailable
from adapter.periodic import PeriodicTask
from adapter.telemetry.logs import get_logger
from adapter.telemetry.metrics import ENGINE_READY
from adapter.types import Engine

log = get_logger()

MAX_TICK_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class EngineState:
    """What the monitor holds to be true."""

    ok: bool
    reason: str = ""
    #: Only a new process can help.
    dead: bool = False


READY = EngineState(ok=True)


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """What a probe has found."""

    #: The engine's epoch when the probe began: of a later one it says nothing.
    epoch: int
    #: When the probe began, on the event loop's clock.
    began: float
    state: EngineState
    #: There was no answer, which a busy engine may be forgiven.
    silent: bool = False
    #: Who has answered.
    process: str | None = None
    #: Of how many; looked up when there is a reason to.
    processes: int = 1


class EngineMonitor:
    """Watches the engine and has it replaced when it is dead; a context manager.

    A sign of life is any event of any stream, or an answered probe. `generation` grows whenever
    the engine was replaced: streams opened in an earlier one never get another event.
    """

    def __init__(
        self,
        engine: Engine,
        store: HealStore,
        *,
        probe_interval: float,
        idle_timeout: float,
        lease: float,
        heal: bool,
    ) -> None:
        self._engine = engine
        self._store = store
        self._healer = Healer(engine, store, lease=lease, enabled=heal)
        self._interval = probe_interval
        self._idle_timeout = idle_timeout
        self._tick = min(MAX_TICK_SECONDS, probe_interval)
        self._state = EngineState(ok=False, reason="the engine has not answered yet")
        self._generation = 0
        self._epoch: int | None = None
        self._died_in: int | None = None  # generation whose process is known to be gone
        self._last_heartbeat = 0.0
        self._published = 0.0
        self._probe_requested = False
        self._doubts = Doubts()
        self._probed = 0.0
        self._probe: asyncio.Task[ProbeResult] | None = None
        self._listeners: list[Callable[[], None]] = []
        self._loop = PeriodicTask("engine-monitor", self._step, on_error=self._lost_track)
        self._exit = AsyncExitStack()

    @property
    def state(self) -> EngineState:
        """Ready, or why not."""
        return self._state

    @property
    def epoch(self) -> int:
        """Number of the engine's present incarnation, as this worker counts."""
        return self._generation

    @property
    def last_heartbeat(self) -> float:
        """When this worker last heard from the engine, on the event loop's clock."""
        return self._last_heartbeat

    def subscribe(self, listener: Callable[[], None]) -> None:
        """Call it after every change of `state` or `generation`."""
        self._listeners.append(listener)

    def heartbeat(self) -> None:
        """A stream brought an event."""
        self._last_heartbeat = _now()

    def request_probe(self, error: EngineError | None = None) -> None:
        """A request failed in a way that may say something about the engine: probe it soon."""
        if isinstance(error, EngineDead):
            self._doubts.report(str(error), _now())
        self._probe_requested = True
        self._loop.wake()

    def dead_since(self, reason: str) -> float:
        """Since when the process that this names is said to be dead; ∞: it is not."""
        return self._doubts.reported(reason)

    async def __aenter__(self) -> Self:
        self._last_heartbeat = _now()
        ENGINE_READY.labels(self._store.engine).set(0)
        await self._exit.enter_async_context(self._loop)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._exit.aclose()
        if self._probe is not None:
            self._probe.cancel()
            await asyncio.wait([self._probe])
        try:
            await self._healer.stop()
        except StoreUnavailable as failure:
            log.warning("engine_record_kept", error=str(failure))

    async def _step(self) -> float:
        record = await self._store.read()
        self._adopt(record.epoch)
        await self._publish_life()
        if self._healer.busy:
            await self._healer.renew()
        if self._healer.busy or (record.healing and not record.abandoned):
            self._set_state(EngineState(ok=False, reason="the engine is being restarted"))
            return self._tick
        if self._probe is not None and self._probe.done():
            probe, self._probe = self._probe, None  # gone even if its result is an error
            self._apply_probe(probe.result(), record)
        if self._state.dead or record.abandoned:
            await self._healer.attempt(record.epoch, taken_over=record.abandoned)
        if self._probe is None and not self._healer.busy and self._probe_due() <= _now():
            self._start_probe(record.epoch)
        return self._pause()

    def _adopt(self, epoch: int) -> None:
        if self._epoch is not None and epoch != self._epoch:
            log.warning("engine_replaced", engine=self._store.engine, epoch=epoch)
            # What was known about its predecessor must not have the new one replaced as well.
            self._state = EngineState(ok=False, reason="the engine was restarted just now")
            self._next_generation()
        self._epoch = epoch

    async def _publish_life(self) -> None:
        """Share the sign of life, so that a worker without streams does not take busy for dead."""
        if self._last_heartbeat - self._published >= self._interval:
            self._published = self._last_heartbeat
            await self._store.publish_life()

    def _probe_due(self) -> float:
        soonest = self._probed + self._tick
        if self._state.ok and not self._probe_requested:
            return max(soonest, self._last_heartbeat + self._interval)
        return soonest

    def _pause(self) -> float:
        if self._probe is not None or self._healer.busy:
            return self._tick
        return min(self._tick, max(0.0, self._probe_due() - _now()))

    def _start_probe(self, epoch: int) -> None:
        self._probe_requested = False
        self._probe = asyncio.create_task(self._run_probe(epoch), name="engine-probe")
        self._probe.add_done_callback(lambda _task: self._loop.wake())

    async def _run_probe(self, epoch: int) -> ProbeResult:
        began = _now()
        silent, process, processes = False, None, 1
        try:
            async with asyncio.timeout(self._idle_timeout):
                process = await self._engine.probe()
            state = READY
        except TimeoutError:
            reason = f"the engine has not answered for {self._idle_timeout:g} s"
            state, silent = EngineState(ok=False, reason=reason, dead=True), True
        except EngineDead as error:
            state = EngineState(ok=False, reason=str(error), dead=True)
        except InvalidRequest:  # it does not like the probe, but it has read it
            state, process = READY, ""
        except EngineError as error:
            state = EngineState(ok=False, reason=str(error))
        finally:
            self._probed = _now()
        if self._doubts or state.dead:
            with suppress(EngineError):
                processes = await self._engine.processes()
        return ProbeResult(epoch, began, state, silent, process, processes)

    def _apply_probe(self, verdict: ProbeResult, record: EngineRecord) -> None:
        if verdict.epoch != record.epoch:
            return
        said_dead = verdict.state.dead and not verdict.silent
        if said_dead:
            self._doubts.report(verdict.state.reason, verdict.began)
        if said_dead or verdict.state.ok:
            self._doubts.probed(verdict.process, processes=verdict.processes)
        self._probe_requested |= bool(self._doubts)
        if verdict.state.ok:
            self.heartbeat()
            if self._died_in == self._generation:
                # Somebody else has replaced it, without a word in the database.
                self._next_generation()
            self._set_state(READY)
        elif verdict.silent:
            if min(_now() - self._last_heartbeat, record.silent_for) >= self._idle_timeout:
                self._set_state(verdict.state)
        elif (
            not said_dead
            or self._last_heartbeat <= verdict.began
            or self._doubts.confirmed(processes=verdict.processes)
        ):
            # Of several processes, one that answers later is another, and no successor.
            if said_dead and verdict.processes == 1:
                self._died_in = self._generation
            self._set_state(verdict.state)

    def _lost_track(self, error: Exception) -> None:
        self._set_state(EngineState(ok=False, reason=str(error)))

    def _next_generation(self) -> None:
        self._generation += 1
        self._doubts.clear()
        self._notify()

    def _set_state(self, state: EngineState) -> None:
        if state == self._state:
            return
        if state.ok != self._state.ok:
            write = log.info if state.ok else log.warning
            write("engine_state", engine=self._store.engine, ok=state.ok, reason=state.reason)
        self._state = state
        ENGINE_READY.labels(self._store.engine).set(state.ok)
        self._notify()

    def _notify(self) -> None:
        for listener in self._listeners:
            listener()


def _now() -> float:
    return asyncio.get_running_loop().time()
