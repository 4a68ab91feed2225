"""The connection to the SQL database, and the one place that tells SQLite from PostgreSQL."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Any, Protocol, Self, TypeVar

from sqlalchemy import Connection, Row, Select, StaticPool, create_engine, event, make_url, text
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from adapter.errors import StoreUnavailable
from adapter.metrics import timed
from adapter.schema import is_current, upgrade_schema

T = TypeVar("T")

LOCK_WAIT_SECONDS = 15.0
#: Pause after which a reader asks SQLite again that was locked.
LOCKED_PAUSE = 0.005
OPEN_ATTEMPTS = 100
SCHEMA_LOCK = 0x644C4C4D  # any number, as long as all workers use the same


class Database:
    """Reads and writes as transactions. Both raise `StoreUnavailable` when it does not answer.

    They have connections of their own: a poll does not wait behind writers that wait for a lock.
    """

    def __init__(self, reader: "Reader", writer: AsyncEngine) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    @asynccontextmanager
    async def open(cls, url: str) -> AsyncIterator[Self]:
        """Connect, and bring the schema up to date; any number of processes may do so at once.

        Raises `SettingsError` if a later release has changed it.
        """
        reader, writer = _reader(url), _writer(url)
        try:
            database = cls(reader, writer)
            await database._prepare()
            yield database
        finally:
            await reader.close()
            await writer.dispose()

    async def read(self, query: Select[Any]) -> Sequence[Row[Any]]:
        """The rows of one query, which is a transaction by itself."""
        with timed("read"), _mapped_errors():
            return await self._reader.run(lambda connection: connection.execute(query).all())

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
                with _mapped_errors():
                    if await self._reader.run(is_current):
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


class Reader(Protocol):
    """Connections for reading."""

    async def run(self, read: Callable[[Connection], T]) -> T:
        """Call it with a connection that begins no transaction, so that there is none to end."""
        ...

    async def close(self) -> None:
        """Let go of the connections."""
        ...


class SqliteReader:
    """Reads on the event loop's own thread.

    In WAL mode a reader waits for nobody, and what we read is found by an index, within some ten
    microseconds. Another thread would have to be woken, and to wake us, for each of the five calls
    that a query is made of, which takes many times as long even where no other process wants the
    processor.
    """

    def __init__(self, url: str) -> None:
        self._engine = create_engine(
            make_url(url).set(drivername="sqlite"),
            connect_args={"timeout": 0},
            poolclass=StaticPool,
            isolation_level="AUTOCOMMIT",
        )
        # At the pool: events of the engine itself would be joined to each connection's.
        event.listen(self._engine.pool, "connect", _prepare_sqlite_connection)

    async def run(self, read: Callable[[Connection], T]) -> T:
        """Read, and again while the file is locked, as it is for moments when it is opened."""
        now = asyncio.get_running_loop().time
        give_up = now() + LOCK_WAIT_SECONDS
        while True:
            try:
                with self._engine.connect() as connection:
                    return read(connection)
            except OperationalError as error:
                if "locked" not in str(error.orig) or now() > give_up:
                    raise
            await asyncio.sleep(LOCKED_PAUSE)

    async def close(self) -> None:
        """Close the connection."""
        self._engine.dispose()


class ServerReader:
    """Reads over connections of a pool."""

    def __init__(self, url: str) -> None:
        self._engine = create_async_engine(
            url, pool_pre_ping=True, isolation_level="AUTOCOMMIT", pool_reset_on_return=None
        )

    async def run(self, read: Callable[[Connection], T]) -> T:
        """Read over whichever connection is free."""
        async with self._engine.connect() as connection:
            return await connection.run_sync(read)

    async def close(self) -> None:
        """Close all connections."""
        await self._engine.dispose()


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


def _reader(url: str) -> Reader:
    return SqliteReader(url) if url.startswith("sqlite") else ServerReader(url)


def _writer(url: str) -> AsyncEngine:
    if not url.startswith("sqlite"):
        return create_async_engine(url, pool_pre_ping=True)
    # Writers of one process line up for one connection, in the order of their coming: SQLite lets
    # one write at a time, and has the others ask again after pauses that grow.
    engine = create_async_engine(
        url, connect_args={"timeout": LOCK_WAIT_SECONDS}, pool_size=1, max_overflow=0
    )
    event.listen(engine.sync_engine, "connect", _prepare_sqlite_connection)
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
