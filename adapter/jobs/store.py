"""Jobs in the database. Every change of state is one conditional UPDATE: whoever comes second
changes nothing and is told so."""

import json
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Connection,
    Row,
    Select,
    UpdateBase,
    and_,
    bindparam,
    delete,
    func,
    insert,
    select,
    update,
)

from adapter.db.database import Database
from adapter.db.tables import counters, jobs, submissions
from adapter.errors import TooManyJobs
from adapter.jobs.claims import QUEUED, RUNNING, hold_counter, look_at_queue, take_up
from adapter.jobs.idempotency import Submission, forget, ids_of, remember
from adapter.jobs.job import (
    STANDARD_TERMS,
    UNDONE,
    ClaimedJob,
    Job,
    JobState,
    Terms,
    engine_request_id,
    late,
)
from adapter.telemetry.metrics import JOBS_DONE
from adapter.types import Event, Inputs

Clock = Callable[[], float]

MAX_ID = 2**63 - 1
#: Workers are killed for many reasons and hardly ever by a job, but such a job must end too.
MAX_ORPHANED = 20
EXPIRE_BATCH = 500

#: Counted here, where they end, since not all of them end in a worker's hands. Shown from 0 on.
_DONE = {state: JOBS_DONE.labels(state) for state in JobState if state.done}


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
        return await self._database.write(
            lambda connection: self._add(connection, requests, max_queued, terms)
        )

    async def add_claimed(
        self,
        request: Inputs,
        owner: str,
        *,
        lease: float,
        max_queued: int,
        terms: Terms = STANDARD_TERMS,
    ) -> tuple[int, ClaimedJob | None]:
        """As `add` and `claim` in one, for a worker with a free place.

        The job's id, and the job if it is the owner's now; where others are first it is queued.
        Raises `TooManyJobs`.
        """

        def add(connection: Connection) -> tuple[int, ClaimedJob | None]:
            (job_id,) = self._next_ids(connection, 1)
            queued, free = look_at_queue(connection, max_attempts=self._max_attempts)
            _refuse_beyond(max_queued, queued, 1)
            (row,) = self._new_rows([job_id], [request], terms)
            if not free:
                connection.execute(_INSERT, row)
                return job_id, None
            now = row["created_at"]
            taken = {"state": JobState.RUNNING, "owner": owner, "lease_expires": now + lease}
            connection.execute(_INSERT, row | taken | {"started_at": now})
            return job_id, ClaimedJob(job_id, owner, request, 0, terms, time_left=terms.timeout)

        return await self._database.write(add)

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

        def add(connection: Connection) -> tuple[list[int], bool]:
            hold_counter(connection)
            if (given := ids_of(connection, submission)) is not None:
                return given, False
            ids = self._add(connection, requests, max_queued, terms)
            remember(connection, submission, ids, self._clock())
            return ids, True

        return await self._database.write(add)

    async def get(self, job_id: int, *, api_key: str | None = None) -> Job | None:
        """The job, or None if there is none of that id, or with a key none of that key's."""
        if not 0 <= job_id <= MAX_ID:
            return None
        query = _SHOWN if api_key is None else _SHOWN_TO_KEY
        for row in await self._database.read(query, {"job": job_id, "key": api_key}):
            return _shown(row)
        return None

    async def done_among(self, ids: Collection[int]) -> set[int]:
        """Which of these jobs are done."""
        return {row.id for row in await self._database.read(_DONE_AMONG, {"ids": list(ids)})}

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
        if not await self._database.read(_ANY_QUEUED):
            return []
        now = self._clock()
        rows = await self._database.write(
            lambda connection: take_up(
                connection,
                owner,
                limit=limit,
                lease=lease,
                max_attempts=self._max_attempts,
                now=now,
            )
        )
        return [_claimed(row, owner, now) for row in rows]

    async def renew(self, owner: str, ids: Collection[int], *, lease: float) -> set[int]:
        """Prolong the leases; what is missing from the answer is not this owner's any more."""
        renewal = (
            update(jobs)
            .where(jobs.c.id.in_(ids), _driven_by(owner))
            .values(lease_expires=self._clock() + lease)
            .returning(jobs.c.id)
        )
        return await self._database.write(lambda connection: set(connection.scalars(renewal)))

    async def finish(self, owner: str, job_id: int, result: Event) -> bool:
        """Keep the result. False if the job is not this owner's to finish."""
        usage = result.usage
        values = {
            "job": job_id,
            "by": owner,
            "now": self._clock(),
            "new_text": result.text,
            "reason": result.finish_reason,
            "new_seed": result.seed,
            "prompt_count": usage and usage.prompt_tokens,
            "completion_count": usage and usage.completion_tokens,
            "step_count": usage and usage.steps,
            "pass_count": usage and usage.forward_passes,
        }
        return await self._end(JobState.FINISHED, _FINISH, values)

    async def fail(self, owner: str, job_id: int, error: str) -> bool:
        """Give the job up, with the reason. False if it is not this owner's."""
        failure = update(jobs).where(jobs.c.id == job_id, _driven_by(owner))
        ended = _ended(JobState.FAILED, self._clock())
        return await self._end(JobState.FAILED, failure.values(ended | {"error": error}))

    async def put_back(self, owner: str, job_id: int) -> bool:
        """Queue the job again as if this attempt had not been. False if it is not the owner's."""
        release = update(jobs).where(jobs.c.id == job_id, _driven_by(owner))
        return await self._database.change(release.values(_QUEUED_AGAIN)) == 1

    async def retry(self, owner: str, job_id: int, reason: str) -> bool:
        """Queue the job again, or fail it if this was its last attempt. False: not the owner's."""
        mine = and_(jobs.c.id == job_id, _driven_by(owner))
        error = f"given up after {self._max_attempts} attempts: {reason}"
        return await self._requeue(mine, "attempts", self._max_attempts, error) == 1

    async def recover(self) -> int:
        """Queue again what its worker has let expire; the number of jobs concerned.

        That its worker has died costs a job no attempt: workers are restarted all the time.
        """
        expired = and_(RUNNING, jobs.c.lease_expires < self._clock())
        if not await self._database.read(_any_of(expired)):
            return 0
        error = f"given up: {MAX_ORPHANED} workers have died that ran it"
        return await self._requeue(expired, "orphaned", MAX_ORPHANED, error)

    async def expire(self) -> int:
        """Fail up to some hundred jobs that wait beyond their deadline; how many it was."""
        now = self._clock()
        too_late = and_(QUEUED, jobs.c.deadline <= now)
        if not await self._database.read(_any_of(too_late)):
            return 0
        timeout = (jobs.c.deadline - jobs.c.created_at).label("timeout")
        late_ones = select(jobs.c.id, timeout).where(too_late).limit(EXPIRE_BATCH)
        # They stay as they are until they have failed, so that two workers count none twice.
        late_ones = late_ones.with_for_update(skip_locked=True)
        end = (
            update(jobs)
            .where(jobs.c.id == bindparam("job_id"))
            .values(error=bindparam("reason"), **_ended(JobState.FAILED, now))
        )

        def change(connection: Connection) -> int:
            rows = connection.execute(late_ones).all()
            reasons = [{"job_id": row.id, "reason": late(row.timeout)} for row in rows]
            if reasons:
                connection.execute(end, reasons)
            return len(reasons)

        expired = await self._database.write(change)
        _DONE[JobState.FAILED].inc(expired)
        return expired

    async def cancel(self, job_id: int, *, api_key: str | None = None) -> bool:
        """Cancel the job unless it is done, or another key's. True if this call has done it."""
        if not 0 <= job_id <= MAX_ID:
            return False
        cancellation = (
            update(jobs)
            .where(jobs.c.id == job_id, jobs.c.state.in_(UNDONE), *_submitted_with(api_key))
            .values(_ended(JobState.CANCELLED, self._clock()))
        )
        return await self._end(JobState.CANCELLED, cancellation)

    async def purge(self, *, ttl: float, limit: int) -> int:
        """Remove up to `limit` results that were kept for longer than `ttl`; how many it was."""
        old = jobs.c.finished_at < self._clock() - ttl
        oldest = select(jobs.c.id).where(old).limit(limit)
        ids = [row.id for row in await self._database.read(oldest)]
        if not ids:
            return 0
        return await self._database.change(delete(jobs).where(jobs.c.id.in_(ids), old))

    async def forget_keys(self, *, ttl: float) -> None:
        """Forget the keys of submissions that were made longer than `ttl` ago."""
        before = self._clock() - ttl
        old = select(submissions.c.key).where(submissions.c.created_at < before).limit(1)
        if await self._database.read(old):
            await self._database.write(lambda connection: forget(connection, before))

    def _add(
        self,
        connection: Connection,
        requests: Sequence[Inputs],
        max_queued: int,
        terms: Terms,
    ) -> list[int]:
        ids = self._next_ids(connection, len(requests))
        _refuse_beyond(max_queued, connection.scalar(_COUNT_QUEUED) or 0, len(requests))
        connection.execute(_INSERT, self._new_rows(ids, requests, terms))
        return ids

    def _next_ids(self, connection: Connection, count: int) -> list[int]:
        """Taking them holds the counter, too."""
        end = connection.scalar(_COUNT_ON, {"more": count})
        assert end is not None
        return list(range(end - count, end))

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
        self, state: JobState, change: UpdateBase, values: Mapping[str, Any] | None = None
    ) -> bool:
        """Whether this has ended a job, which is counted then."""
        ended = await self._database.change(change, values) == 1
        if ended:
            _DONE[state].inc()
        return ended

    async def _requeue(
        self, which: ColumnElement[bool], counter: str, limit: int, error: str
    ) -> int:
        """Count one more, and fail the jobs that have reached the limit; queue the others."""
        count = jobs.c[counter] + 1
        given_up = {**_ended(JobState.FAILED, self._clock()), "error": error, counter: count}
        fail = update(jobs).where(which, count >= limit).values(given_up)
        queue = update(jobs).where(which).values({**_QUEUED_AGAIN, counter: count})
        failed, queued = await self._database.write(
            lambda connection: [connection.execute(part).rowcount for part in (fail, queue)]
        )
        _DONE[JobState.FAILED].inc(failed)
        return failed + queued


