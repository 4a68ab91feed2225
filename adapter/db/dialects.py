"""Statements that each kind of database has in its own way."""

from collections.abc import Callable, Mapping
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    Connection,
    Select,
    Table,
    bindparam,
    cast,
    func,
    select,
    text,
    update,
)
from sqlalchemy.dialects import postgresql, sqlite

from adapter.db.tables import counters, job_ids, submissions

Insert = postgresql.Insert | sqlite.Insert

_INSERTS: Mapping[str, Callable[[Table], Insert]] = {
    "postgresql": postgresql.insert,
    "sqlite": sqlite.insert,
}
# Made once: making a statement takes longer than running it.
_NEXT_VALUES = select(job_ids.next_value()).select_from(
    func.generate_series(1, bindparam("more")).table_valued("number")
)
_COUNT_ON = (
    update(counters)
    .where(counters.c.name == "jobs")
    .values(next_id=counters.c.next_id + bindparam("more"))
    .returning(counters.c.next_id)
)


def insert_into(connection: Connection, table: Table) -> Insert:
    """An INSERT that can have ON CONFLICT."""
    return _INSERTS[connection.dialect.name](table)


def reserve_job_ids(connection: Connection, count: int) -> list[int]:
    """Take the next ids, in ascending order. No other transaction waits for this one.

    SQLite has one writer at a time anyway, so a row counts there.
    """
    if connection.dialect.name == "postgresql":
        return sorted(connection.scalars(_NEXT_VALUES, {"more": count}))
    end: int = connection.execute(_COUNT_ON, {"more": count}).scalar_one()
    return list(range(end - count, end))


def job_ids_of(connection: Connection) -> Select[Any]:
    """The ids of the jobs of one row of `submissions`, for a query around this one."""
    if connection.dialect.name == "postgresql":
        listed = func.json_array_elements_text(cast(submissions.c.ids, JSON))
    else:
        listed = func.json_each(submissions.c.ids)
    value = listed.table_valued("value").c.value
    return select(cast(value, BigInteger)).correlate(submissions)


def advisory_lock(connection: Connection, number: int) -> None:
    """Make transactions that take this number run one after the other.

    SQLite has one writer at a time anyway.
    """
    if connection.dialect.name == "postgresql":
        connection.execute(text("SELECT pg_advisory_xact_lock(:number)"), {"number": number})
