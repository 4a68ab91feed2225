"""Which queued jobs a worker may take up, and taking them.

When an engine dies, nobody knows which of its requests has done it, so each of them is suspected.
Of suspects only a few run at a time, so that a job that kills engines meets few others twice; and
the last attempt of a job runs while nothing else does, so that a job is given up for what happened
to itself alone.
"""

from collections.abc import Sequence
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Connection,
    Row,
    Update,
    and_,
    bindparam,
    exists,
    func,
    or_,
    select,
    update,
)

from adapter.db.tables import counters, jobs
from adapter.jobs.job import JobState

#: So many jobs that were lost before may run at a time, all workers together.
SUSPECTS_AT_ONCE = 8

QUEUED = jobs.c.state == JobState.QUEUED
RUNNING = jobs.c.state == JobState.RUNNING

_LAST = jobs.c.attempts >= bindparam("lost_before_last")
_LOST_BEFORE = and_(jobs.c.attempts >= 1, jobs.c.attempts < bindparam("lost_before_last"))
_NEW = jobs.c.attempts == 0

_SITUATION = select(
    exists().where(RUNNING, _LAST).label("last_runs"),
    exists().where(QUEUED, _LAST).label("last_waits"),
    exists().where(RUNNING).label("any_runs"),
    exists().where(QUEUED, _LOST_BEFORE).label("suspect_waits"),
    select(func.count())
    .select_from(jobs)
    .where(RUNNING, _LOST_BEFORE)
    .scalar_subquery()
    .label("suspects"),
)
_QUEUE = select(
    select(func.count()).select_from(jobs).where(QUEUED).scalar_subquery().label("queued"),
    exists().where(RUNNING, _LAST).label("last_runs"),
)
_COUNTER = select(counters.c.name).where(counters.c.name == "jobs").with_for_update()


def _taking(which: ColumnElement[bool]) -> Update:
    in_time = or_(jobs.c.deadline.is_(None), jobs.c.deadline > bindparam("now"))
    # A cancellation may come between reading and writing on PostgreSQL; hence the lock. A mere
    # subquery might be run several times there and so exceed the limit; not a CTE.
    chosen = (
        select(jobs.c.id)
        .where(QUEUED, which, in_time)
        .order_by(jobs.c.priority, jobs.c.id)
        .limit(bindparam("most"))
        .with_for_update(skip_locked=True)
        .cte("chosen")
    )
    return (
        update(jobs)
        .where(jobs.c.id.in_(select(chosen.c.id)), QUEUED)
        .values(
            state=JobState.RUNNING,
            owner=bindparam("claimant"),
            lease_expires=bindparam("lease_end"),
            started_at=bindparam("now"),
        )
        .returning(
            jobs.c.id,
            jobs.c.request,
            jobs.c.attempts,
            jobs.c.orphaned,
            jobs.c.priority,
            jobs.c.created_at,
            jobs.c.deadline,
            jobs.c.api_key,
            jobs.c.request_id,
            jobs.c.traceparent,
        )
    )


_TAKE_LAST, _TAKE_LOST_BEFORE, _TAKE_NEW = map(_taking, (_LAST, _LOST_BEFORE, _NEW))


def lost_before_last(max_attempts: int) -> int:
    """How many attempts a job has lost whose next one is the last, to be made alone."""
    return max(1, max_attempts - 1)


def look_at_queue(connection: Connection, *, max_attempts: int) -> tuple[int, bool]:
    """How many jobs are queued, and whether a new one may run now: nobody has to go first.

    Whoever asks holds the counter, or what was true is not for long.
    """
    bound = {"lost_before_last": lost_before_last(max_attempts)}
    queued, last_runs = connection.execute(_QUEUE, bound).one()
    return queued, not queued and not last_runs


def hold_counter(connection: Connection) -> None:
    """Wait for the row that submissions and claims take one after the other."""
    connection.execute(_COUNTER)


def take_up(
    connection: Connection,
    owner: str,
    *,
    limit: int,
    lease: float,
    max_attempts: int,
    now: float,
) -> list[Row[Any]]:
    """Make up to `limit` queued jobs the owner's; their rows by priority and age."""
    # Claims follow one another on PostgreSQL too, or what they count would change meanwhile.
    hold_counter(connection)
    bound = {"lost_before_last": lost_before_last(max_attempts)}
    new = {"claimant": owner, "lease_end": now + lease, "now": now}

    def take(statement: Update, most: int) -> Sequence[Row[Any]]:
        values = {**new, "most": most}
        if statement is not _TAKE_NEW:
            values |= bound
        return connection.execute(statement, values).all() if most > 0 else []

    situation = connection.execute(_SITUATION, bound).one()
    if situation.last_runs:
        return []
    if situation.last_waits:
        return [] if situation.any_runs else list(take(_TAKE_LAST, 1))
    taken: list[Row[Any]] = []
    if situation.suspect_waits:
        taken += take(_TAKE_LOST_BEFORE, min(limit, SUSPECTS_AT_ONCE - situation.suspects))
    taken += take(_TAKE_NEW, limit - len(taken))
    return sorted(taken, key=lambda row: (row.priority, row.id))
