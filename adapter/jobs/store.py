"""Jobs in the database. Every change of state is one conditional UPDATE: whoever comes second
changes nothing and is told so."""

import json
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from sqlalchemy import ColumnElement, Row, and_, bindparam, delete, func, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from adapter.database import Database
from adapter.errors import TooManyJobs
from adapter.generation import Event, Inputs
from adapter.jobs.claims import QUEUED, RUNNING, any_of, hold_counter, take_up
from adapter.jobs.job import STANDARD_TERMS, UNDONE, ClaimedJob, Job, JobState, Terms, late
from adapter.jobs.submissions import Submission, forget, ids_of, remember
from adapter.tables import counters, jobs, submissions

Clock = Callable[[], float]

MAX_ID = 2**63 - 1
#: Workers are killed for many reasons and hardly ever by a job, but such a job must end too.
MAX_ORPHANED = 20
EXPIRE_BATCH = 500


class JobStore:
    """All that is ever done to jobs. Every method may raise `StoreUnavailable`."""

    def __init__(self, database: Database, *, max_attempts: int, clock: Clock = time.time) -> None:
        self._database = database
        self._max_attempts = max_attempts
        self._clock = clock

    async def add(
        self, requests: Sequence[Inputs], *, max_queued: int, terms: Terms = STANDARD_TERMS
    ) -> list[int]:
        """Queue all requests or none; the ids are consecutive. Raises `TooManyJobs`."""
        async with self._database.write() as connection:
            return await self._add(connection, requests, max_queued, terms)

    async def add_once(
        self,
        requests: Sequence[Inputs],
        *,
        key: str,
        max_queued: int,
        terms: Terms = STANDARD_TERMS,
    ) -> tuple[list[int], bool]:
        """As `add`, unless it was done before under this key; the ids, and whether they are new.

        Raises `TooManyJobs`, and `KeyReused` if the key stands for other requests.
        """
        submission = Submission.of(key, requests, terms)
        async with self._database.write() as connection:
            await hold_counter(connection)
            if (given := await ids_of(connection, submission)) is not None:
                return given, False
            ids = await self._add(connection, requests, max_queued, terms)
            await remember(connection, submission, ids, self._clock())
        return ids, True

    async def get(self, job_id: int, *, api_key: str | None = None) -> Job | None:
        """The job, or None if there is none of that id, or with a key none of that key's."""
        if not 0 <= job_id <= MAX_ID:
            return None
        query = _SHOWN.where(jobs.c.id == job_id, *_submitted_with(api_key))
        for row in await self._database.read(query):
            return Job(row.id, JobState(row.state), row.attempts, row.text, row.error)
        return None

    async def done_among(self, ids: Collection[int]) -> set[int]:
        """Which of these jobs are done."""
        query = select(jobs.c.id).where(jobs.c.id.in_(ids), jobs.c.state.not_in(UNDONE))
        return {row.id for row in await self._database.read(query)}

    async def undone(self) -> dict[JobState, int]:
        """How many jobs wait, and how many run."""
        query = (
            select(jobs.c.state, func.count().label("jobs"))
            .where(jobs.c.state.in_(UNDONE))
            .group_by(jobs.c.state)
        )
        rows = await self._database.read(query)
        found = {JobState(row.state): row.jobs for row in rows}
        return {state: found.get(state, 0) for state in sorted(UNDONE)}

    async def claim(self, owner: str, *, limit: int, lease: float) -> list[ClaimedJob]:
        """Take up to `limit` queued jobs by priority and age; see `adapter.jobs.claims`."""
        # An idle worker that polls must not take SQLite's only write lock.
        if not await self._database.read(any_of(QUEUED)):
            return []
        now = self._clock()
        async with self._database.write() as connection:
            rows = await take_up(
                connection,
                owner,
                limit=limit,
                lease=lease,
                max_attempts=self._max_attempts,
                now=now,
            )
        return [_claimed(row, now) for row in rows]

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
        async with self._database.write() as connection:
            return (await connection.execute(release.values(_QUEUED_AGAIN))).rowcount == 1

    async def retry(self, owner: str, job_id: int, reason: str) -> bool:
        """Queue the job again, or fail it if this was its last attempt. False: not the owner's."""
        mine = and_(jobs.c.id == job_id, _driven_by(owner))
        error = f"given up after {self._max_attempts} attempts: {reason}"
        async with self._database.write() as connection:
            return await self._requeue(connection, mine, "attempts", self._max_attempts, error) == 1

    async def recover(self) -> int:
        """Queue again what its worker has let expire; the number of jobs concerned.

        That its worker has died costs a job no attempt: workers are restarted all the time.
        """
        expired = and_(RUNNING, jobs.c.lease_expires < self._clock())
        if not await self._database.read(any_of(expired)):
            return 0
        error = f"given up: {MAX_ORPHANED} workers have died that ran it"
        async with self._database.write() as connection:
            return await self._requeue(connection, expired, "orphaned", MAX_ORPHANED, error)

    async def expire(self) -> int:
        """Fail up to some hundred jobs that wait beyond their deadline; how many it was."""
        now = self._clock()
        query = select(jobs.c.id, (jobs.c.deadline - jobs.c.created_at).label("timeout"))
        late_ones = query.where(jobs.c.deadline <= now, QUEUED).limit(EXPIRE_BATCH)
        rows = await self._database.read(late_ones)
        if not rows:
            return 0
        end = (
            update(jobs)
            .where(jobs.c.id == bindparam("job_id"), QUEUED)
            .values(error=bindparam("reason"), **_ended(JobState.FAILED, now))
        )
        async with self._database.write() as connection:
            reasons = [{"job_id": row.id, "reason": late(row.timeout)} for row in rows]
            await connection.execute(end, reasons)
        return len(rows)

    async def cancel(self, job_id: int, *, api_key: str | None = None) -> bool:
        """Cancel the job unless it is done, or another key's. True if this call has done it."""
        if not 0 <= job_id <= MAX_ID:
            return False
        cancellation = (
            update(jobs)
            .where(jobs.c.id == job_id, jobs.c.state.in_(UNDONE), *_submitted_with(api_key))
            .values(_ended(JobState.CANCELLED, self._clock()))
        )
        async with self._database.write() as connection:
            return (await connection.execute(cancellation)).rowcount == 1

    async def purge(self, *, ttl: float, limit: int) -> int:
        """Remove up to `limit` results that were kept for longer than `ttl`; how many it was."""
        old = jobs.c.finished_at < self._clock() - ttl
        oldest = select(jobs.c.id).where(old).limit(limit)
        ids = [row.id for row in await self._database.read(oldest)]
        if not ids:
            return 0
        async with self._database.write() as connection:
            result = await connection.execute(delete(jobs).where(jobs.c.id.in_(ids), old))
            return int(result.rowcount)

    async def forget_keys(self, *, ttl: float) -> None:
        """Forget the keys of submissions that were made longer than `ttl` ago."""
        before = self._clock() - ttl
        old = select(submissions.c.key).where(submissions.c.created_at < before).limit(1)
        if await self._database.read(old):
            async with self._database.write() as connection:
                await forget(connection, before)

    async def _add(
        self,
        connection: AsyncConnection,
        requests: Sequence[Inputs],
        max_queued: int,
        terms: Terms,
    ) -> list[int]:
        # Taking the counter first makes submissions follow one another on PostgreSQL too, so that
        # the count below is exact.
        end = await connection.scalar(
            update(counters)
            .where(counters.c.name == "jobs")
            .values(next_id=counters.c.next_id + len(requests))
            .returning(counters.c.next_id)
        )
        assert end is not None
        await _refuse_beyond(connection, max_queued, len(requests))
        ids = list(range(end - len(requests), end))
        await connection.execute(insert(jobs), self._new_rows(ids, requests, terms))
        return ids

    def _new_rows(
        self, ids: Sequence[int], requests: Sequence[Inputs], terms: Terms
    ) -> list[dict[str, Any]]:
        now = self._clock()
        return [
            {
                "id": job_id,
                "state": JobState.QUEUED,
                "request": json.dumps(dict(request)),
                "attempts": 0,
                "created_at": now,
                "priority": terms.priority,
                "deadline": None if terms.timeout is None else now + terms.timeout,
                "api_key": terms.api_key,
                "request_id": terms.request_id,
                "traceparent": terms.traceparent,
            }
            for job_id, request in zip(ids, requests, strict=True)
        ]

    async def _end(
        self, owner: str, job_id: int, state: JobState, values: Mapping[str, Any]
    ) -> bool:
        end = (
            update(jobs)
            .where(jobs.c.id == job_id, _driven_by(owner))
            .values({**_ended(state, self._clock()), **values})
        )
        async with self._database.write() as connection:
            return (await connection.execute(end)).rowcount == 1

    async def _requeue(
        self,
        connection: AsyncConnection,
        which: ColumnElement[bool],
        counter: str,
        limit: int,
        error: str,
    ) -> int:
        """Count one more, and fail the jobs that have reached the limit; queue the others."""
        count = jobs.c[counter] + 1
        given_up = {**_ended(JobState.FAILED, self._clock()), "error": error, counter: count}
        failed = await connection.execute(
            update(jobs).where(which, count >= limit).values(given_up)
        )
        queued = await connection.execute(
            update(jobs).where(which).values({**_QUEUED_AGAIN, counter: count})
        )
        return int(failed.rowcount + queued.rowcount)


