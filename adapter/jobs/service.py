"""Jobs as the API uses them: submit, look up, wait, cancel."""

import asyncio
from collections.abc import Sequence

from adapter.engine.fleet import Fleet
from adapter.engine.pool import EnginePool
from adapter.errors import EngineError, InvalidRequest, JobNotFound
from adapter.jobs.job import DEFAULT_OPTIONS, Job, JobOptions, JobState
from adapter.jobs.runner import JobRunner
from adapter.jobs.store import JobStore
from adapter.jobs.watcher import JobWatcher
from adapter.shares import Shares, share_of
from adapter.telemetry.logs import get_logger
from adapter.types import Inputs

log = get_logger()

#: A submission waits no longer than this for the engine's check.
CHECK_SECONDS = 1.0


class JobService:
    """Submit, look up, wait, cancel. Every method may raise `StoreUnavailable`.

    With `api_key`, jobs of other keys are unknown.
    """

    def __init__(
        self,
        store: JobStore,
        runner: JobRunner,
        watcher: JobWatcher,
        fleet: Fleet,
        *,
        max_queued: int,
        max_held: int,
        key_share: float,
    ) -> None:
        self._store = store
        self._runner = runner
        self._watcher = watcher
        self._fleet = fleet
        self._max_queued = max_queued
        self._key_share = key_share
        self._polls = Shares(
            max_held, key_share, what="polls are held", setting="DLLM_MAX_HELD_POLLS"
        )

    @property
    def held(self) -> int:
        """The number of polls held now."""
        return self._polls.held

    def most_at_once(self, api_key: str | None) -> int:
        """The most requests that one call may ever have."""
        most = self._max_queued
        return most if api_key is None else share_of(most, self._key_share)

    async def submit(
        self,
        requests: Sequence[Inputs],
        options: JobOptions = DEFAULT_OPTIONS,
        *,
        key: str | None = None,
    ) -> list[int]:
        """Queue all requests or none, and only once under one key; their ids.

        Raises `InvalidRequest`, `TooManyJobs`, `KeyReused`.
        """
        pool = self._fleet.of_job(options.model)
        try:
            await self._check(requests, pool)
        except InvalidRequest:
            # Accepted once, it keeps its answer, whatever the engine says today.
            if key and (known := await self._store.known(requests, key=key, options=options)):
                return known
            raise
        most, new = self._max_queued, True
        most_of_key = None if options.api_key is None else self.most_at_once(options.api_key)
        if key is None:
            ids = await self._store.add(
                requests, max_queued=most, max_queued_of_key=most_of_key, options=options
            )
        else:
            ids, new = await self._store.add_once(
                requests,
                key=key,
                max_queued=most,
                max_queued_of_key=most_of_key,
                options=options,
            )
        self._runner.wake()
        if new:
            pool.metrics.jobs_submitted.inc(len(ids))
        return ids

    async def result(self, job_id: int, *, api_key: str | None = None, wait: float = 0.0) -> Job:
        """The job; waits up to `wait` seconds for it to be done.

        A worker that is about to end answers at once. Raises `JobNotFound`, and `TooManyCalls` if
        as many polls are held as may be.
        """
        job = None
        if wait <= 0 or self._store.outage or not self._runner.owns(job_id, api_key):
            job = await self._get(job_id, api_key)
            if wait <= 0 or self._is_final(job):
                return job
        self._polls.take(api_key)
        now = asyncio.get_running_loop().time
        deadline = now() + wait
        try:
            while job is None or (not self._is_final(job) and now() < deadline):
                done = await self._watcher.wait(job_id, deadline - now())
                job = done or await self._get(job_id, api_key)
        finally:
            self._polls.give_back(api_key)
        return job

    async def cancel(self, job_id: int, *, api_key: str | None = None) -> Job:
        """Cancel the job unless it is done; its new state. Raises `JobNotFound`."""
        job = await self._get(job_id, api_key)
        if await self._store.cancel(job_id, api_key=api_key):
            self._runner.cancelled(job)
            self._watcher.notify(job_id)
        return await self._get(job_id, api_key)

    async def count_active(self) -> dict[tuple[JobState, str], int]:
        """How many jobs of each model are queued and how many run, on all workers together."""
        found = await self._store.count_active()
        models = {*(pool.model for pool in self._fleet.pools), *(model for _, model in found)}
        states = (JobState.QUEUED, JobState.RUNNING)
        return {(state, model): found[state, model] for state in states for model in sorted(models)}

    def stop(self) -> None:
        """This worker is about to end: answer held polls and claim no more jobs."""
        self._runner.stop()
        self._watcher.stop()

    async def _check(self, requests: Sequence[Inputs], pool: EnginePool) -> None:
        """Have an engine check what only it can: tokens, lengths, rules that exclude each other.

        While no engine answers, every request is accepted; one that is invalid fails when it runs.
        """
        endpoint = pool.pick(include_backing_off=True)
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
            # If all are refused, the prompts are not to blame.
            prompt = None if len(refusals) == len(requests) else index
            raise InvalidRequest(refusals[index], prompt=prompt)

    def _is_final(self, job: Job) -> bool:
        """Whether waiting here cannot change it."""
        return job.state.done or self._watcher.stopped

    async def _get(self, job_id: int, api_key: str | None) -> Job:
        job = await self._store.get(job_id, api_key=api_key)
        if job is None:
            msg = f"request {job_id} is unknown, or its result has expired"
            raise JobNotFound(msg)
        return job
