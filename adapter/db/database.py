"""The connection to the SQL database, and the one place that tells SQLite from PostgreSQL."""

import asyncio
import math
import os
import random
import sqlite3
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Any, Protocol, Self, TypeVar

from sqlalchemy import (
    URL,
    Connection,
    Engine,
    Row,
    Select,
    StaticPool,
    UpdateBase,
    create_engine,
    event,
    make_url,
    text,
)
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import create_async_engine

from adapter.db.migrate import is_current, upgrade_schema
from adapter.errors import StoreUnavailable
from adapter.periodic import Loop
from adapter.telemetry.metrics import took

T = TypeVar("T")
Values = Mapping[str, Any]

LOCK_WAIT_SECONDS = 15.0
#: The longest pause after which a SQLite that was locked is asked again.
LOCKED_PAUSE = 0.005
SYNC_SECONDS = 1.0
#: How often to look whether the log of a SQLite is too large.
LOOK_SECONDS = 0.1
#: From this size on the log is emptied, for which those who write wait.
LOG_LIMIT_BYTES = 4 * 2**20
#: How long emptying it may wait for those who read and write. Nobody writes while it waits for who
#: reads, so that it must give up on a reader that stays, such as a backup, and try less and less.
EMPTYING_SECONDS = 0.1
LONGEST_PAUSE = 5.0
OPEN_ATTEMPTS = 100
#: Classes of SQLSTATE that say nothing against a statement: the connection is gone, a transaction
#: must be repeated, something is used up, such as connections, the server starts or stops.
PASSING = ("08", "40", "53", "57")
#: Of each pool. Those who write mostly wait for one row, however many they are, and PostgreSQL has
#: 100 connections for all workers together unless told otherwise.
POOL_SIZE = 4
SCHEMA_LOCK = 0x644C4C4D  # any number, as long as all workers use the same


class Database:
    """Reads and writes as transactions. Both raise `StoreUnavailable` when it does not answer."""

    def __init__(self, connections: "Connections") -> None:
        self._connections = connections

    @classmethod
    @asynccontextmanager
    async def open(cls, url: str) -> AsyncIterator[Self]:
        """Connect, and bring the schema up to date; any number of processes may do so at once.

        Raises `SettingsError` if a later release has changed it.
        """
        async with connect(url) as connections:
            database = cls(connections)
            await database._prepare()
            yield database

    async def read(self, query: Select[Any], values: Values | None = None) -> Sequence[Row[Any]]:
        """The rows of one query, which is a transaction by itself."""
        with _transaction("read"):
            return await self._connections.read(
                lambda connection: connection.execute(query, values).all()
            )

    async def write(self, change: Callable[[Connection], T]) -> T:
        """Call it in a transaction that writes; on SQLite the only one of its time.

        It may be called again when the database was busy, the first time then changed nothing.
        """
        with _transaction("write"):
            return await self._connections.write(change)

    async def change(self, statement: UpdateBase, values: Values | None = None) -> int:
        """Execute one statement that writes; how many rows that concerned."""
        return await self.write(lambda connection: connection.execute(statement, values).rowcount)

    async def _prepare(self) -> None:
        """Upgrade the schema under a lock, if there is need.

        SQLite does not wait for the lock that turns WAL on.
        """
        for attempt in range(1, OPEN_ATTEMPTS + 1):
            try:
                with _transaction("write"):
                    if not await self._connections.read(is_current):
                        await self._connections.write(_upgrade)
                return
            except StoreUnavailable as error:
                if attempt == OPEN_ATTEMPTS or "locked" not in str(error):
                    raise
                await asyncio.sleep(0.1)


class Connections(Protocol):
    """How to reach one kind of database."""

    async def read(self, query: Callable[[Connection], T]) -> T:
        """Call it with a connection that begins no transaction, so that there is none to end."""
        ...

    async def write(self, change: Callable[[Connection], T]) -> T:
        """Call it in a transaction that is committed afterwards, or rolled back if it raises."""
        ...


