"""Which database errors are transient, and how many connections a worker takes."""

import asyncio
import uuid
from collections.abc import Callable, Iterator
from typing import TypeVar

import pytest
from sqlalchemy import Connection, func, literal, select, text
from sqlalchemy.exc import DBAPIError

from adapter.db.database import Database, connect
from adapter.errors import StoreUnavailable

#: Tests that use a database use this one.
DATABASES = ("postgresql",)

T = TypeVar("T")

ONE = select(literal(1))


class DriverError(Exception):
    """An error of a PostgreSQL driver."""

    def __init__(self, sqlstate: str | None) -> None:
        super().__init__("no")
        self.sqlstate = sqlstate


class Failing:
    """A backend that always fails with one error."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    async def read(self, _query: Callable[[Connection], T]) -> T:
        """Fail."""
        raise self._error

    async def write(self, _change: Callable[[Connection], T], **_: object) -> T:
        """Fail."""
        raise self._error


def shapes(sqlstate: str | None) -> Iterator[Exception]:
    """The driver's error, wrapped by SQLAlchemy and as raised while connecting."""
    yield DBAPIError("SELECT 1", {}, DriverError(sqlstate))
    yield DriverError(sqlstate)


@pytest.mark.parametrize(
    "sqlstate",
    [
        pytest.param("53300", id="too many connections"),
        pytest.param("57P03", id="it starts or stops"),
        pytest.param("08006", id="the connection has failed"),
        pytest.param("40P01", id="deadlock"),
    ],
)
async def test_database_that_cannot_answer_now_is_away(sqlstate: str) -> None:
    """A transient error becomes `StoreUnavailable`."""
    for error in shapes(sqlstate):
        database = Database(Failing(error))
        with pytest.raises(StoreUnavailable, match="no"):
            await database.read(ONE)
        with pytest.raises(StoreUnavailable, match="no"):
            await database.write(lambda connection: connection.execute(ONE))


@pytest.mark.parametrize("sqlstate", ["42P01", None])
async def test_database_that_refuses_a_statement_is_there(sqlstate: str | None) -> None:
    """A permanent error is raised unchanged."""
    for error in shapes(sqlstate):
        with pytest.raises(type(error)):
            await Database(Failing(error)).read(ONE)


async def test_postgresql_without_free_connections_is_away(database_url: str) -> None:
    """If PostgreSQL has no free connection, the error is `StoreUnavailable`."""
    role = f"limited_{uuid.uuid4().hex}"
    async with connect(database_url) as connections:
        create = text(f"CREATE ROLE {role} LOGIN CONNECTION LIMIT 0")
        await connections.write(lambda connection: connection.execute(create))

    async with connect(database_url.replace("postgres@", f"{role}@")) as connections:
        with pytest.raises(StoreUnavailable, match="too many connections"):
            await Database(connections).read(ONE)


async def test_ten_workers_leave_connections_to_others(database_url: str) -> None:
    """A busy worker takes at most 8 of PostgreSQL's 100 connections."""
    sleep = select(func.pg_sleep(0.02))
    here = text("SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()")
    async with connect(database_url) as connections:
        reads = [connections.read(lambda c: c.execute(sleep).all()) for _ in range(40)]
        writes = [connections.write(lambda c: c.execute(sleep).all()) for _ in range(40)]
        await asyncio.gather(*reads, *writes)
        assert await connections.read(lambda c: c.scalar(here)) <= 8
