"""Jobs in the database. Every change of state is one conditional UPDATE: if two race, the second
changes no row and is told so."""

import json
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, replace
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
from adapter.db.dialects import reserve_job_ids
from adapter.db.tables import jobs, submissions
from adapter.errors import TooManyJobs
from adapter.jobs import idempotency
from adapter.jobs.claims import MODEL, QUEUED, RUNNING, claim_rows
from adapter.jobs.idempotency import IdempotencyRecord
from adapter.jobs.job import (
    ACTIVE,
    DEFAULT_OPTIONS,
    ClaimedJob,
    Job,
    JobDetails,
    JobOptions,
    JobState,
    engine_request_id,
    timeout_message,
)
from adapter.jobs.outcome import Failed, Finished, Interrupted, Outcome, Snoozed
from adapter.telemetry.metrics import JOBS_DONE
from adapter.types import Event, Inputs, TokenDetail, Usage

Clock = Callable[[], float]

MAX_ID = 2**63 - 1
#: Workers seldom die because of a job; but a job that kills its workers must end, too.
MAX_RESCUES = 20
OVERDUE_BATCH = 500

#: Counted here, since a job may end while no worker runs it. Made now, so that they show as 0.
_DONE = {state: JOBS_DONE.labels(state) for state in JobState if state.done}


