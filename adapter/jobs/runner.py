"""One worker's share of the jobs: claims them, has them driven, settles what became of them."""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack, contextmanager
from types import TracebackType
from typing import Self, assert_never

import structlog

from adapter.engine.pool import EnginePool
from adapter.errors import StoreUnavailable
from adapter.jobs.claims import lost_before_last
from adapter.jobs.job import ClaimedJob, Job, JobState, Terms
from adapter.jobs.outcome import (
    Dropped,
    Failed,
    Finished,
    Lost,
    Outcome,
    Postponed,
    kind_of,
    reason_of,
)
from adapter.jobs.run import Drive
from adapter.jobs.store import JobStore
from adapter.periodic import PeriodicTask
from adapter.settings import Settings
from adapter.telemetry.logs import get_logger
from adapter.telemetry.metrics import JOB_QUEUE_SECONDS, JOB_RUN_SECONDS, JOBS_SETTLED
from adapter.telemetry.tracing import TRACEPARENT
from adapter.types import Inputs

log = get_logger()

Listener = Callable[[int, Job | None], None]

MAX_TICK_SECONDS = 1.0
PURGE_BATCH = 500
CLAIM_BATCH = 16
SAVE_ATTEMPTS = 6
#: An engine's step ends many jobs at once; so many of them are settled between two looks at what
#: else is to be done, or polls would wait for all.
SETTLED_AT_ONCE = 4


