"""SQLite, read and written on the event loop's own thread."""

import asyncio
import random
import sqlite3
from collections.abc import Callable
from typing import Any, TypeVar

from sqlalchemy import (
    URL,
    Connection,
    Engine,
    StaticPool,
    create_engine,
    event,
    literal,
    make_url,
    select,
)
from sqlalchemy.exc import OperationalError

T = TypeVar("T")

#: The longest pause before a transaction that found the file locked tries again.
LOCKED_PAUSE = 0.005
#: After a checkpoint the write-ahead log shrinks to this size.
LOG_LIMIT_BYTES = 4 * 2**20


class SqliteBackend:
    """A file, read and written on the event loop's own thread.

    In WAL mode a reader waits for no writer, and a writing transaction takes some hundred
    microseconds; one in a thousand pages also waits for the disk, as SQLite moves its log to the
    file. A thread for the transactions would cost more: it has to be woken, has to wake the loop,
    and contends with it for the interpreter lock at every statement.
    """

    def __init__(self, url: str, *, timeout: float) -> None:
        self._timeout = timeout
        file = make_url(url).set(drivername="sqlite")
        self._reader = _PersistentConnection(_make_engine(file))
        self._writer = _PersistentConnection(_make_engine(file))

    async def read(self, query: Callable[[Connection], T]) -> T:
        """Read; try again while the file is locked, which it is for moments when it is opened."""
        return await self._retry_locked(lambda: query(self._reader.connection), self._timeout)

    async def write(self, change: Callable[[Connection], T], *, timeout: float | None = None) -> T:
        """Write; try again while another process writes."""
        return await self._retry_locked(
            lambda: self._writer.write(change), timeout or self._timeout
        )

    async def migrate(self, change: Callable[[Connection], T]) -> T:
        """Write."""
        return await self.write(change)

    async def ping(self) -> None:
        """Read nothing."""
        await self.read(lambda connection: connection.execute(select(literal(1))).all())

    async def _retry_locked(self, work: Callable[[], T], timeout: float) -> T:
        give_up = None
        while True:
            try:
                return work()
            except (OperationalError, sqlite3.OperationalError) as error:
                now = asyncio.get_running_loop().time()
                give_up = now + timeout if give_up is None else give_up
                if "locked" not in str(getattr(error, "orig", error)) or now > give_up:
                    raise
            # At random, so that waiting processes do not collide again.
            await asyncio.sleep(LOCKED_PAUSE * random.uniform(0.2, 1.0))

    def close(self) -> None:
        """Close all connections."""
        self._reader.close()
        self._writer.close()


class _PersistentConnection:
    """A connection that stays open: checking one out takes longer than a statement on it.

    SQLAlchemy sees one transaction for the connection's whole life; `write` begins and ends
    SQLite's own transactions.
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
        """Call `change` in a transaction. Raises its errors, and those of `sqlite3`."""
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
        """Close the connection."""
        if self._connection is not None:
            self._connection.close()
        self._engine.dispose()


def _make_engine(file: URL) -> Engine:
    """An engine of one connection, which never blocks on a lock."""
    engine = create_engine(
        file,
        connect_args={"timeout": 0.0},
        poolclass=StaticPool,
        hide_parameters=True,  # keeps prompts out of logged errors
    )
    # On the pool: a listener on the engine itself would also run for each checkout.
    event.listen(engine.pool, "connect", _prepare_connection)
    return engine


def _prepare_connection(connection: Any, _record: object) -> None:
    # sqlite3 would begin deferred transactions on its own; `write` begins them itself.
    connection.isolation_level = None
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode=WAL")
    # In WAL mode a crash of this process loses nothing; a power cut may lose the last moment.
    cursor.execute("PRAGMA synchronous=NORMAL")
    cursor.execute(f"PRAGMA journal_size_limit={LOG_LIMIT_BYTES}")
    cursor.close()