class SqliteFile:
    """A file, read and written on the event loop's own thread.

    In WAL mode a reader waits for nobody, a transaction that writes takes some hundred
    microseconds, and none waits for the disk, which another thread writes to now and then. A thread
    for the transactions would have to be woken, to wake us, and to contend with us for Python's
    lock at each of their statements, which takes many times as long even on an idle machine.

    The log begins anew only when all of it is in the file at the moment of a write, which never
    comes to pass while there is one write after the other. Once it is large that thread therefore
    locks writers out while it moves the last of it. Their event loops go on meanwhile, and readers
    need not wait.
    """

    def __init__(self, url: str) -> None:
        file = make_url(url).set(drivername="sqlite")
        self._log = f"{file.database}-wal"
        self._reader = _Kept(_sqlite_engine(file))
        self._writer = _Kept(_sqlite_engine(file))
        self._syncing = _sqlite_engine(
            file, lock_wait=EMPTYING_SECONDS, isolation_level="AUTOCOMMIT"
        )
        self._written = False
        self._synced_at = -math.inf
        self._pause = 0.0
        self._not_before = -math.inf

    async def read(self, query: Callable[[Connection], T]) -> T:
        """Read, and again while the file is locked, as it is for moments when it is opened."""
        return await self._unlocked(lambda: query(self._reader.connection))

    async def write(self, change: Callable[[Connection], T]) -> T:
        """Write, and again while another process does."""
        self._written = True
        return await self._unlocked(lambda: self._writer.write(change))

    async def _unlocked(self, work: Callable[[], T]) -> T:
        give_up = None
        while True:
            try:
                return work()
            except (OperationalError, sqlite3.OperationalError) as error:
                now = asyncio.get_running_loop().time()
                give_up = now + LOCK_WAIT_SECONDS if give_up is None else give_up
                if "locked" not in str(getattr(error, "orig", error)) or now > give_up:
                    raise
            # Not all who wait at the same moments.
            await asyncio.sleep(LOCKED_PAUSE * random.uniform(0.2, 1.0))

    async def sync(self) -> float:
        """Move what was written from the log to the file, and to the disk; when to look again."""
        now = time.monotonic()
        empty = self._log_is_large() and now >= self._not_before
        if self._written and (empty or now >= self._synced_at + SYNC_SECONDS):
            self._written, self._synced_at = False, now
            await asyncio.to_thread(self._checkpoint, empty=empty)
        return LOOK_SECONDS

    def _checkpoint(self, *, empty: bool) -> None:
        with self._syncing.connect() as connection:
            # Most of it while others write, so that they wait for little.
            busy, in_log, in_file = _checkpoint(connection, "PASSIVE")
            if empty and not busy:
                busy, in_log, in_file = _checkpoint(connection, "TRUNCATE")
                longer = min(max(LOOK_SECONDS, 2 * self._pause), LONGEST_PAUSE)
                self._pause = longer if busy else 0.0
                self._not_before = time.monotonic() + self._pause
            if in_log == in_file and not busy:
                # The first write to a log that begins anew waits for the disk; this is one.
                with suppress(OperationalError):
                    connection.exec_driver_sql("PRAGMA user_version = 0")

    def _log_is_large(self) -> bool:
        try:
            return os.stat(self._log).st_size > LOG_LIMIT_BYTES
        except FileNotFoundError:
            return False

    def close(self) -> None:
        """Let go of the file."""
        self._reader.close()
        self._writer.close()
        self._syncing.dispose()


