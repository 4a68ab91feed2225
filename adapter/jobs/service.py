"""What the API does with jobs."""

import asyncio
from collections.abc import Sequence

from adapter.engine.pool import EnginePool
from adapter.errors import EngineError, InvalidRequest, JobNotFound, TooManyCalls
from adapter.jobs.job import STANDARD_TERMS, Job, JobState, Terms
from adapter.jobs.runner import JobRunner
from adapter.jobs.store import JobStore
from adapter.jobs.watcher import JobWatcher
from adapter.telemetry.logs import get_logger
from adapter.telemetry.metrics import JOBS_SUBMITTED
from adapter.types import Inputs

log = get_logger()

#: Nobody waits for longer to learn whether the engine likes a request.
CHECK_SECONDS = 1.0


class JobService:
    """Submit, look up, wait, cancel. Every method may raise `StoreUnavailable`.

    With `api_key`, jobs of other keys are as good as unknown.
    """

    def __init__(
        self,
        store: JobStore,
        runner: JobRunner,
        watcher: JobWatcher,
        pool: EnginePool,
        *,
        max_queued: int,
        max_held: int,
    ) -> None:
        self._store = store
        self._runner = runner
        self._watcher = watcher
        self._pool = pool
        self._max_queued = max_queued
        self._max_held = max_held
        #: Polls that are held now.
        self.held = 0

    async def submit(
        self, requests: Sequence[Inputs], terms: Terms = STANDARD_TERMS, *, key: str | None = None
    ) -> list[int]:
        """Queue all or none; under one key once only.

        Raises `InvalidRequest`, `TooManyJobs`, `KeyReused`.
        """
        await self._check(requests)
        room, new = self._max_queued, True
        if key is not None:
            ids, new = await self._store.add_once(requests, key=key, max_queued=room, terms=terms)
            self._runner.wake()
        elif len(requests) == 1:
            ids = [await self._runner.take_in(requests[0], terms, max_queued=room)]
        else:
            ids = await self._store.add(requests, max_queued=room, terms=terms)
            self._runner.wake()
        if new:
            JOBS_SUBMITTED.inc(len(ids))
        return ids

    async def result(self, job_id: int, *, api_key: str | None = None, wait: float = 0.0) -> Job:
        """The job; up to `wait` seconds later if that makes it done.

        A worker that is about to end answers at once. Raises `JobNotFound`, and `TooManyCalls` if
        it would have to wait beside as many others as may.
        """
        job = None
        if wait <= 0 or not self._runner.drives(job_id, api_key):
            job = await self._get(job_id, api_key)
            if wait <= 0 or self._is_final(job):
                return job
        if self.held >= self._max_held:
            msg = f"{self.held} polls are held, as many as may (DLLM_MAX_HELD_POLLS)"
            raise TooManyCalls(msg)
        now = asyncio.get_running_loop().time
        deadline = now() + wait
        self.held += 1
        try:
            while job is None or (not self._is_final(job) and now() < deadline):
                done = await self._watcher.wait(job_id, deadline - now())
                job = done or await self._get(job_id, api_key)
        finally:
            self.held -= 1
        return job

    async def cancel(self, job_id: int, *, api_key: str | None = None) -> Job:
        """Cancel the job unless it is done; the job as it is then. Raises `JobNotFound`."""
        job = await self._get(job_id, api_key)
        if await self._store.cancel(job_id, api_key=api_key):
            self._runner.cancelled(job)
            self._watcher.notify(job_id)
        return await self._get(job_id, api_key)

    async def undone(self) -> dict[JobState, int]:
        """How many jobs wait, and how many run, at all workers together."""
        return await self._store.undone()

    def stop(self) -> None:
        """This worker is about to end: let go of who waits, and take up no more jobs."""
        self._runner.stop()
        self._watcher.stop()

    async def _check(self, requests: Sequence[Inputs]) -> None:
        """Have an engine judge what only it can: tokens, lengths, rules that exclude each other.

        While none answers everything is taken, and what it refuses later ends as a failed job.
        """
        endpoint = self._pool.pick(include_backing_off=True)
        if endpoint is None:
            return
        try:
            async with asyncio.timeout(CHECK_SECONDS):
                refusals = await endpoint.check(requests)
        except (TimeoutError, EngineError) as error:
            log.warning("submission_not_checked", error=str(error) or "no answer")
            endpoint.monitor.request_probe()
            return
        if refusals:
            index = min(refusals)
            # What is wrong with all of them is not the prompts.
            prompt = None if len(refusals) == len(requests) else index
            raise InvalidRequest(refusals[index], prompt=prompt)

    def _is_final(self, job: Job) -> bool:
        """Nothing that this worker could wait for will change it."""
        return job.state.done or self._watcher.stopped

    async def _get(self, job_id: int, api_key: str | None) -> Job:
        job = await self._store.get(job_id, api_key=api_key)
        if job is None:
            msg = f"request {job_id} is unknown, or its result has expired"
            raise JobNotFound(msg)
        return job
