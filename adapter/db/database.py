"""The connection to the SQL database: SQLite in a file, or PostgreSQL."""

import asyncio
import sqlite3
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Any, Protocol, Self, TypeVar

from sqlalchemy import Connection, Row, Select, UpdateBase, literal, select, text
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import create_async_engine

from adapter.db.migrate import is_current, upgrade_schema
from adapter.db.sqlite import SqliteBackend
from adapter.errors import StoreUnavailable
from adapter.telemetry.metrics import observe_transaction

T = TypeVar("T")
Values = Mapping[str, Any]

OPEN_ATTEMPTS = 100
#: Classes of SQLSTATE that do not blame the statement: connection lost, transaction to be repeated,
#: resources such as connections used up, server starting or stopping.
TRANSIENT_SQLSTATES = ("08", "40", "53", "57")
#: Of each pool. Writers mostly wait for one row, however many they are, and by default PostgreSQL
#: has 100 connections for all workers together.
POOL_SIZE = 4
SCHEMA_LOCK = 0x644C4C4D  # any number, as long as all workers use the same


class Database:
    """Reads and writes as transactions. Both raise `StoreUnavailable` when it does not answer."""

    def __init__(self, backend: "Backend") -> None:
        self._backend = backend

    @classmethod
    @asynccontextmanager
    async def open(cls, url: str) -> AsyncIterator[Self]:
        """Connect, and bring the schema up to date; any number of processes may do so at once.

        Raises `SettingsError` if a later release has changed the schema.
        """
        async with connect(url) as backend:
            database = cls(backend)
            await database._prepare()
            yield database

    async def read(self, query: Select[Any], values: Values | None = None) -> Sequence[Row[Any]]:
        """The rows of one query, which is a transaction by itself."""
        with _transaction("read"):
            return await self._backend.read(
                lambda connection: connection.execute(query, values).all()
            )

    async def ping(self) -> None:
        """Read nothing, to see whether the database answers. Raises `StoreUnavailable`."""
        await self.read(select(literal(1)))

    async def write(self, change: Callable[[Connection], T]) -> T:
        """Call `change` in a writing transaction; SQLite runs one at a time.

        `change` may be called again if the database was busy; the first call then changed nothing.
        """
        with _transaction("write"):
            return await self._backend.write(change)

    async def change(self, statement: UpdateBase, values: Values | None = None) -> int:
        """Execute one writing statement; the number of rows it concerned."""
        return await self.write(lambda connection: connection.execute(statement, values).rowcount)

    async def _prepare(self) -> None:
        """Upgrade the schema under a lock, if it needs to be.

        SQLite does not wait for the lock that turns WAL on.
        """
        for attempt in range(1, OPEN_ATTEMPTS + 1):
            try:
                with _transaction("write"):
                    if not await self._backend.read(is_current):
                        await self._backend.write(_upgrade)
                return
            except StoreUnavailable as error:
                if attempt == OPEN_ATTEMPTS or "locked" not in str(error):
                    raise
                await asyncio.sleep(0.1)


class Backend(Protocol):
    """Runs transactions on one kind of database."""

    async def read(self, query: Callable[[Connection], T]) -> T:
        """Call `query` with a connection that begins no transaction, so none has to end."""
        ...

    async def write(self, change: Callable[[Connection], T]) -> T:
        """Call `change` in a transaction; commit it, or roll it back if `change` raises."""
        ...


class PostgresBackend:
    """A PostgreSQL server, reached over two pools of connections.

    Readers have their own pool: a poll does not wait behind writers that wait for a lock.
    """

    def __init__(self, url: str) -> None:
        pool: dict[str, Any] = {
            "pool_pre_ping": True,
            "pool_size": POOL_SIZE,
            "max_overflow": 0,
            "hide_parameters": True,  # keeps prompts out of logged errors
        }
        self._reader = create_async_engine(
            url, isolation_level="AUTOCOMMIT", pool_reset_on_return=None, **pool
        )
        self._writer = create_async_engine(url, **pool)

    async def read(self, query: Callable[[Connection], T]) -> T:
        """Read over any free connection."""
        async with self._reader.connect() as connection:
            return await connection.run_sync(query)

    async def write(self, change: Callable[[Connection], T]) -> T:
        """Write over any free connection."""
        async with self._writer.begin() as connection:
            return await connection.run_sync(change)

    async def close(self) -> None:
        """Close all connections."""
        await self._reader.dispose()
        await self._writer.dispose()


@contextmanager
def _transaction(kind: str) -> Iterator[None]:
    """Time a transaction, and raise `StoreUnavailable` for errors that will pass."""
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
        # SQLAlchemy does not wrap every error that a driver raises while it connects.
        cause = error.orig if isinstance(error, DBAPIError) else error
        invalidated = isinstance(error, DBAPIError) and error.connection_invalidated
        sqlstate = getattr(cause, "sqlstate", None) or ""
        if not invalidated and not sqlstate.startswith(TRANSIENT_SQLSTATES):
            raise
        msg = f"the job store has gone away: {cause}"
        raise StoreUnavailable(msg) from error
    finally:
        observe_transaction(kind, time.perf_counter() - began)


@asynccontextmanager
async def connect(url: str) -> AsyncIterator[Backend]:
    """Open the backend that the address names."""
    if url.startswith("sqlite"):
        file = SqliteBackend(url)
        try:
            yield file
        finally:
            file.close()
    else:
        server = PostgresBackend(url)
        try:
            yield server
        finally:
            await server.close()


def _upgrade(connection: Connection) -> None:
    if connection.dialect.name == "postgresql":
        connection.execute(text(f"SELECT pg_advisory_xact_lock({SCHEMA_LOCK})"))
    upgrade_schema(connection)
