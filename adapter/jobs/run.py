"""One run of a job on an engine: follows the stream and decides the outcome."""

import asyncio
from collections.abc import Awaitable, Callable

import structlog

from adapter.engine.follow import follow
from adapter.engine.pool import Endpoint, EnginePool
from adapter.errors import (
    ConnectionLost,
    DeadlineExceeded,
    EngineDead,
    EngineDraining,
    EngineError,
    InvalidRequest,
    Overloaded,
    Unavailable,
)
from adapter.jobs.job import ClaimedJob, Job, timeout_message
from adapter.jobs.outcome import Failed, Finished, Interrupted, Outcome, Snoozed
from adapter.telemetry.tracing import TRACEPARENT
from adapter.types import Event


class JobRun:
    """A job in flight at one endpoint, and the task that runs it.

    The task awaits `complete` with the outcome; its result is the task's result.
    """

    def __init__(
        self,
        job: ClaimedJob,
        pool: EnginePool,
        endpoint: Endpoint,
        complete: Callable[["JobRun", Outcome], Awaitable[Job | None]],
        *,
        exclusive: bool,
        idle_timeout: float,
    ) -> None:
        self.job = job
        self.pool = pool
        self._endpoint = endpoint
        self._complete = complete
        self._exclusive = exclusive
        self._idle_timeout = idle_timeout
        self._started = self._last_event = _now()
        self._has_slot = False
        self._following = False
        self._interruption: Outcome | None = None
        self.task = asyncio.create_task(self._run(), name=f"job-{job.id}")

    @property
    def seconds(self) -> float:
        """Time since the run started."""
        return _now() - self._started

    def interrupt(self, outcome: Outcome) -> None:
        """Close the stream and make this the outcome, unless there is one already."""
        if self._interruption is not None:
            return
        self._interruption = outcome
        # A task cancelled before its first step or while it records its outcome would lose it.
        if self._following:
            self.task.cancel()

    def on_engine_dead(self) -> None:
        """Interrupt the run if its engine is dead and another one could run the job."""
        state = self._endpoint.monitor.state
        if state.dead and self.pool.available:
            self.interrupt(Interrupted(state.reason))

    async def _run(self) -> Job | None:
        structlog.contextvars.bind_contextvars(
            job=self.job.id, request_id=self.job.options.request_id
        )
        TRACEPARENT.set(self.job.options.traceparent)
        return await self._complete(self, await self._outcome())

    async def _outcome(self) -> Outcome:
        if self._interruption is not None:
            return self._interruption
        self._following = True
        try:
            return await self._follow()
        except asyncio.CancelledError:
            if self._interruption is None:
                raise
            self.task.uncancel()
            return self._interruption
        finally:
            self._following = False

    async def _follow(self) -> Outcome:
        """Follow the stream to its end or to the job's deadline."""
        job = self.job
        try:
            event = await follow(
                self._endpoint,
                {**job.inputs, "exclusive": True} if self._exclusive else job.inputs,
                self._on_event,
                request_id=job.engine_request_id,
                priority=job.options.priority,
                api_key=job.options.api_key,
                deadline=job.time_left,
                idle_timeout=self._idle_timeout,
            )
        except DeadlineExceeded:
            return Failed(timeout_message(job.options.timeout or 0.0))
        except InvalidRequest as error:
            return Failed(str(error))
        except EngineError as error:
            return self._after(error)
        return Finished(event=event)

    def _on_event(self, event: Event) -> None:
        self._last_event = _now()
        self._has_slot = self._has_slot or not event.is_queued

    def _after(self, error: EngineError) -> Outcome:
        """The outcome after an engine's error: may the engine have begun the request?"""
        if isinstance(error, Overloaded | EngineDraining):
            return Snoozed(str(error))
        unheard = self._last_event == self._started  # the stream brought no event
        if isinstance(error, EngineDead) and unheard:
            return Snoozed(str(error))  # Triton says so of requests that came after the death
        may_be_cause = self._has_slot or (unheard and isinstance(error, ConnectionLost))
        if isinstance(error, Unavailable) and not may_be_cause:
            return Snoozed(str(error))
        return Interrupted(str(error))


def _now() -> float:
    return asyncio.get_running_loop().time()
