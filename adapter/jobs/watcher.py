"""Waiting for jobs to be done, whichever worker runs them."""

import asyncio
from collections import defaultdict
from typing import Self

from adapter.jobs.job import Job
from adapter.jobs.runner import JobRunner
from adapter.jobs.store import JobStore
from adapter.periodic import PeriodicTask

POLL_SECONDS = 0.05


class JobWatcher:
    """Lets any number of calls wait for jobs; a context manager.

    The runner reports jobs of this worker. All other jobs share one query per interval, however
    many calls wait for them.
    """

    def __init__(self, store: JobStore, runner: JobRunner) -> None:
        self._store = store
        self._runner = runner
        runner.listen(self.notify)
        self._waiting: defaultdict[int, set[asyncio.Future[Job | None]]] = defaultdict(set)
        #: The task that polls.
        self.loop = PeriodicTask("job-watch", self._poll)
        self.stopped = False

    async def wait(self, job_id: int, seconds: float) -> Job | None:
        """Wait for the job; None if it has to be looked up, or the time is over."""
        if self.stopped:
            return None
        done: asyncio.Future[Job | None] = asyncio.get_running_loop().create_future()
        self._waiting[job_id].add(done)
        if not self._runner.owns(job_id):
            self.loop.wake()
        try:
            async with asyncio.timeout(seconds):
                return await done
        except TimeoutError:
            return None
        finally:
            self._waiting[job_id].discard(done)
            if not self._waiting[job_id]:
                del self._waiting[job_id]

    def notify(self, job_id: int, job: Job | None = None) -> None:
        """Wake the calls that wait for the job, with its final state if that is known."""
        for done in self._waiting.get(job_id, ()):
            if not done.done():
                done.set_result(job)

    def stop(self) -> None:
        """Wake all waiting calls, so that they do not delay the shutdown."""
        self.stopped = True
        self.loop.stop()
        self.wake_all()

    def wake_all(self) -> None:
        """Have all waiting calls look up their jobs: the database failed, or is back."""
        for job_id in list(self._waiting):
            self.notify(job_id)

    async def __aenter__(self) -> Self:
        await self.loop.__aenter__()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.loop.__aexit__()

    async def _poll(self) -> float | None:
        elsewhere = [job_id for job_id in self._waiting if not self._runner.owns(job_id)]
        if not elsewhere:
            return None
        await asyncio.sleep(POLL_SECONDS)  # `wake` does not shorten it
        for job_id in await self._store.done_among(elsewhere):
            self.notify(job_id)
        return 0.0
