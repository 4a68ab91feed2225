"""SQLite: transactions on the event loop's own thread, checkpoints on another."""

import asyncio
import math
import os
import random
import sqlite3
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

from sqlalchemy import URL, Connection, Engine, StaticPool, create_engine, event, make_url
from sqlalchemy.exc import OperationalError

T = TypeVar("T")

LOCK_WAIT_SECONDS = 15.0
#: The longest pause before a transaction that found the file locked tries again.
LOCKED_PAUSE = 0.005
SYNC_SECONDS = 1.0
#: How often to check the size of the write-ahead log.
LOOK_SECONDS = 0.1
#: Above this size the log is truncated, which keeps writers waiting.
LOG_LIMIT_BYTES = 4 * 2**20
#: How long a truncation may wait for readers and writers. Writers wait while it waits for a reader,
#: so it gives up on a reader that stays, such as a backup, and tries less and less often.
TRUNCATE_SECONDS = 0.1
LONGEST_PAUSE = 5.0


class SqliteBackend:
    """A file, read and written on the event loop's own thread.

    In WAL mode a reader waits for no writer, a writing transaction takes some hundred microseconds,
    and neither waits for the disk: a thread moves the log to the file now and then. A thread for
    the transactions would cost more: it has to be woken, has to wake the loop, and contends with it
    for the interpreter lock at every statement.

    SQLite restarts the log only if a write finds all of it in the file, which never happens under
    sustained writes. Once the log is large, the thread therefore locks writers out while it moves
    the rest. Event loops go on meanwhile, and readers do not wait.
    """

    def __init__(self, url: str) -> None:
        file = make_url(url).set(drivername="sqlite")
        self._log = f"{file.database}-wal"
        self._reader = _PersistentConnection(_make_engine(file))
        self._writer = _PersistentConnection(_make_engine(file))
        self._syncing = _make_engine(file, lock_wait=TRUNCATE_SECONDS, isolation_level="AUTOCOMMIT")
        self._written = False
        self._synced_at = -math.inf
        self._pause = 0.0
        self._not_before = -math.inf

    async def read(self, query: Callable[[Connection], T]) -> T:
        """Read; try again while the file is locked, which it is for moments when it is opened."""
        return await self._retry_locked(lambda: query(self._reader.connection))

    async def write(self, change: Callable[[Connection], T]) -> T:
        """Write; try again while another process writes."""
        self._written = True
        return await self._retry_locked(lambda: self._writer.write(change))

    async def _retry_locked(self, work: Callable[[], T]) -> T:
        give_up = None
        while True:
            try:
                return work()
            except (OperationalError, sqlite3.OperationalError) as error:
                now = asyncio.get_running_loop().time()
                give_up = now + LOCK_WAIT_SECONDS if give_up is None else give_up
                if "locked" not in str(getattr(error, "orig", error)) or now > give_up:
                    raise
            # At random, so that waiting processes do not collide again.
            await asyncio.sleep(LOCKED_PAUSE * random.uniform(0.2, 1.0))

    async def sync(self) -> float:
        """Move the log to the file and to the disk if it is time; seconds until the next look."""
        now = time.monotonic()
        truncate = self._log_is_large() and now >= self._not_before
        if self._written and (truncate or now >= self._synced_at + SYNC_SECONDS):
            self._written, self._synced_at = False, now
            await asyncio.to_thread(self._checkpoint, truncate=truncate)
        return LOOK_SECONDS

    def _checkpoint(self, *, truncate: bool) -> None:
        with self._syncing.connect() as connection:
            # Most of it while others write, so that they wait for little.
            busy, in_log, in_file = _checkpoint(connection, "PASSIVE")
            if truncate and not busy:
                busy, in_log, in_file = _checkpoint(connection, "TRUNCATE")
                longer = min(max(LOOK_SECONDS, 2 * self._pause), LONGEST_PAUSE)
                self._pause = longer if busy else 0.0
                self._not_before = time.monotonic() + self._pause
            if in_log == in_file and not busy:
                # The first write to a restarted log waits for the disk; make it here.
                with suppress(OperationalError):
                    connection.exec_driver_sql("PRAGMA user_version = 0")

    def _log_is_large(self) -> bool:
        try:
            return os.stat(self._log).st_size > LOG_LIMIT_BYTES
        except FileNotFoundError:
            return False

    def close(self) -> None:
        """Close all connections."""
        self._reader.close()
        self._writer.close()
        self._syncing.dispose()


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


def _make_engine(file: URL, *, lock_wait: float = 0.0, **options: Any) -> Engine:
    """An engine of one connection, usable from any thread; blocks up to `lock_wait` s on a lock."""
    engine = create_engine(
        file,
        connect_args={"timeout": lock_wait, "check_same_thread": False},
        poolclass=StaticPool,
        hide_parameters=True,  # keeps prompts out of logged errors
        **options,
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
    # Otherwise the writer of every thousandth page waits until all are on the disk.
    cursor.execute("PRAGMA wal_autocheckpoint=0")
    cursor.close()


def _checkpoint(connection: Connection, mode: str) -> tuple[bool, int, int]:
    """Run a checkpoint: was it blocked, pages in the log, and how many of them are in the file."""
    row = connection.exec_driver_sql(f"PRAGMA wal_checkpoint({mode})").one()
    return bool(row[0]), row[1], row[2]
