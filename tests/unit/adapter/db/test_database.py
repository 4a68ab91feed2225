"""Which database errors are transient, and how many connections a worker takes."""

import asyncio
import os
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import TypeVar

import asyncpg
import psutil
import pytest
from adapter_fakes import until
from sqlalchemy import Connection, func, literal, make_url, select, text
from sqlalchemy.exc import DBAPIError

from adapter.db.database import Database, connect
from adapter.errors import StoreUnavailable
from adapter.jobs.store import JobStore
from launcher.ports import free_port

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


@asynccontextmanager
async def open_transaction(database_url: str, statement: str) -> AsyncIterator[None]:
    """Someone's transaction that has executed the statement and does not end."""
    url = make_url(database_url).set(drivername="postgresql")
    someone = await asyncpg.connect(url.render_as_string(hide_password=False))
    try:
        transaction = someone.transaction()
        await transaction.start()
        await someone.execute(statement)
        yield
    finally:
        await someone.close()


async def test_open_transaction_on_a_row_stops_no_other_job(database_url: str) -> None:
    """Submitting and claiming go on while a transaction holds the counter and a queued job."""
    async with Database.open(database_url, timeout=1) as database:
        store = JobStore(database, max_attempts=3)
        await store.add([{}], max_queued=9)
        for statement in (
            "SELECT * FROM counters FOR UPDATE",
            "SELECT * FROM jobs FOR UPDATE",
        ):
            async with open_transaction(database_url, statement):
                ids = await store.add([{}, {}], max_queued=9)
                once, _ = await store.add_once([{}], key=statement, max_queued=9)
                claimed = await store.claim("a", limit=9, lease=30)
                assert {*ids, *once} <= {job.id for job in claimed}


async def test_wait_for_a_lock_has_an_end(database_url: str) -> None:
    """A change of a row that a transaction holds is given up as `StoreUnavailable`."""
    async with Database.open(database_url, timeout=1) as database:
        store = JobStore(database, max_attempts=3)
        await store.add([{}], max_queued=9)
        async with open_transaction(database_url, "SELECT * FROM jobs FOR UPDATE"):
            began = time.monotonic()
            with pytest.raises(StoreUnavailable, match="lock timeout"):
                await store.cancel(0)
            assert time.monotonic() - began < 1
        assert database.outage is None
        assert await store.cancel(0)


async def test_statement_that_takes_too_long_is_ended(database_url: str) -> None:
    """A statement beyond the limit is ended, at the server too, and its connection is replaced."""
    mine = text("SELECT count(*) FROM pg_stat_activity WHERE query LIKE 'SELECT pg_sleep%'")
    async with connect(database_url, timeout=0.5) as connections:
        for transact in (connections.read, connections.write):
            began = time.monotonic()
            with pytest.raises(StoreUnavailable, match="job store has not answered for 0.5 s"):
                await transact(lambda c: c.execute(text("SELECT pg_sleep(9)")))
            assert time.monotonic() - began < 2
            await asyncio.sleep(0.5)
            assert await transact(lambda c: c.scalar(mine)) == 0


async def test_transaction_of_a_frozen_worker_is_ended(database_url: str) -> None:
    """The server ends a transaction whose worker has stopped in the middle, and frees its locks."""
    async with Database.open(database_url) as database:
        await JobStore(database, max_attempts=3).add([{}], max_queued=9)

    def freeze(connection: Connection) -> None:
        connection.execute(text("SELECT * FROM jobs FOR UPDATE"))
        time.sleep(4)

    async def worker() -> None:
        async with connect(database_url, timeout=0.5) as connections:
            await connections.write(freeze)

    frozen = asyncio.create_task(asyncio.to_thread(asyncio.run, worker()))
    await asyncio.sleep(0.2)
    began = time.monotonic()
    async with open_transaction(database_url, "SELECT * FROM jobs FOR UPDATE"):
        assert time.monotonic() - began < 3
    with pytest.raises(Exception, match=r"connection|answered"):
        await frozen


@pytest.mark.parametrize(
    ("wrong", "reason"), [({"username": "who"}, "who"), ({"database": "what"}, "what")]
)
def test_an_address_that_is_wrong_is_one_line(
    database_url: str, wrong: dict[str, str], reason: str
) -> None:
    """A user or a database that PostgreSQL does not know ends the start with a line."""
    url = make_url(database_url).set(**wrong).render_as_string(hide_password=False)
    ended = subprocess.run(
        [sys.executable, "-m", "uvicorn", "adapter.app:app", "--port", str(free_port())],
        env={"DLLM_DATABASE_URL": url},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.returncode == 3
    assert "Traceback" not in ended.stderr
    (line,) = [line for line in ended.stderr.splitlines() if "DLLM_DATABASE_URL" in line]
    assert "the adapter cannot start: DLLM_DATABASE_URL: " in line
    assert f'"{reason}" does not exist' in line


def tcp_user_timeouts(port: int | None) -> set[int]:
    """The kernel's time-outs of this process's connections to a port, in milliseconds."""
    found = set()
    for connection in psutil.Process().net_connections("tcp"):
        if connection.raddr and connection.raddr.port == port:
            with socket.socket(fileno=os.dup(connection.fd)) as tcp:
                found.add(tcp.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT))
    return found


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="the option is Linux's")
async def test_both_sides_give_up_a_connection_that_swallows(database_url: str) -> None:
    """Kernel and server have the transactions' limit as TCP user time-out of each connection."""
    async with Database.open(database_url, timeout=4) as database:
        (row,) = await database.read(select(func.current_setting("tcp_user_timeout").label("set")))
        assert row.set in ("4000", "4s")
        # A connection that is only being made has none yet.
        await until(lambda: tcp_user_timeouts(make_url(database_url).port) == {4000})