def _ended(state: JobState, now: Any) -> dict[str, Any]:
    return {"state": state, "owner": None, "deadline": None, "finished_at": now}


def _any_of(*conditions: ColumnElement[bool]) -> Select[Any]:
    return select(jobs.c.id).where(*conditions).limit(1)


def _driven_by(owner: str) -> ColumnElement[bool]:
    return and_(RUNNING, jobs.c.owner == owner)


def _submitted_with(api_key: str | None) -> list[ColumnElement[bool]]:
    return [] if api_key is None else [jobs.c.api_key == api_key]


def _shown(row: Row[Any]) -> Job:
    state, name = JobState(row.state), None
    if state is JobState.RUNNING:
        name = engine_request_id(row.id, row.request_id, row.owner, row.attempts, row.orphaned)
    return Job(row.id, state, row.attempts, row.text, row.error, name)


def _claimed(row: Row[Any], owner: str, now: float) -> ClaimedJob:
    timeout = None if row.deadline is None else row.deadline - row.created_at
    return ClaimedJob(
        id=row.id,
        owner=owner,
        inputs=json.loads(row.request),
        attempts=row.attempts,
        orphaned=row.orphaned,
        terms=Terms(row.priority, timeout, row.api_key, row.request_id, row.traceparent),
        time_left=None if row.deadline is None else row.deadline - now,
        waited=max(0.0, now - row.created_at),
    )


