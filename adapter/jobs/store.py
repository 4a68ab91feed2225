"""Jobs in the database. Every change of state is one conditional UPDATE: whoever comes second
changes nothing and is told so."""

import json
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from sqlalchemy import ColumnElement, and_, delete, func, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from adapter.database import Database
from adapter.errors import TooManyJobs
from adapter.generation import Event, Inputs
from adapter.tables import counters, jobs

Clock = Callable[[], float]

MAX_ID = 2**63 - 1


class JobState(StrEnum):
    """Where a job is in its life."""

    #: Waiting for a worker.
    QUEUED = "queued"
    #: A worker drives it, for as long as it renews the lease.
    RUNNING = "running"
    #: There is a text.
    FINISHED = "finished"
    #: There is an error, and there will be no text.
    FAILED = "failed"
    #: Somebody did not want it any more.
    CANCELLED = "cancelled"

    @property
    def done(self) -> bool:
        """Nothing changes any more."""
        return self not in UNDONE


UNDONE = frozenset({JobState.QUEUED, JobState.RUNNING})


@dataclass(frozen=True, slots=True)
class Job:
    """One row, as far as anybody needs it."""

    id: int
    state: JobState
    attempts: int
    text: str | None
    error: str | None


@dataclass(frozen=True, slots=True)
class ClaimedJob:
    """A job that this worker drives from now on."""

    id: int
    inputs: Inputs
    attempts: int