_SHOWN = select(jobs.c.id, jobs.c.state, jobs.c.attempts, jobs.c.text, jobs.c.error)

_QUEUED_AGAIN: dict[str, Any] = {"state": JobState.QUEUED, "owner": None, "lease_expires": None}


def _ended(state: JobState, now: float) -> dict[str, Any]:
    return {"state": state, "owner": None, "deadline": None, "finished_at": now}


def _driven_by(owner: str) -> ColumnElement[bool]:
    return and_(RUNNING, jobs.c.owner == owner)


def _submitted_with(api_key: str | None) -> list[ColumnElement[bool]]:
    return [] if api_key is None else [jobs.c.api_key == api_key]


def _claimed(row: Row[Any], now: float) -> ClaimedJob:
    timeout = None if row.deadline is None else row.deadline - row.created_at
    return ClaimedJob(
        id=row.id,
        inputs=json.loads(row.request),
        attempts=row.attempts,
        terms=Terms(row.priority, timeout, row.api_key, row.request_id, row.traceparent),
        time_left=None if row.deadline is None else row.deadline - now,
        waited=max(0.0, now - row.created_at),
    )


async def _refuse_beyond(connection: AsyncConnection, max_queued: int, extra: int) -> None:
    queued = await connection.scalar(select(func.count()).select_from(jobs).where(QUEUED))
    if (queued or 0) + extra > max_queued:
        msg = f"{queued} jobs are waiting, and at most {max_queued} may (DLLM_MAX_QUEUED_JOBS)"
        raise TooManyJobs(msg)
