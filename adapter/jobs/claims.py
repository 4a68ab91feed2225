"""Which queued jobs a worker may take up, and taking them.

When an engine dies, nobody knows which of its requests has done it, so each of them is suspected.
Of suspects only a few run at a time, so that a job that kills engines meets few others twice; and
the last attempt of a job runs while nothing else does, so that a job is given up for what happened
to itself alone.
"""

from collections.abc import Sequence
from typing import Any

from sqlalchemy import ColumnElement, Row, Select, and_, func, or_, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from adapter.jobs.job import JobState
from adapter.tables import counters, jobs

#: So many jobs that were lost before may run at a time, all workers together.
SUSPECTS_AT_ONCE = 8

QUEUED = jobs.c.state == JobState.QUEUED
RUNNING = jobs.c.state == JobState.RUNNING


async def take_up(
    connection: AsyncConnection,
    owner: str,
    *,
    limit: int,
    lease: float,
    max_attempts: int,
    now: float,
) -> list[Row[Any]]:
    """Make up to `limit` queued jobs the owner's; their rows by priority and age."""
    # Claims follow one another on PostgreSQL too, or what they count would change meanwhile.
    await hold_counter(connection)
    taken: list[Row[Any]] = []
    for which, most in await _claimable(connection, limit, max_attempts):
        most = min(most, limit - len(taken))
        if most > 0:
            taken += await _take(connection, owner, which, most, now, lease)
    return sorted(taken, key=lambda row: (row.priority, row.id))


async def hold_counter(connection: AsyncConnection) -> None:
    """Wait for the row that submissions and claims take one after the other."""
    await connection.execute(
        select(counters.c.name).where(counters.c.name == "jobs").with_for_update()
    )


def any_of(*conditions: ColumnElement[bool]) -> Select[Any]:
    """The query for one such job."""
    return select(jobs.c.id).where(*conditions).limit(1)


async def _exists(connection: AsyncConnection, *conditions: ColumnElement[bool]) -> bool:
    return await connection.scalar(any_of(*conditions)) is not None


def lost_before_last(max_attempts: int) -> int:
    """How many attempts a job has lost whose next one is the last, to be made alone."""
    return max(1, max_attempts - 1)


async def _claimable(
    connection: AsyncConnection, limit: int, max_attempts: int
) -> list[tuple[ColumnElement[bool], int]]:
    """The kinds of jobs that may be taken now, and how many of each at most."""
    last = jobs.c.attempts >= lost_before_last(max_attempts)
    if await _exists(connection, RUNNING, last):
        return []
    if await _exists(connection, QUEUED, last):
        return [] if await _exists(connection, RUNNING) else [(last, 1)]
    lost_before = and_(jobs.c.attempts >= 1, jobs.c.attempts < max_attempts - 1)
    running = select(func.count()).select_from(jobs).where(RUNNING, lost_before)
    room = SUSPECTS_AT_ONCE - (await connection.scalar(running) or 0)
    return [(lost_before, room), (jobs.c.attempts == 0, limit)]


async def _take(
    connection: AsyncConnection,
    owner: str,
    which: ColumnElement[bool],
    limit: int,
    now: float,
    lease: float,
) -> Sequence[Row[Any]]:
    in_time = or_(jobs.c.deadline.is_(None), jobs.c.deadline > now)
    first = select(jobs.c.id).where(QUEUED, which, in_time)
    # A cancellation may come between reading and writing on PostgreSQL; hence the lock. A mere
    # subquery might be run several times there and so exceed the limit; not a CTE.
    chosen = (
        first.order_by(jobs.c.priority, jobs.c.id)
        .limit(limit)
        .with_for_update(skip_locked=True)
        .cte("chosen")
    )
    take = (
        update(jobs)
        .where(jobs.c.id.in_(select(chosen.c.id)), QUEUED)
        .values(state=JobState.RUNNING, owner=owner, lease_expires=now + lease, started_at=now)
        .returning(jobs)
    )
    rows: Sequence[Row[Any]] = (await connection.execute(take)).all()
    return rows