class JobStore:
    """Every operation on jobs. Every method may raise `StoreUnavailable`."""

    def __init__(
        self,
        database: Database,
        *,
        max_attempts: int,
        default_model: str = "dllm",
        clock: Clock = time.time,
    ) -> None:
        self._database = database
        self._default_model = default_model
        self._max_attempts = max_attempts
        self._clock = clock

    @property
    def outage(self) -> str | None:
        """Why the database cannot be used now; None if it can."""
        return self._database.outage

    async def add(
        self,
        requests: Sequence[Inputs],
        *,
        max_queued: int,
        max_queued_of_key: int | None = None,
        options: JobOptions = DEFAULT_OPTIONS,
    ) -> list[int]:
        """Queue all requests or none; their ids, in ascending order. Raises `TooManyJobs`."""
        most = (max_queued, max_queued_of_key)
        return await self._database.write(
            lambda connection: self._add(connection, requests, most, options)
        )

    async def add_once(
        self,
        requests: Sequence[Inputs],
        *,
        key: str,
        max_queued: int,
        max_queued_of_key: int | None = None,
        options: JobOptions = DEFAULT_OPTIONS,
    ) -> tuple[list[int], bool]:
        """As `add`, but only once under this key; the ids, and whether they are new.

        Raises `TooManyJobs`, and `KeyReused` if the key was used for other requests.
        """
        record = IdempotencyRecord.of(key, requests, options)

        def add(connection: Connection) -> tuple[list[int], bool]:
            known = idempotency.find_ids(connection, record)
            if known is None and not idempotency.insert(connection, record, self._clock()):
                known = idempotency.find_ids(connection, record)  # of a call at the same time
                assert known is not None
            if known is not None:
                return known, False
            ids = self._add(connection, requests, (max_queued, max_queued_of_key), options)
            idempotency.set_ids(connection, record, ids)
            return ids, True

        return await self._database.write(add)

    async def known(
        self, requests: Sequence[Inputs], *, key: str, options: JobOptions
    ) -> list[int] | None:
        """The ids that these requests got before under this key, if they were accepted.

        Raises `KeyReused`.
        """
        record = IdempotencyRecord.of(key, requests, options)
        return await self._database.write(
            lambda connection: idempotency.find_ids(connection, record)
        )

    async def get(self, job_id: int, *, api_key: str | None = None) -> Job | None:
        """The job, or None if it does not exist or belongs to another key."""
        if not 0 <= job_id <= MAX_ID:
            return None
        query = _SHOWN if api_key is None else _SHOWN_TO_KEY
        for row in await self._database.read(query, {"job": job_id, "key": api_key}):
            return _shown(row)
        return None

    async def done_among(self, ids: Collection[int]) -> set[int]:
        """Which of these jobs are done."""
        return {row.id for row in await self._database.read(_DONE_AMONG, {"ids": list(ids)})}

    async def count_active(self) -> Counter[tuple[JobState, str]]:
        """How many jobs are queued and how many run, by state and model."""
        query = (
            select(jobs.c.state, jobs.c.model, func.count().label("jobs"))
            .where(jobs.c.state.in_(ACTIVE))
            .group_by(jobs.c.state, jobs.c.model)
        )
        found: Counter[tuple[JobState, str]] = Counter()
        for row in await self._database.read(query):
            found[JobState(row.state), row.model or self._default_model] += row.jobs
        return found

    async def claim(
        self,
        owner: str,
        *,
        limit: int,
        lease: float,
        model: str | None = None,
        available_models: Sequence[str] | None = None,
    ) -> list[ClaimedJob]:
        """Claim up to `limit` queued jobs of a model by priority and age.

        `available_models` are those whose jobs some worker may claim now, by default this one; see
        `adapter.jobs.claims`.
        """
        model = model or self._default_model
        # An idle worker that polls must not take SQLite's only write lock.
        if not await self._database.read(_ANY_QUEUED, self._of(model)):
            return []
        now = self._clock()
        rows = await self._database.write(
            lambda connection: claim_rows(
                connection,
                owner,
                limit=limit,
                lease=lease,
                max_attempts=self._max_attempts,
                now=now,
                model=model,
                available_models=available_models or [model],
                default_model=self._default_model,
            )
        )
        return [_claimed(row, owner, now) for row in rows]

    async def renew(self, owner: str, ids: Collection[int], *, lease: float) -> set[int]:
        """Renew the leases; the ids of the jobs that are still this owner's."""
        renewal = (
            update(jobs)
            .where(jobs.c.id.in_(ids), RUNNING, jobs.c.owner == owner)
            .values(lease_expires=self._clock() + lease)
            .returning(jobs.c.id)
        )
        return await self._database.write(lambda connection: set(connection.scalars(renewal)))

    async def settle(self, job: ClaimedJob, outcome: Outcome) -> Job | None:
        """Record how a run ended; the job if that is final and the claim still held."""
        now = self._clock()
        details = JobDetails(job.created_at, job.claimed_at, now)
        match outcome:
            case Finished(event=event):
                if await self.finish(job, event, now=now):
                    details = replace(
                        details,
                        finish_reason=event.finish_reason,
                        usage=event.usage,
                        seed=event.seed,
                        tokens=event.tokens,
                    )
                    state, text = JobState.FINISHED, event.text
                    return Job(job.id, state, job.attempts, text, None, details=details)
            case Failed(reason):
                if await self.fail(job, reason or "", now=now):
                    state = JobState.FAILED
                    return Job(job.id, state, job.attempts, None, reason, details=details)
            case Interrupted(reason):
                await self.retry(job, reason or "")
            case Snoozed():
                await self.release(job)
        return None

    async def finish(self, job: ClaimedJob, result: Event, *, now: float | None = None) -> bool:
        """Store the result. False if the claim no longer holds."""
        usage = result.usage
        values = {
            **_ended(JobState.FINISHED, self._clock() if now is None else now),
            "text": result.text,
            "finish_reason": result.finish_reason,
            "seed": result.seed,
            "prompt_tokens": usage and usage.prompt_tokens,
            "completion_tokens": usage and usage.completion_tokens,
            "steps": usage and usage.steps,
            "forward_passes": usage and usage.forward_passes,
            "cached_tokens": usage and usage.cached_tokens,
            "tokens": _as_json(result.tokens),
        }
        return await self._end(JobState.FINISHED, _CHANGE_CLAIMED, {**_claim_of(job), **values})

    async def fail(self, job: ClaimedJob, error: str, *, now: float | None = None) -> bool:
        """Fail the job with the reason. False if the claim no longer holds."""
        now = self._clock() if now is None else now
        values = {**_ended(JobState.FAILED, now), "error": error}
        return await self._end(JobState.FAILED, _CHANGE_CLAIMED, {**_claim_of(job), **values})

    async def release(self, job: ClaimedJob) -> bool:
        """Requeue the job without counting an attempt. False if the claim no longer holds."""
        values = {**_claim_of(job), **_QUEUED_AGAIN}
        return await self._database.change(_CHANGE_CLAIMED, values) == 1

    async def retry(self, job: ClaimedJob, reason: str) -> bool:
        """Requeue the job, or fail it after its last attempt. False if the claim is over."""
        error = f"given up after {self._max_attempts} attempts: {reason}"
        values = _claim_of(job)
        return await self._requeue(_CLAIMED, "attempts", self._max_attempts, error, values) == 1

    async def requeue_expired(self) -> int:
        """Rescue jobs whose lease has expired: requeue them; the number of jobs.

        This counts no attempt: workers are restarted all the time.
        """
        expired = and_(RUNNING, jobs.c.lease_expires < self._clock())
        if not await self._database.read(_any_of(expired)):
            return 0
        error = f"given up: {MAX_RESCUES} workers have died that ran it"
        return await self._requeue(expired, "num_rescues", MAX_RESCUES, error)

    async def fail_overdue(self) -> int:
        """Fail queued jobs whose deadline has passed, some hundred at a time; their number."""
        now = self._clock()
        too_late = and_(QUEUED, jobs.c.deadline <= now)
        if not await self._database.read(_any_of(too_late)):
            return 0
        timeout = (jobs.c.deadline - jobs.c.created_at).label("timeout")
        # The lock keeps two workers from counting the same jobs.
        overdue = (
            select(jobs.c.id, timeout)
            .where(too_late)
            .limit(OVERDUE_BATCH)
            .with_for_update(skip_locked=True)
        )
        end = (
            update(jobs)
            .where(jobs.c.id == bindparam("job_id"))
            .values(error=bindparam("reason"), **_ended(JobState.FAILED, now))
        )

        def change(connection: Connection) -> int:
            rows = connection.execute(overdue).all()
            reasons = [{"job_id": row.id, "reason": timeout_message(row.timeout)} for row in rows]
            if reasons:
                connection.execute(end, reasons)
            return len(reasons)

        failed = await self._database.write(change)
        _DONE[JobState.FAILED].inc(failed)
        return failed

    async def cancel(self, job_id: int, *, api_key: str | None = None) -> bool:
        """Cancel the job unless it is done or belongs to another key. True if this call did."""
        if not 0 <= job_id <= MAX_ID:
            return False
        cancellation = (
            update(jobs)
            .where(jobs.c.id == job_id, jobs.c.state.in_(ACTIVE), *_belongs_to(api_key))
            .values(_ended(JobState.CANCELLED, self._clock()))
        )
        return await self._end(JobState.CANCELLED, cancellation)

    async def purge(self, *, ttl: float, limit: int) -> int:
        """Delete up to `limit` results older than `ttl` seconds; their number."""
        old = jobs.c.finished_at < self._clock() - ttl
        oldest = select(jobs.c.id).where(old).limit(limit)
        ids = [row.id for row in await self._database.read(oldest)]
        if not ids:
            return 0
        return await self._database.change(delete(jobs).where(jobs.c.id.in_(ids), old))

    async def purge_idempotency_keys(self, *, ttl: float) -> None:
        """Delete idempotency records older than `ttl` seconds."""
        before = self._clock() - ttl
        old = select(submissions.c.key).where(submissions.c.created_at < before).limit(1)
        if await self._database.read(old):
            await self._database.write(lambda connection: idempotency.purge(connection, before))

    def _add(
        self,
        connection: Connection,
        requests: Sequence[Inputs],
        most: tuple[int, int | None],
        options: JobOptions,
    ) -> list[int]:
        # On PostgreSQL, submissions at the same moment do not count each other.
        max_queued, max_of_key = most
        of_model = self._of(options.model)
        queued = connection.scalar(_COUNT_QUEUED, of_model) or 0
        _refuse_beyond(max_queued, queued, len(requests))
        # The jobs of one key are counted only where they may be too many: it takes longer.
        if max_of_key is not None and queued + len(requests) > max_of_key:
            of_key = (
                connection.scalar(_COUNT_QUEUED_BY_KEY, {"key": options.api_key, **of_model}) or 0
            )
            _refuse_beyond(max_of_key, of_key, len(requests), of_key=True)
        ids = reserve_job_ids(connection, len(requests))
        connection.execute(_INSERT, self._new_rows(ids, requests, options))
        return ids

    def _new_rows(
        self, ids: Sequence[int], requests: Sequence[Inputs], options: JobOptions
    ) -> list[dict[str, Any]]:
        now = self._clock()
        return [
            {
                "id": job_id,
                "state": JobState.QUEUED,
                "request": json.dumps(dict(request)),
                "attempts": 0,
                "created_at": now,
                "priority": options.priority,
                "deadline": None if options.timeout is None else now + options.timeout,
                "api_key": options.api_key,
                "request_id": options.request_id,
                "traceparent": options.traceparent,
                "model": options.model,
            }
            for job_id, request in zip(ids, requests, strict=True)
        ]

    def _of(self, model: str | None) -> dict[str, str]:
        """The parameters of `_OF_MODEL`."""
        return {"model": model or self._default_model, "default_model": self._default_model}

    async def _end(
        self, state: JobState, change: UpdateBase, values: Mapping[str, Any] | None = None
    ) -> bool:
        """Whether the change ended a job; if so, count it."""
        ended = await self._database.change(change, values) == 1
        if ended:
            _DONE[state].inc()
        return ended

    async def _requeue(
        self,
        which: ColumnElement[bool],
        counter: str,
        limit: int,
        error: str,
        values: Mapping[str, Any] | None = None,
    ) -> int:
        """Add one to the counter; fail the jobs that reach the limit, requeue the others."""
        count = jobs.c[counter] + 1
        given_up = {**_ended(JobState.FAILED, self._clock()), "error": error, counter: count}
        fail = update(jobs).where(which, count >= limit).values(given_up)
        queue = update(jobs).where(which).values({**_QUEUED_AGAIN, counter: count})
        failed, queued = await self._database.write(
            lambda connection: [connection.execute(part, values).rowcount for part in (fail, queue)]
        )
        _DONE[JobState.FAILED].inc(failed)
        return failed + queued