def _refuse_beyond(max_queued: int, queued: int, extra: int) -> None:
    if queued + extra > max_queued:
        msg = f"{queued} jobs are waiting, and at most {max_queued} may (DLLM_MAX_QUEUED_JOBS)"
        raise TooManyJobs(msg)


# What each job needs is made once: making a statement takes longer than running it.
_SHOWN = select(
    jobs.c.id,
    jobs.c.state,
    jobs.c.attempts,
    jobs.c.orphaned,
    jobs.c.text,
    jobs.c.error,
    jobs.c.owner,
    jobs.c.request_id,
).where(jobs.c.id == bindparam("job"))
_SHOWN_TO_KEY = _SHOWN.where(jobs.c.api_key == bindparam("key"))
_DONE_AMONG = select(jobs.c.id).where(
    jobs.c.id.in_(bindparam("ids", expanding=True)), jobs.c.state.not_in(UNDONE)
)
_ANY_QUEUED = _any_of(QUEUED)
_COUNT_QUEUED = select(func.count()).select_from(jobs).where(QUEUED)
# Taking the counter first makes submissions follow one another on PostgreSQL too, so that what is
# counted is exact.
_COUNT_ON = (
    update(counters)
    .where(counters.c.name == "jobs")
    .values(next_id=counters.c.next_id + bindparam("more"))
    .returning(counters.c.next_id)
)
_INSERT = insert(jobs)
_FINISH = (
    update(jobs)
    .where(jobs.c.id == bindparam("job"), RUNNING, jobs.c.owner == bindparam("by"))
    .values(
        **_ended(JobState.FINISHED, bindparam("now")),
        text=bindparam("new_text"),
        finish_reason=bindparam("reason"),
        seed=bindparam("new_seed"),
        prompt_tokens=bindparam("prompt_count"),
        completion_tokens=bindparam("completion_count"),
        steps=bindparam("step_count"),
        forward_passes=bindparam("pass_count"),
    )
)
_QUEUED_AGAIN: dict[str, Any] = {"state": JobState.QUEUED, "owner": None, "lease_expires": None}
