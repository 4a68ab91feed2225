"""Waiting for jobs to be done, whichever worker drives them."""

import asyncio
from collections import defaultdict
from types import TracebackType
from typing import Self

from adapter.jobs.store import JobStore
from adapter.loops import Loop

POLL_SECONDS = 0.05


class JobWatcher:
    """Lets any number of callers wait; a context manager.

    A job of this worker is reported by `notify`. For all others together there is one query
    per poll, however many callers wait.
    """

    def __init__(self, store: JobStore) -> None:
        self._store = store
        self._waiting: defaultdict[int, set[asyncio.Event]] = defaultdict(set)
        self._loop = Loop("job-watch", self._poll)
        self.stopped = False

    async def wait(self, job_id: int, seconds: float) -> bool:
        """Return True when it is worth looking at the job again, False when the time is over."""
        if self.stopped:
            return True
        event = asyncio.Event()
        self._waiting[job_id].add(event)
        self._loop.wake()
        try:
            async with asyncio.timeout(seconds):
                await event.wait()
        except TimeoutError:
            return False
        finally:
            self._waiting[job_id].discard(event)
            if not self._waiting[job_id]:
                del self._waiting[job_id]
        return True

    def notify(self, job_id: int) -> None:
        """This worker has settled the job."""
        for event in self._waiting.get(job_id, ()):
            event.set()

    def stop(self) -> None:
        """Let everybody go who waits: nobody is to be held up by them."""
        self.stopped = True
        for job_id in list(self._waiting):
            self.notify(job_id)

    async def __aenter__(self) -> Self:
        await self._loop.__aenter__()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._loop.__aexit__(kind, error, trace)

    async def _poll(self) -> float | None:
        if not self._waiting:
            return None
        await asyncio.sleep(POLL_SECONDS)  # also keeps `wake` from hurrying the query
        for job_id in await self._store.done_among(list(self._waiting)):
            self.notify(job_id)
        return 0.0