def _ended(state: JobState, now: Any) -> dict[str, Any]:
    return {"state": state, "owner": None, "deadline": None, "finished_at": now}


def _any_of(*conditions: ColumnElement[bool]) -> Select[Any]:
    return select(jobs.c.id).where(*conditions).limit(1)


def _claim_of(job: ClaimedJob) -> dict[str, Any]:
    """The parameters of `_CLAIMED`."""
    return {
        "job": job.id,
        "by": job.owner,
        "lost_runs": job.attempts,
        "rescues": job.num_rescues,
        "began": job.claimed_at,
    }


def _belongs_to(api_key: str | None) -> list[ColumnElement[bool]]:
    return [] if api_key is None else [jobs.c.api_key == api_key]


def _shown(row: Row[Any]) -> Job:
    state, name = JobState(row.state), None
    if state is JobState.RUNNING:
        name = engine_request_id(row.id, row.request_id, row.owner, row.attempts, row.num_rescues)
    return Job(row.id, state, row.attempts, row.text, row.error, name, _details(row))


def _details(row: Row[Any]) -> JobDetails:
    usage = (row.prompt_tokens, row.completion_tokens, row.steps, row.forward_passes)
    return JobDetails(
        row.created_at,
        None if row.state == JobState.QUEUED else row.started_at,
        row.finished_at,
        row.finish_reason,
        None if None in usage else Usage(*usage, row.cached_tokens or 0),
        row.seed,
        None if row.tokens is None else [TokenDetail.of(entry) for entry in json.loads(row.tokens)],
    )