class _Kept:
    """A connection that stays open: lending it anew takes longer than what is done with it.

    To SQLAlchemy it is in one transaction for all its life; SQLite's own begin and end here.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._connection: Connection | None = None

    @property
    def connection(self) -> Connection:
        """The connection, opened at first use."""
        if self._connection is None:
            self._connection = self._engine.connect()
            self._connection.begin()
        return self._connection

    def write(self, change: Callable[[Connection], T]) -> T:
        """Call it in a transaction. Raises what it raises, and errors of `sqlite3`."""
        connection = self.connection
        driver: sqlite3.Connection = connection.connection.dbapi_connection  # type: ignore[assignment]
        driver.execute("BEGIN IMMEDIATE")
        try:
            result = change(connection)
            driver.commit()
        except BaseException:
            driver.rollback()
            raise
        return result

    def close(self) -> None:
        """Let go of the file."""
        if self._connection is not None:
            self._connection.close()
        self._engine.dispose()


class Server:
    """A server, reached over pools of connections.

    Readers have their own: a poll does not wait behind writers that wait for a lock.
    """

    def __init__(self, url: str) -> None:
        pool: dict[str, Any] = {
            "pool_pre_ping": True,
            "pool_size": POOL_SIZE,
            "max_overflow": 0,
            "hide_parameters": True,  # prompts, in errors that are logged
        }
        self._reader = create_async_engine(
            url, isolation_level="AUTOCOMMIT", pool_reset_on_return=None, **pool
        )
        self._writer = create_async_engine(url, **pool)

    async def read(self, query: Callable[[Connection], T]) -> T:
        """Read over whichever connection is free."""
        async with self._reader.connect() as connection:
            return await connection.run_sync(query)

    async def write(self, change: Callable[[Connection], T]) -> T:
        """Write over whichever connection is free."""
        async with self._writer.begin() as connection:
            return await connection.run_sync(change)

    async def close(self) -> None:
        """Close all connections."""
        await self._reader.dispose()
        await self._writer.dispose()


@contextmanager
def _transaction(kind: str) -> Iterator[None]:
    """Its time is taken, and its errors are ours."""
    began = time.perf_counter()
    try:
        yield
    except (OperationalError, InterfaceError) as error:
        msg = f"the job store does not answer: {error.orig}"
        raise StoreUnavailable(msg) from error
    except sqlite3.Error as error:
        msg = f"the job store does not answer: {error}"
        raise StoreUnavailable(msg) from error
    except (PoolTimeoutError, OSError) as error:
        msg = f"the job store cannot be reached: {error}"
        raise StoreUnavailable(msg) from error
    except Exception as error:
        # Not all that a driver raises while it connects is made SQLAlchemy's.
        cause = error.orig if isinstance(error, DBAPIError) else error
        gone = isinstance(error, DBAPIError) and error.connection_invalidated
        sqlstate = getattr(cause, "sqlstate", None) or ""
        if not gone and not sqlstate.startswith(PASSING):
            raise
        msg = f"the job store has gone away: {cause}"
        raise StoreUnavailable(msg) from error
    finally:
        took(kind, time.perf_counter() - began)


@asynccontextmanager
async def connect(url: str) -> AsyncIterator[Connections]:
    """The connections to a database, whose kind stands in its address."""
    if url.startswith("sqlite"):
        file = SqliteFile(url)
        try:
            async with Loop("sqlite-sync", file.sync):
                yield file
        finally:
            file.close()
    else:
        server = Server(url)
        try:
            yield server
        finally:
            await server.close()


def _upgrade(connection: Connection) -> None:
    if connection.dialect.name == "postgresql":
        connection.execute(text(f"SELECT pg_advisory_xact_lock({SCHEMA_LOCK})"))
    upgrade_schema(connection)


def _sqlite_engine(file: URL, *, lock_wait: float = 0.0, **options: Any) -> Engine:
    """One connection, for whichever thread; it holds its thread up for a lock so long at most."""
    engine = create_engine(
        file,
        connect_args={"timeout": lock_wait, "check_same_thread": False},
        poolclass=StaticPool,
        hide_parameters=True,  # prompts, in errors that are logged
        **options,
    )
    # At the pool: events of the engine itself would be joined to each connection's.
    event.listen(engine.pool, "connect", _prepare_sqlite_connection)
    return engine


def _prepare_sqlite_connection(connection: Any, _record: object) -> None:
    # sqlite3 would begin transactions where it sees fit, always deferred; we begin our own.
    connection.isolation_level = None
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode=WAL")
    # In WAL mode a crash of this process loses nothing; a power cut may lose the last moment.
    cursor.execute("PRAGMA synchronous=NORMAL")
    # Otherwise whoever writes the thousandth page waits until all are on the disk.
    cursor.execute("PRAGMA wal_autocheckpoint=0")
    cursor.close()


def _checkpoint(connection: Connection, mode: str) -> tuple[bool, int, int]:
    """Whether somebody was in the way; pages in the log, and how many of them are in the file."""
    row = connection.exec_driver_sql(f"PRAGMA wal_checkpoint({mode})").one()
    return bool(row[0]), row[1], row[2]
