"""Claims queued jobs, runs them on an engine, records their outcome. One per worker process."""

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from typing import Self

from adapter.engine.fleet import Fleet
from adapter.engine.pool import EnginePool
from adapter.errors import StoreUnavailable
from adapter.jobs.claims import final_attempt
from adapter.jobs.job import ClaimedJob, Job
from adapter.jobs.outcome import Finished, Outcome, Snoozed, Superseded
from adapter.jobs.run import JobRun
from adapter.jobs.store import JobStore
from adapter.periodic import PeriodicTask
from adapter.settings import Settings
from adapter.telemetry.logs import get_logger
from adapter.telemetry.metrics import JOBS_SETTLED

log = get_logger()

Listener = Callable[[int, Job | None], None]

MAX_TICK_SECONDS = 1.0
PURGE_BATCH = 500
CLAIM_BATCH = 16
FIRST_SAVE_PAUSE = 0.2
LONGEST_SAVE_PAUSE = 2.0
#: Time that a stopping worker takes to release its jobs, after the drain.
RELEASE_SECONDS = 2.0
#: After an outage of the database all workers renew their leases before any rescues jobs; this is
#: the least time for it, and the most that a worker waits after its start, as it may have missed
#: an outage.
RECOVERY_SECONDS = 5.0
#: One engine step may end many jobs at once. Only so many are recorded between two turns of the
#: event loop, so that polls do not wait for all of them.
MAX_CONCURRENT_COMPLETIONS = 4


