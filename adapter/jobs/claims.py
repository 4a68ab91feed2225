"""Which queued jobs a worker may claim, and claiming them.

When an engine dies, any of the requests in flight may have killed it, so all of them are suspects.
Only a few suspects run at a time, so that a job that kills engines takes few others down with it
again. A job's last attempt runs while no other job does, so that only a job that fails by itself is
given up.
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

from adapter.db.dialects import advisory_lock
from adapter.db.tables import jobs
from adapter.jobs.job import JobState

#: The most suspects, jobs with a lost attempt, that run at a time on all workers together.
MAX_CONCURRENT_RETRIES = 8
CLAIM_LOCK = 0x634C4C4D  # any number, as long as all workers use the same

QUEUED = jobs.c.state == JobState.QUEUED
RUNNING = jobs.c.state == JobState.RUNNING

#: A job's model at Triton; `default_model` for one that names none.
MODEL = func.coalesce(jobs.c.model, bindparam("default_model"))
#: A job whose model is away does not hold back the jobs of others.
_AVAILABLE = MODEL.in_(bindparam("available_models", expanding=True))
_OF_MODEL = bindparam("claimed_model") == MODEL
_FINAL = jobs.c.attempts >= bindparam("final_attempt")
_SUSPECT = and_(jobs.c.attempts >= 1, jobs.c.attempts < bindparam("final_attempt"))
_NEW = jobs.c.attempts == 0

_SITUATION = select(
    exists().where(RUNNING, _FINAL).label("final_running"),
    exists().where(QUEUED, _FINAL, _AVAILABLE).label("final_queued"),
    exists().where(RUNNING).label("any_running"),
    exists().where(QUEUED, _SUSPECT, _OF_MODEL).label("suspect_queued"),
    select(func.count())
    .select_from(jobs)
    .where(RUNNING, _SUSPECT)
    .scalar_subquery()
    .label("suspects_running"),
)


def _claim(which: ColumnElement[bool]) -> Update:
    in_time = or_(jobs.c.deadline.is_(None), jobs.c.deadline > bindparam("now"))
    # On PostgreSQL a cancellation may come between reading and writing; hence the row lock. A CTE,
    # because PostgreSQL may run a plain subquery several times and exceed the limit.
    chosen = (
        select(jobs.c.id)
        .where(QUEUED, which, in_time, _OF_MODEL)
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
            jobs.c.num_rescues,
            jobs.c.priority,
            jobs.c.created_at,
            jobs.c.deadline,
            jobs.c.api_key,
            jobs.c.request_id,
            jobs.c.traceparent,
            jobs.c.model,
        )
    )


_CLAIM_FINAL, _CLAIM_SUSPECTS, _CLAIM_NEW = map(_claim, (_FINAL, _SUSPECT, _NEW))


def final_attempt(max_attempts: int) -> int:
    """The number of lost attempts after which the next one is the last, and runs alone."""
    return max(1, max_attempts - 1)


def claim_rows(
    connection: Connection,
    owner: str,
    *,
    limit: int,
    lease: float,
    max_attempts: int,
    now: float,
    model: str,
    available_models: Sequence[str],
    default_model: str,
) -> list[Row[Any]]:
    """Make up to `limit` queued jobs of one model the owner's; their rows by priority and age.

    The rules for suspects hold across models, since several may share a tritonserver. Jobs whose
    model is not among `available_models` are as if they were not queued.
    """
    # Claims run one after the other on PostgreSQL too, or their counts would change meanwhile.
    advisory_lock(connection, CLAIM_LOCK)
    of_model = {"claimed_model": model, "default_model": default_model}
    bound = {"final_attempt": final_attempt(max_attempts)}
    new = {"claimant": owner, "lease_end": now + lease, "now": now, **of_model}

    def claim(statement: Update, most: int) -> Sequence[Row[Any]]:
        values = {**new, "most": most}
        if statement is not _CLAIM_NEW:
            values |= bound
        return connection.execute(statement, values).all() if most > 0 else []

    situation = connection.execute(
        _SITUATION, {**bound, **of_model, "available_models": list(available_models)}
    ).one()
    if situation.final_running:
        return []
    if situation.final_queued:
        return [] if situation.any_running else list(claim(_CLAIM_FINAL, 1))
    rows: list[Row[Any]] = []
    if situation.suspect_queued:
        rows += claim(
            _CLAIM_SUSPECTS, min(limit, MAX_CONCURRENT_RETRIES - situation.suspects_running)
        )
    rows += claim(_CLAIM_NEW, limit - len(rows))
    return sorted(rows, key=lambda row: (row.priority, row.id))