def _as_json(tokens: list[TokenDetail] | None) -> str | None:
    return None if tokens is None else json.dumps([asdict(token) for token in tokens])


def _claimed(row: Row[Any], owner: str, now: float) -> ClaimedJob:
    timeout = None if row.deadline is None else row.deadline - row.created_at
    return ClaimedJob(
        id=row.id,
        owner=owner,
        inputs=json.loads(row.request),
        attempts=row.attempts,
        num_rescues=row.num_rescues,
        options=JobOptions(
            row.priority, timeout, row.api_key, row.request_id, row.traceparent, row.model
        ),
        time_left=None if row.deadline is None else row.deadline - now,
        waited=max(0.0, now - row.created_at),
        created_at=row.created_at,
        claimed_at=now,
    )


def _refuse_beyond(max_queued: int, queued: int, extra: int, *, of_key: bool = False) -> None:
    if queued + extra > max_queued:
        whose = " of this key" if of_key else ""
        settings = "DLLM_MAX_QUEUED_JOBS" + (", DLLM_KEY_SHARE" if of_key else "")
        msg = f"{queued} jobs{whose} are waiting, and at most {max_queued} may ({settings})"
        raise TooManyJobs(msg)


# Statements that run for every job are made once: making one takes longer than running it.
_SHOWN = select(
    jobs.c.id,
    jobs.c.state,
    jobs.c.attempts,
    jobs.c.num_rescues,
    jobs.c.text,
    jobs.c.error,
    jobs.c.owner,
    jobs.c.request_id,
    jobs.c.created_at,
    jobs.c.started_at,
    jobs.c.finished_at,
    jobs.c.finish_reason,
    jobs.c.prompt_tokens,
    jobs.c.completion_tokens,
    jobs.c.steps,
    jobs.c.forward_passes,
    jobs.c.cached_tokens,
    jobs.c.seed,
    jobs.c.tokens,
).where(jobs.c.id == bindparam("job"))
_SHOWN_TO_KEY = _SHOWN.where(jobs.c.api_key == bindparam("key"))
_DONE_AMONG = select(jobs.c.id).where(
    jobs.c.id.in_(bindparam("ids", expanding=True)), jobs.c.state.not_in(ACTIVE)
)
_OF_MODEL = bindparam("model") == MODEL
_ANY_QUEUED = _any_of(QUEUED, _OF_MODEL)
_COUNT_QUEUED = select(func.count()).select_from(jobs).where(QUEUED, _OF_MODEL)
_COUNT_QUEUED_BY_KEY = _COUNT_QUEUED.where(jobs.c.api_key == bindparam("key"))
_INSERT = insert(jobs)
# A worker that lost its lease may have claimed the job again, so the owner alone does not tell one
# claim from another: a rescue changes `num_rescues`, a release only `started_at`.
_CLAIMED = and_(
    jobs.c.id == bindparam("job"),
    RUNNING,
    jobs.c.owner == bindparam("by"),
    jobs.c.attempts == bindparam("lost_runs"),
    jobs.c.num_rescues == bindparam("rescues"),
    jobs.c.started_at == bindparam("began"),
)
# Sets the columns that have values.
_CHANGE_CLAIMED = update(jobs).where(_CLAIMED)
_QUEUED_AGAIN: dict[str, Any] = {"state": JobState.QUEUED, "owner": None, "lease_expires": None}