class JobStore:
    """All that is ever done to jobs. Every method may raise `StoreUnavailable`."""

    def __init__(self, database: Database, *, max_attempts: int, clock: Clock = time.time) -> None:
        self._database = database
        self._max_attempts = max_attempts
        self._clock = clock

    async def add(self, requests: Sequence[Inputs], *, max_queued: int) -> list[int]:
        """Queue all requests or none; the ids are consecutive. Raises `TooManyJobs`."""
        async with self._database.write() as connection:
            # Taking the counter first makes submissions follow one another on PostgreSQL too,
            # so that the count below is exact.
            end = await connection.scalar(
                update(counters)
                .where(counters.c.name == "jobs")
                .values(next_id=counters.c.next_id + len(requests))
                .returning(counters.c.next_id)
            )
            assert end is not None
            await _refuse_beyond(connection, max_queued, len(requests))
            ids = list(range(end - len(requests), end))
            await connection.execute(insert(jobs), self._new_rows(ids, requests))
        return ids

    async def get(self, job_id: int) -> Job | None:
        """The job, or None if there is none of that id."""
        if not 0 <= job_id <= MAX_ID:
            return None
        columns = select(jobs.c.id, jobs.c.state, jobs.c.attempts, jobs.c.text, jobs.c.error)
        async with self._database.read() as connection:
            row = (await connection.execute(columns.where(jobs.c.id == job_id))).one_or_none()
        if row is None:
            return None
        return Job(row.id, JobState(row.state), row.attempts, row.text, row.error)

    async def done_among(self, ids: Collection[int]) -> set[int]:
        """Which of these jobs are done."""
        query = select(jobs.c.id).where(jobs.c.id.in_(ids), jobs.c.state.not_in(UNDONE))
        async with self._database.read() as connection:
            return set(await connection.scalars(query))

    async def claim(self, owner: str, *, limit: int, lease: float) -> list[ClaimedJob]:
        """Take up to `limit` queued jobs, the oldest first, each for one more attempt."""
        queued = jobs.c.state == JobState.QUEUED
        async with self._database.read() as connection:
            # An idle worker that polls must not take SQLite's only write lock.
            if await connection.scalar(select(jobs.c.id).where(queued).limit(1)) is None:
                return []
        oldest = select(jobs.c.id).where(queued).order_by(jobs.c.id).limit(limit)
        # SKIP LOCKED is for PostgreSQL; SQLite, whose writers wait for one another, omits it.
        # PostgreSQL would run a mere subquery several times and so exceed the limit; not a CTE.
        chosen = oldest.with_for_update(skip_locked=True).cte("oldest")
        now = self._clock()
        take = (
            update(jobs)
            .where(jobs.c.id.in_(select(chosen.c.id)), queued)
            .values(
                state=JobState.RUNNING,
                owner=owner,
                lease_expires=now + lease,
                attempts=jobs.c.attempts + 1,
                started_at=now,
            )
            .returning(jobs.c.id, jobs.c.request, jobs.c.attempts)
        )
        async with self._database.write() as connection:
            rows = (await connection.execute(take)).all()
        return sorted(
            (ClaimedJob(row.id, json.loads(row.request), row.attempts) for row in rows),
            key=lambda job: job.id,
        )

    async def renew(self, owner: str, ids: Collection[int], *, lease: float) -> set[int]:
        """Prolong the leases; what is missing from the answer is not this owner's any more."""
        renewal = (
            update(jobs)
            .where(jobs.c.id.in_(ids), _driven_by(owner))
            .values(lease_expires=self._clock() + lease)
            .returning(jobs.c.id)
        )
        async with self._database.write() as connection:
            return set(await connection.scalars(renewal))

    async def finish(self, owner: str, job_id: int, result: Event) -> bool:
        """Keep the result. False if the job is not this owner's to finish."""
        values: dict[str, Any] = {
            "text": result.text,
            "finish_reason": result.finish_reason,
            "seed": result.seed,
        }
        if result.usage is not None:
            values |= {
                "prompt_tokens": result.usage.prompt_tokens,
                "completion_tokens": result.usage.completion_tokens,
                "steps": result.usage.steps,
                "forward_passes": result.usage.forward_passes,
            }
        return await self._end(owner, job_id, JobState.FINISHED, values)

    async def fail(self, owner: str, job_id: int, error: str) -> bool:
        """Give the job up, with the reason. False if it is not this owner's."""
        return await self._end(owner, job_id, JobState.FAILED, {"error": error})

    async def put_back(self, owner: str, job_id: int) -> bool:
        """Queue the job again as if this attempt had not been. False if it is not the owner's."""
        release = update(jobs).where(jobs.c.id == job_id, _driven_by(owner))
        values = {**_QUEUED_AGAIN, "attempts": jobs.c.attempts - 1}
        async with self._database.write() as connection:
            return (await connection.execute(release.values(values))).rowcount == 1

    async def retry(self, owner: str, job_id: int, reason: str) -> bool:
        """Queue the job again, or fail it if this was its last attempt. False: not the owner's."""
        mine = and_(jobs.c.id == job_id, _driven_by(owner))
        async with self._database.write() as connection:
            return await self._requeue(connection, mine, reason) == 1

    async def recover(self) -> int:
        """Queue again what its worker has let expire; the number of jobs concerned."""
        expired = and_(jobs.c.state == JobState.RUNNING, jobs.c.lease_expires < self._clock())
        async with self._database.read() as connection:
            if await connection.scalar(select(jobs.c.id).where(expired).limit(1)) is None:
                return 0
        async with self._database.write() as connection:
            return await self._requeue(connection, expired, "the worker that ran it died")

    async def cancel(self, job_id: int) -> bool:
        """Cancel the job unless it is done. True if this call has cancelled it."""
        if not 0 <= job_id <= MAX_ID:
            return False
        cancellation = (
            update(jobs)
            .where(jobs.c.id == job_id, jobs.c.state.in_(UNDONE))
            .values(state=JobState.CANCELLED, owner=None, finished_at=self._clock())
        )
        async with self._database.write() as connection:
            return (await connection.execute(cancellation)).rowcount == 1

    async def purge(self, *, ttl: float, limit: int) -> int:
        """Remove up to `limit` results that were kept for longer than `ttl`; how many it was."""
        old = jobs.c.finished_at < self._clock() - ttl
        oldest = select(jobs.c.id).where(old).limit(limit)
        async with self._database.read() as connection:
            ids = list(await connection.scalars(oldest))
        if not ids:
            return 0
        async with self._database.write() as connection:
            result = await connection.execute(delete(jobs).where(jobs.c.id.in_(ids), old))
            return int(result.rowcount)

    def _new_rows(self, ids: Sequence[int], requests: Sequence[Inputs]) -> list[dict[str, Any]]:
        now = self._clock()
        return [
            {
                "id": job_id,
                "state": JobState.QUEUED,
                "request": json.dumps(dict(request)),
                "attempts": 0,
                "created_at": now,
            }
            for job_id, request in zip(ids, requests, strict=True)
        ]

    async def _end(
        self, owner: str, job_id: int, state: JobState, values: Mapping[str, Any]
    ) -> bool:
        end = (
            update(jobs)
            .where(jobs.c.id == job_id, _driven_by(owner))
            .values(state=state, owner=None, finished_at=self._clock(), **values)
        )
        async with self._database.write() as connection:
            return (await connection.execute(end)).rowcount == 1

    async def _requeue(
        self, connection: AsyncConnection, which: ColumnElement[bool], reason: str
    ) -> int:
        error = f"given up after {self._max_attempts} attempts: {reason}"
        spent = jobs.c.attempts >= self._max_attempts
        failed = await connection.execute(
            update(jobs)
            .where(which, spent)
            .values(state=JobState.FAILED, error=error, owner=None, finished_at=self._clock())
        )
        queued = await connection.execute(update(jobs).where(which).values(_QUEUED_AGAIN))
        return int(failed.rowcount + queued.rowcount)


_QUEUED_AGAIN: dict[str, Any] = {"state": JobState.QUEUED, "owner": None, "lease_expires": None}


def _driven_by(owner: str) -> ColumnElement[bool]:
    return and_(jobs.c.state == JobState.RUNNING, jobs.c.owner == owner)


async def _refuse_beyond(connection: AsyncConnection, max_queued: int, extra: int) -> None:
    queued = await connection.scalar(
        select(func.count()).select_from(jobs).where(jobs.c.state == JobState.QUEUED)
    )
    if (queued or 0) + extra > max_queued:
        msg = f"{queued} jobs are waiting, and at most {max_queued} may (DLLM_MAX_QUEUED_JOBS)"
        raise TooManyJobs(msg)