class JobRunner:
    """One worker's share of all jobs; a context manager.

    Leaving it gives the running jobs some seconds, and then puts back what is not done, for the
    other workers or for the next start.
    """

    def __init__(
        self,
        store: JobStore,
        pool: EnginePool,
        *,
        owner: str,
        settings: Settings,
    ) -> None:
        self._store = store
        self._pool = pool
        self._owner = owner
        self._max_inflight = settings.max_inflight
        self._lease = settings.lease_seconds
        self._poll_interval = settings.poll_interval
        self._idle_timeout = settings.engine_idle_timeout
        self._result_ttl = settings.result_ttl
        self._lost_before_last = lost_before_last(settings.job_max_attempts)
        self._drain = settings.drain_seconds
        self._listeners: list[Listener] = []
        self._drives: dict[int, Drive] = {}
        self._promised = 0
        self._settling = asyncio.Semaphore(SETTLED_AT_ONCE)
        self._full = False
        self._stopped_at: float | None = None
        self._claiming = PeriodicTask("job-claims", self._claim)
        self._caring = PeriodicTask("job-care", self._care)
        self._exit = AsyncExitStack()

    @property
    def inflight(self) -> int:
        """How many jobs this worker drives now."""
        return len(self._drives)

    def listen(self, listener: Listener) -> None:
        """Call it whenever a job leaves this worker, with the job if nothing changes it any more.

        Without, it may be another worker's, or wait again.
        """
        self._listeners.append(listener)

    def drives(self, job_id: int, api_key: str | None = None) -> bool:
        """This worker has the job, which is this key's if one is given; listeners will be told."""
        drive = self._drives.get(job_id)
        return drive is not None and api_key in (None, drive.job.terms.api_key)

    async def take_in(self, request: Inputs, terms: Terms, *, max_queued: int) -> int:
        """Store a new job, and begin it at once where it need not wait; its id.

        Raises `TooManyJobs`.
        """
        if self._stopped_at is not None or not self._pool.available or self._room <= 0:
            (job_id,) = await self._store.add([request], max_queued=max_queued, terms=terms)
            self.wake()
            return job_id
        with self._promise(1):
            job_id, claimed = await self._store.add_claimed(
                request, self._owner, lease=self._lease, max_queued=max_queued, terms=terms
            )
        if claimed is None:
            self.wake()
            return job_id
        self._start(claimed)
        # Its task begins first, so that the stream is opened while the caller is told.
        await asyncio.sleep(0)
        return job_id

    def wake(self) -> None:
        """There is a new job."""
        self._claiming.wake()

    def cancelled(self, job: Job) -> None:
        """The job was cancelled in the store: close its stream, or end it for its worker."""
        if (drive := self._drives.get(job.id)) is not None:
            drive.impose(Dropped())
        elif job.engine_request_id is not None:
            self._pool.cancel(job.engine_request_id)

    def stop(self) -> None:
        """Take up no more jobs: this worker is about to end."""
        if self._stopped_at is None:
            self._stopped_at = _now()

    async def __aenter__(self) -> Self:
        self._pool.subscribe(self._engines_changed)
        await self._exit.enter_async_context(self._caring)
        self._exit.push_async_callback(self._put_back_all)
        await self._exit.enter_async_context(self._claiming)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()
        await self._exit.aclose()

    async def _put_back_all(self) -> None:
        """Put back what does not finish in time; until then the leases are renewed."""
        drives = list(self._drives.values())
        tasks = [drive.task for drive in drives if drive.task is not None]
        if not tasks or self._stopped_at is None:
            return
        await asyncio.wait(tasks, timeout=max(0.0, self._stopped_at + self._drain - _now()))
        for drive in drives:
            drive.impose(Postponed("this worker stops"))
        await asyncio.wait(tasks)

    def _engines_changed(self) -> None:
        elsewhere = self._pool.pick() is not None
        for drive in list(self._drives.values()):
            drive.lose_to_replacement(elsewhere=elsewhere)
        self._claiming.wake()

    async def _claim(self) -> float:
        """Take up as many queued jobs as there is room for."""
        if self._stopped_at is not None or not self._pool.available:
            return max(self._pool.backoff_left, self._poll_interval)
        room = self._room
        self._full = room <= 0
        if self._full:
            return self._poll_interval
        limit = min(room, CLAIM_BATCH)
        with self._promise(limit):
            claimed = await self._store.claim(self._owner, limit=limit, lease=self._lease)
            for job in claimed:
                self._start(job)
                # Opening a stream takes a millisecond or so: let others in between.
                await asyncio.sleep(0)
        self._full = len(claimed) == room
        return self._poll_interval if len(claimed) < limit or self._full else 0.0

    @property
    def _room(self) -> int:
        return self._max_inflight - len(self._drives) - self._promised

    @contextmanager
    def _promise(self, places: int) -> Iterator[None]:
        """Keep them from others while it is being found out which jobs they are for."""
        self._promised += places
        try:
            yield
        finally:
            self._promised -= places

    def _start(self, job: ClaimedJob) -> None:
        if (stale := self._drives.get(job.id)) is not None:
            # Our own lease ran out, and we were the one to take the job up again.
            stale.impose(Dropped())
        endpoint = self._pool.pick() or self._pool.endpoints[0]
        drive = self._drives[job.id] = Drive.begin(job, endpoint)
        drive.task = asyncio.create_task(self._run(drive), name=f"job-{job.id}")
        drive.task.add_done_callback(lambda task: self._ended(drive, task))

    def _ended(self, drive: Drive, task: asyncio.Task[Job | None]) -> None:
        """Forget the drive; one that broke keeps its row until the lease runs out."""
        if self._drives.get(drive.job.id) is drive:
            del self._drives[drive.job.id]
        done = None
        if not task.cancelled():
            if (error := task.exception()) is not None:
                log.error("job_broken", job=drive.job.id, exc_info=error)
            else:
                done = task.result()
        for listener in self._listeners:
            listener(drive.job.id, done)
        if self._full:
            self._claiming.wake()

    async def _run(self, drive: Drive) -> Job | None:
        """Drive it; the job as it is then, if that is known for good."""
        job = drive.job
        structlog.contextvars.bind_contextvars(job=job.id, request_id=job.terms.request_id)
        TRACEPARENT.set(job.terms.traceparent)
        JOB_QUEUE_SECONDS.observe(job.waited)
        # No other job runs then; the engine keeps streams and other callers of Triton's away too.
        outcome = await drive.outcome(alone=job.attempts >= self._lost_before_last)
        JOBS_SETTLED.labels(kind_of(outcome)).inc()
        if isinstance(outcome, Finished):
            JOB_RUN_SECONDS.observe(drive.seconds)
        ours = await self._settle(job, outcome)
        return _done(job, outcome) if ours else None

    async def _settle(self, job: ClaimedJob, outcome: Outcome) -> bool:
        """Write the outcome down. If the database stays away, the lease runs out and it reruns."""
        for attempt in range(1, SAVE_ATTEMPTS + 1):
            try:
                async with self._settling:
                    ours = await self._write(job, outcome)
                    await asyncio.sleep(0)
            except StoreUnavailable as error:
                log.warning("job_not_saved", error=str(error))
                await asyncio.sleep(0.1 * 2**attempt)
            else:
                log.info(
                    "job_settled", ours=ours, outcome=kind_of(outcome), reason=reason_of(outcome)
                )
                return ours
        return False

    async def _write(self, job: ClaimedJob, outcome: Outcome) -> bool:
        match outcome:
            case Finished(event):
                return await self._store.finish(self._owner, job.id, event)
            case Failed(error):
                return await self._store.fail(self._owner, job.id, error)
            case Lost(reason):
                return await self._store.retry(self._owner, job.id, reason)
            case Postponed():
                return await self._store.put_back(self._owner, job.id)
            case Dropped():
                return False
            case _:
                assert_never(outcome)

    async def _care(self) -> float:
        """Renew the leases, let go of what is not ours, notice what is lost or late, tidy up."""
        drives = dict(self._drives)
        if drives:
            kept = await self._store.renew(self._owner, drives, lease=self._lease)
            for job_id in drives.keys() - kept:
                drives[job_id].impose(Dropped())
        for drive in drives.values():
            drive.lose_if_silent(self._idle_timeout)
        if recovered := await self._store.recover():
            log.warning("jobs_recovered", count=recovered)
            self._claiming.wake()
        if expired := await self._store.expire():
            log.info("jobs_expired", count=expired)
        await self._store.purge(ttl=self._result_ttl, limit=PURGE_BATCH)
        await self._store.forget_keys(ttl=self._result_ttl)
        return min(MAX_TICK_SECONDS, self._lease / 3)


def _done(job: ClaimedJob, outcome: Outcome) -> Job | None:
    """What the database says of the job from now on, once the outcome is written."""
    match outcome:
        case Finished(event):
            return Job(job.id, JobState.FINISHED, job.attempts, event.text, None)
        case Failed(error):
            return Job(job.id, JobState.FAILED, job.attempts, None, error)
        case _:
            return None


def _now() -> float:
    return asyncio.get_running_loop().time()