class JobRunner:
    """One worker's share of all jobs; a context manager.

    Leaving it lets running jobs finish for some seconds, then releases the rest for other workers
    or for the next start.
    """

    def __init__(self, store: JobStore, fleet: Fleet, *, owner: str, settings: Settings) -> None:
        self._store = store
        self._fleet = fleet
        self._owner = owner
        self._max_inflight = settings.max_inflight
        self._lease = settings.lease_seconds
        self._poll_interval = settings.poll_interval
        self._idle_timeout = settings.engine_idle_timeout
        self._result_ttl = settings.result_ttl
        self._final_attempt = final_attempt(settings.job_max_attempts)
        self._drain = settings.drain_seconds
        self._listeners: list[Listener] = []
        self._runs: dict[int, JobRun] = {}
        self._running: Counter[str] = Counter()
        self._completing = asyncio.Semaphore(MAX_CONCURRENT_COMPLETIONS)
        self._full = False
        self._stopped_at: float | None = None
        self._claiming = PeriodicTask("job-claims", self._claim)
        self._maintenance = PeriodicTask(
            "job-maintenance", self._maintain, on_error=self._maintenance_failed
        )
        self._rescue_after = 0.0
        #: The tasks that claim and maintain.
        self.loops = (self._claiming, self._maintenance)
        self._exit = AsyncExitStack()

    @property
    def inflight(self) -> int:
        """The number of jobs that this worker runs."""
        return len(self._runs)

    def listen(self, listener: Listener) -> None:
        """Call `listener` when a job leaves this worker, with the job if it is in a final state.

        Without a job, another worker may have it, or it may be queued again.
        """
        self._listeners.append(listener)

    def owns(self, job_id: int, api_key: str | None = None) -> bool:
        """Whether this worker runs the job, and it belongs to the key, if there is one."""
        run = self._runs.get(job_id)
        return run is not None and api_key in (None, run.job.options.api_key)

    def wake(self) -> None:
        """Claim now: there is a new job."""
        self._claiming.wake()

    def cancelled(self, job: Job) -> None:
        """End the run of a job that was cancelled in the store, here or at another worker."""
        if (run := self._runs.get(job.id)) is not None:
            run.interrupt(Superseded())
        elif job.engine_request_id is not None:
            self._fleet.cancel(job.engine_request_id)

    def stop(self) -> None:
        """Claim no more jobs: this worker is about to end."""
        if self._stopped_at is None:
            self._stopped_at = _now()
            self._claiming.stop()

    async def __aenter__(self) -> Self:
        self._rescue_after = _now() + min(self._lease / 2, RECOVERY_SECONDS)
        self._fleet.subscribe(self._engines_changed)
        await self._exit.enter_async_context(self._maintenance)
        self._exit.push_async_callback(self._release_all)
        await self._exit.enter_async_context(self._claiming)
        return self

    async def __aexit__(self, *_: object) -> None:
        self.stop()
        await self._exit.aclose()

    async def _release_all(self) -> None:
        """Release jobs that do not finish in time; until then their leases are renewed."""
        runs = list(self._runs.values())
        tasks = [run.task for run in runs]
        if not tasks or self._stopped_at is None:
            return
        await asyncio.wait(tasks, timeout=max(0.0, self._stopped_at + self._drain - _now()))
        for run in runs:
            run.interrupt(Snoozed("this worker stops"))
        _, late = await asyncio.wait(tasks, timeout=RELEASE_SECONDS)
        if late:
            log.warning("jobs_not_released", count=len(late))
            for task in late:
                task.cancel()
            await asyncio.wait(late, timeout=RELEASE_SECONDS)

    def _engines_changed(self) -> None:
        for run in list(self._runs.values()):
            run.on_engine_dead()
        self._claiming.wake()

    async def _claim(self) -> float:
        """Claim as many queued jobs of each model as it has free slots."""
        pools = self._fleet.pools
        available = [pool for pool in pools if pool.available]
        if self._stopped_at is not None or not available:
            return max(self._poll_interval, min(pool.backoff_left for pool in pools))
        models = [pool.model for pool in available]
        self._full = False
        return min([await self._claim_for(pool, models) for pool in available])

    async def _claim_for(self, pool: EnginePool, available: Sequence[str]) -> float:
        """Claim jobs of one model; the pause until the next time."""
        free = self._max_inflight - self._running[pool.model]
        if free <= 0:
            self._full = True
            return self._poll_interval
        limit = min(free, CLAIM_BATCH)
        claimed = await self._store.claim(
            self._owner,
            limit=limit,
            lease=self._lease,
            model=pool.model,
            available_models=available,
        )
        for job in claimed:
            await self._start(job, pool)
            # Opening a stream takes about a millisecond: let others in between.
            await asyncio.sleep(0)
        is_full = len(claimed) == free
        self._full = self._full or is_full
        return self._poll_interval if len(claimed) < limit or is_full else 0.0

    async def _start(self, job: ClaimedJob, pool: EnginePool) -> None:
        endpoint = pool.pick(job.inputs) or next(iter(pool.endpoints), None)
        if endpoint is None:  # the model's last server has just gone
            await self._store.release(job)
            return
        if (stale := self._runs.get(job.id)) is not None:
            # Our lease ran out, and we claimed the job again.
            stale.interrupt(Superseded())
        pool.metrics.queue_seconds.observe(job.waited)
        self._running[pool.model] += 1
        run = self._runs[job.id] = JobRun(
            job,
            pool,
            endpoint,
            self._complete,
            # No other job runs then; the engine also holds streams and other clients back.
            exclusive=job.attempts >= self._final_attempt,
            idle_timeout=self._idle_timeout,
        )
        run.task.add_done_callback(lambda task: self._ended(run, task))

    async def _complete(self, run: JobRun, outcome: Outcome) -> Job | None:
        """Record the outcome; the job if that is final.

        While the database is away, this tries again until the worker has to end; then the lease
        expires and the job runs again.
        """
        JOBS_SETTLED.labels(outcome.kind).inc()
        if isinstance(outcome, Finished):
            run.pool.metrics.run_seconds.observe(run.seconds)
        pause = FIRST_SAVE_PAUSE
        while True:
            try:
                async with self._completing:
                    job = await self._store.settle(run.job, outcome)
                    await asyncio.sleep(0)
            except StoreUnavailable as error:
                if pause == FIRST_SAVE_PAUSE:
                    log.warning("job_not_saved", error=str(error))
            else:
                log.info("job_settled", outcome=outcome.kind, reason=outcome.reason)
                return job
            if self._stopped_at is not None and _now() >= self._stopped_at + self._drain:
                return None
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST_SAVE_PAUSE)

    def _ended(self, run: JobRun, task: asyncio.Task[Job | None]) -> None:
        """Forget the run; after an unexpected error the job's row stays until its lease expires."""
        self._running[run.pool.model] -= 1
        if self._runs.get(run.job.id) is run:
            del self._runs[run.job.id]
        job = None
        if not task.cancelled():
            if (error := task.exception()) is not None:
                log.error("job_failed_unexpectedly", job=run.job.id, exc_info=error)
            else:
                job = task.result()
        for listener in self._listeners:
            listener(run.job.id, job)
        if self._full:
            self._claiming.wake()

    async def _maintain(self) -> float:
        """Renew leases, stop runs of lost jobs, rescue other workers' jobs, fail overdue ones,
        clean up."""
        runs = dict(self._runs)
        if runs:
            kept = await self._store.renew(self._owner, runs, lease=self._lease)
            for job_id in runs.keys() - kept:
                runs[job_id].interrupt(Superseded())
        if _now() >= self._rescue_after and (rescued := await self._store.requeue_expired()):
            log.warning("jobs_rescued", count=rescued)
            self._claiming.wake()
        if overdue := await self._store.fail_overdue():
            log.info("jobs_overdue", count=overdue)
        await self._store.purge(ttl=self._result_ttl, limit=PURGE_BATCH)
        await self._store.purge_idempotency_keys(ttl=self._result_ttl)
        return min(MAX_TICK_SECONDS, self._lease / 3)

    def _maintenance_failed(self, _error: Exception) -> None:
        """Leave other workers the time to renew the leases that expired during an outage."""
        self._rescue_after = _now() + max(self._lease, RECOVERY_SECONDS)


def _now() -> float:
    return asyncio.get_running_loop().time()
