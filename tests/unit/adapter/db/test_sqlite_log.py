"""SQLite's write-ahead log stays small."""

import asyncio
import sqlite3
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, closing
from pathlib import Path

import pytest
from sqlalchemy import text

from adapter.db.database import Database
from adapter.db.sqlite import LOG_LIMIT_BYTES

MIB = 2**20
BOUND = 24 * MIB

REPLACE = text("INSERT OR REPLACE INTO counters VALUES (:name, 1)")


class Workers:
    """Two workers that write to one file in turns, without a pause."""

    def __init__(self, file: Path, databases: list[Database]) -> None:
        self.file = file
        self.databases = databases
        self.largest = 0
        self.written = 0

    @property
    def log_bytes(self) -> int:
        return self.file.with_name(f"{self.file.name}-wal").stat().st_size

    async def write(self, rows: int) -> None:
        """Write rows at each worker; a row takes at least a page of the log."""
        for row in range(rows):
            for number, database in enumerate(self.databases):
                values = {"name": f"{number} {row % 100}"}
                await database.write(
                    lambda connection: connection.execute(REPLACE, values)  # noqa: B023
                )
                self.written += 4096
                self.largest = max(self.largest, self.log_bytes)
                await asyncio.sleep(0)


@pytest.fixture
async def workers(tmp_path: Path) -> AsyncIterator[Workers]:
    """Two workers that have opened the file."""
    file = tmp_path / "jobs.db"
    async with AsyncExitStack() as stack:
        opening = [Database.open(f"sqlite:///{file}") for _ in range(2)]
        yield Workers(file, [await stack.enter_async_context(one) for one in opening])


async def test_log_is_bounded_while_writes_go_on(workers: Workers) -> None:
    """The log stays bounded under sustained writes."""
    while workers.written < 3 * BOUND:
        await workers.write(100)

    assert workers.largest < BOUND


async def test_long_reader_does_not_block_writes(workers: Workers) -> None:
    """Writes go on while a backup reads; the log grows, and shrinks when the backup ends."""
    with closing(sqlite3.connect(workers.file)) as backup:
        backup.execute("BEGIN")
        backup.execute("SELECT count(*) FROM counters").fetchone()
        while workers.log_bytes < 2 * LOG_LIMIT_BYTES:
            await workers.write(100)

    async with asyncio.timeout(30):
        while workers.log_bytes > LOG_LIMIT_BYTES:
            await workers.write(10)
