"""The connection to the SQL database, and the one place that tells SQLite from PostgreSQL."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any, Self

from sqlalchemy import Connection, event, text
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from adapter.errors import StoreUnavailable
from adapter.metrics import timed
from adapter.schema import is_current, upgrade_schema

LOCK_WAIT_SECONDS = 15.0
OPEN_ATTEMPTS = 100
SCHEMA_LOCK = 0x644C4C4D  # any number, as long as all workers use the same


class Database:
    """Reads and writes as transactions. Both raise `StoreUnavailable` when it does not answer.

    They have connections of their own: a poll does not wait behind writers that wait for a lock.
    A read is one statement, which is a transaction by itself.
    """

    def __init__(self, reader: AsyncEngine, writer: AsyncEngine) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    @asynccontextmanager
    async def open(cls, url: str) -> AsyncIterator[Self]:
        """Connect, and bring the schema up to date; any number of processes may do so at once.

        Raises `SettingsError` if a later release has changed it.
        """
        reader, writer = _create_engine(url), _create_engine(url, writes=True)
        try:
            database = cls(reader, writer)
            await database._prepare()
            yield database
        finally:
            await reader.dispose()
            await writer.dispose()

    @asynccontextmanager
    async def read(self) -> AsyncIterator[AsyncConnection]:
        """A connection for one statement that reads."""
        with timed("read"), _mapped_errors():
            async with self._reader.connect() as connection:
                yield connection

    @asynccontextmanager
    async def write(self) -> AsyncIterator[AsyncConnection]:
        """A transaction that writes, committed on leaving; on SQLite the only one of its time."""
        with timed("write"), _mapped_errors():
            async with self._writer.begin() as connection:
                yield connection

    async def _prepare(self) -> None:
        """Upgrade the schema under a lock, if there is need.

        SQLite does not wait for the lock that turns WAL on.
        """
        for attempt in range(1, OPEN_ATTEMPTS + 1):
            try:
                async with self.read() as connection:
                    if await connection.run_sync(is_current):
                        return
                async with self.write() as connection:
                    if self._writer.dialect.name == "postgresql":
                        await connection.execute(
                            text(f"SELECT pg_advisory_xact_lock({SCHEMA_LOCK})")
                        )
                    await connection.run_sync(upgrade_schema)
                return
            except StoreUnavailable as error:
                if attempt == OPEN_ATTEMPTS or "locked" not in str(error):
                    raise
                await asyncio.sleep(0.1)


@contextmanager
def _mapped_errors() -> Iterator[None]:
    try:
        yield
    except (OperationalError, InterfaceError) as error:
        msg = f"the job store does not answer: {error.orig}"
        raise StoreUnavailable(msg) from error
    except DBAPIError as error:
        if not error.connection_invalidated:
            raise
        msg = f"the job store has gone away: {error.orig}"
        raise StoreUnavailable(msg) from error
    except (PoolTimeoutError, OSError) as error:
        msg = f"the job store cannot be reached: {error}"
        raise StoreUnavailable(msg) from error


def _create_engine(url: str, *, writes: bool = False) -> AsyncEngine:
    # Readers begin no transactions, and so have none to end: each would be a trip to the database.
    options: dict[str, Any] = (
        {} if writes else {"isolation_level": "AUTOCOMMIT", "pool_reset_on_return": None}
    )
    if not url.startswith("sqlite"):
        return create_async_engine(url, pool_pre_ping=True, **options)
    # Writers of one process line up for one connection, in the order of their coming: SQLite lets
    # one write at a time, and has the others ask again after pauses that grow.
    if writes:
        options |= {"pool_size": 1, "max_overflow": 0}
    engine = create_async_engine(url, connect_args={"timeout": LOCK_WAIT_SECONDS}, **options)
    event.listen(engine.sync_engine, "connect", _prepare_sqlite_connection)
    if writes:
        event.listen(engine.sync_engine, "begin", _begin_writing)
    return engine


def _prepare_sqlite_connection(connection: Any, _record: object) -> None:
    # sqlite3 would begin transactions where it sees fit, always deferred; we begin our own.
    connection.isolation_level = None
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode=WAL")
    # In WAL mode a crash of this process loses nothing; a power cut may lose the last moment.
    cursor.execute("PRAGMA synchronous=NORMAL")
    cursor.close()


def _begin_writing(connection: Connection) -> None:
    connection.exec_driver_sql("BEGIN IMMEDIATE")
