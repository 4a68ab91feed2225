"""One job on its way through the engine: follows its stream, and says what became of it."""

import asyncio
from contextlib import aclosing
from dataclasses import dataclass, field

from adapter.engine.pool import Endpoint
from adapter.errors import (
    EngineDead,
    EngineDraining,
    EngineError,
    InvalidRequest,
    Overloaded,
    Unavailable,
)
from adapter.jobs.job import ClaimedJob, Job, late
from adapter.jobs.outcome import Failed, Finished, Lost, Outcome, Postponed


@dataclass(slots=True, eq=False)
class Drive:
    """A job, the engine that runs it, and the task that follows its stream."""

    job: ClaimedJob
    endpoint: Endpoint
    #: The engine's, at the start.
    generation: int
    opened_at: float
    last_event: float
    started: bool = False
    #: The engine has given it a place, and so may have died of it.
    begun: bool = False
    settling: bool = False
    imposed: Outcome | None = None
    task: asyncio.Task[Job | None] | None = field(default=None, repr=False)

    @classmethod
    def begin(cls, job: ClaimedJob, endpoint: Endpoint) -> "Drive":
        """From now on; its task is the caller's."""
        now = _now()
        return cls(job, endpoint, endpoint.monitor.epoch, opened_at=now, last_event=now)

    @property
    def seconds(self) -> float:
        """Since it began."""
        return _now() - self.opened_at

    def impose(self, outcome: Outcome) -> None:
        """Close the stream and let this be the outcome, unless it has one already."""
        if self.settling or self.imposed is not None:
            return
        self.imposed = outcome
        # A task that is cancelled before its first step would never get to write anything.
        if self.started and self.task is not None:
            self.task.cancel()

    def lose_to_replacement(self, *, elsewhere: bool) -> None:
        """Impose what the engine's death means for it; `elsewhere`: another engine could run it."""
        monitor = self.endpoint.monitor
        if self.generation < monitor.epoch:
            self.impose(Lost("the engine that ran it was replaced"))
        elif monitor.state.dead and elsewhere:
            # Where there is no other engine, the job may as well wait for the news to be sure.
            self.impose(Lost(monitor.state.reason))

    def lose_if_silent(self, idle_timeout: float) -> None:
        """A stream that fell silent long before the engine's last sign of life was lost."""
        silent = _now() - self.last_event > idle_timeout
        if silent and self.endpoint.monitor.last_heartbeat > self.last_event + idle_timeout / 2:
            self.impose(Lost(f"its stream was silent for {idle_timeout:g} s"))

    async def outcome(self, *, alone: bool) -> Outcome:
        """Follow the stream to what was imposed meanwhile, or to its own end."""
        self.started = True
        try:
            outcome = self.imposed or await self._follow(alone=alone)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if self.imposed is None or task is None:
                raise
            task.uncancel()
            outcome = self.imposed
        self.settling = True
        return outcome

    async def _follow(self, *, alone: bool) -> Outcome:
        """Read the stream to its end, or until the job's deadline."""
        job = self.job
        inputs = {**job.inputs, "alone": True} if alone else job.inputs
        stream = self.endpoint.generate(
            inputs, request_id=job.engine_request_id, priority=job.terms.priority
        )
        try:
            async with asyncio.timeout(job.time_left), aclosing(stream) as events:
                async for event in events:
                    self.last_event = _now()
                    self.begun = self.begun or not event.waits
                    if event.finish_reason == "cancelled":
                        return Lost("the engine cancelled it")
                    if event.finish_reason:
                        return Finished(event)
        except TimeoutError:
            return Failed(late(job.terms.timeout or 0.0))
        except InvalidRequest as error:
            return Failed(str(error))
        except EngineError as error:
            return self._after(error)
        return Lost("the engine ended the stream without a result")

    def _after(self, error: EngineError) -> Outcome:
        """What the engine's error means for the job: did it see the request at all?"""
        if isinstance(error, Overloaded | EngineDraining):
            return Postponed(str(error))
        if isinstance(error, Unavailable):
            # A connection breaks under what runs when tritonserver goes down with it.
            return Lost(str(error)) if self.begun else Postponed(str(error))
        monitor = self.endpoint.monitor
        dead_since = monitor.last_heartbeat
        if self.last_event == self.opened_at:  # it has seen nothing of the engine
            dead_since = min(dead_since, monitor.dead_since(str(error)))
        if isinstance(error, EngineDead) and self.opened_at > dead_since:
            # It was dead before it could see the request. Otherwise the request may have done it.
            return Postponed(str(error))
        return Lost(str(error))


def _now() -> float:
    return asyncio.get_running_loop().time()
