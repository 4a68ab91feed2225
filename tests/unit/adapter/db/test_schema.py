"""The schema: upgraded at start from every earlier release, by many workers at once."""

import asyncio
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from sqlalchemy import Connection, make_url, select, text

from adapter.db.database import Database, connect, migrate
from adapter.db.migrate import MIGRATIONS, is_current
from adapter.db.sqlite import LOG_LIMIT_BYTES
from adapter.db.tables import metadata
from adapter.errors import SettingsError
from adapter.jobs.idempotency import IdempotencyRecord
from adapter.jobs.job import Job, JobOptions, JobState
from adapter.jobs.store import JobStore
from adapter.types import Event

DATABASES = ("sqlite", "postgresql")

#: The tables before they were versioned, with a job in each state.
UNVERSIONED = [
    """CREATE TABLE jobs (
        id {id} NOT NULL PRIMARY KEY, state VARCHAR(16) NOT NULL, request TEXT NOT NULL, text TEXT,
        error TEXT, finish_reason VARCHAR(16), prompt_tokens INTEGER, completion_tokens INTEGER,
        steps INTEGER, forward_passes INTEGER, seed BIGINT, attempts INTEGER NOT NULL,
        owner VARCHAR(160), lease_expires {double}, created_at {double} NOT NULL,
        started_at {double}, finished_at {double})""",
    "CREATE INDEX ix_jobs_state ON jobs (state, id)",
    "CREATE INDEX ix_jobs_finished_at ON jobs (finished_at)",
    """CREATE TABLE counters (
        name VARCHAR(16) NOT NULL PRIMARY KEY, next_id BIGINT NOT NULL)""",
    """CREATE TABLE engine_heal (
        engine VARCHAR(255) NOT NULL PRIMARY KEY, epoch INTEGER NOT NULL, healer VARCHAR(160),
        lease_expires {double}, last_life {double} NOT NULL)""",
    "INSERT INTO counters VALUES ('jobs', 3)",
    """INSERT INTO jobs (id, state, request, attempts, created_at, text, finished_at)
        VALUES (0, 'finished', '{{}}', 1, 1.0, 'kept', 3.0)""",
    """INSERT INTO jobs (id, state, request, attempts, created_at, owner, lease_expires)
        VALUES (1, 'running', '{{"seed": 7}}', 1, 1.0, 'a dead worker', 2.0)""",
    """INSERT INTO jobs (id, state, request, attempts, created_at)
        VALUES (2, 'queued', '{{}}', 0, 1.0)""",
]


async def make_unversioned(url: str) -> None:
    def make(connection: Connection) -> None:
        postgresql = connection.dialect.name == "postgresql"
        double = "DOUBLE PRECISION" if postgresql else "DOUBLE"
        kinds = {"id": "BIGINT" if postgresql else "INTEGER", "double": double}
        for statement in UNVERSIONED:
            connection.execute(text(statement.format(**kinds).replace(": ", "\\: ")))

    async with connect(url) as connections:
        await connections.write(make)


def differences(connection: Connection) -> list[object]:
    return list(compare_metadata(MigrationContext.configure(connection), metadata))


async def test_migrations_make_the_tables(database: Database) -> None:
    """All migrations together make exactly the tables of `tables.py`."""
    assert await database.write(differences) == []


async def test_unversioned_database_is_upgraded(database_url: str) -> None:
    """Upgrading an unversioned database keeps its jobs and continues its ids."""
    await make_unversioned(database_url)
    async with Database.open(database_url) as database:
        assert await database.write(differences) == []
        store = JobStore(database, max_attempts=3)
        assert await store.get(0) == Job(0, JobState.FINISHED, 1, "kept", None)
        assert await store.requeue_expired() == 1
        claimed = await store.claim("a", limit=9, lease=30)
        assert [(job.id, job.inputs, job.attempts) for job in claimed] == [
            (1, {"seed": 7}, 0),
            (2, {}, 0),
        ]
        assert await store.finish(claimed[0], Event("new", "stop"))
        assert await store.add([{}], max_queued=9) == [3]


async def test_submissions_of_an_earlier_release_stay_known(database_url: str) -> None:
    """A submission that is repeated after an upgrade still gets its first ids."""
    record = IdempotencyRecord.of("k", [{}, {}], JobOptions())
    values = {"fingerprint": record.fingerprint, "now": time.time()}

    def make(connection: Connection) -> None:
        config = Config()
        config.set_main_option("script_location", str(MIGRATIONS))
        config.attributes["connection"] = connection
        command.upgrade(config, "0005")
        row = "INSERT INTO submissions VALUES ('', 'k', :fingerprint, 5, 2, :now)"
        connection.execute(text(row), values)

    async with connect(database_url) as connections:
        await connections.write(make)
    async with Database.open(database_url) as database:
        store = JobStore(database, max_attempts=3)
        assert await store.add_once([{}, {}], key="k", max_queued=9) == ([5, 6], False)


async def test_many_workers_upgrade_at_once(database_url: str) -> None:
    """If many workers start at once, one upgrades and the others wait for it."""
    await make_unversioned(database_url)

    async def start() -> Job | None:
        async with Database.open(database_url) as database:
            return await JobStore(database, max_attempts=3).get(0)

    kept = Job(0, JobState.FINISHED, 1, "kept", None)
    assert await asyncio.gather(*(start() for _ in range(6))) == [kept] * 6


async def test_database_of_a_later_release_is_refused(database_url: str) -> None:
    """The adapter does not start on a schema of a later release, and says so."""
    later = text("UPDATE alembic_version SET version_num = '9999'")
    async with Database.open(database_url) as database:
        await database.write(lambda connection: connection.execute(later))

    with pytest.raises(SettingsError, match=r"DLLM_DATABASE_URL: .*9999"):
        async with Database.open(database_url):
            pass


async def test_database_does_not_grow_without_bound(database_url: str) -> None:
    """If results are purged, fifty rounds of jobs take no more space than the first."""
    async with Database.open(database_url) as database:
        now = 0.0
        store = JobStore(database, max_attempts=3, clock=lambda: now)
        rows = []
        for _ in range(50):
            await store.add([{"text_input": "x" * 2000}] * 50, max_queued=1000)
            for job in await store.claim("a", limit=50, lease=30):
                await store.finish(job, Event("y" * 2000, "stop"))
                await asyncio.sleep(0)  # SQLite's transactions do not yield to the loop
            now += 100
            await store.purge(ttl=150, limit=1000)
            count = text("SELECT count(*) FROM jobs")
            rows.append(await database.write(lambda connection: connection.scalar(count)))  # noqa: B023
        assert rows == [50] * 50
        if database_url.startswith("sqlite"):
            count = text("PRAGMA page_count")
            pages = await database.write(lambda connection: connection.scalar(count))
            assert pages * 4096 < 3 * 100 * 4000
            log = Path(f"{make_url(database_url).database}-wal")
            async with asyncio.timeout(60):  # on a slow disk a checkpoint may take longer
                while log.stat().st_size > LOG_LIMIT_BYTES:
                    await store.purge(ttl=150, limit=1000)
                    await asyncio.sleep(0.1)


def migrate_by_command(url: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`python -m adapter.migrate`."""
    return subprocess.run(
        [sys.executable, "-m", "adapter.migrate", *arguments],
        env={**os.environ, "DLLM_DATABASE_URL": url},
        capture_output=True,
        text=True,
    )


async def test_the_schema_goes_back_and_forth(database_url: str) -> None:
    """A database can be brought to the schema before and back, and keeps its jobs."""
    async with Database.open(database_url) as database:
        assert await JobStore(database, max_attempts=3).add([{"seed": 1}], max_queued=9) == [0]
        head = (await database.read(select(text("version_num from alembic_version"))))[0][0]
    before = f"{int(head) - 1:04}"
    back = migrate_by_command(database_url, before)
    assert (back.returncode, back.stdout) == (0, f"schema {head} -> {before}\n")
    again = migrate_by_command(database_url)
    assert (again.returncode, again.stdout) == (0, f"schema {before} -> {head}\n")
    async with Database.open(database_url) as database:
        assert await database.write(differences) == []
        (job,) = await JobStore(database, max_attempts=3).claim("a", limit=9, lease=30)
        assert (job.id, job.inputs) == (0, {"seed": 1})


@pytest.mark.parametrize("revision", ["0001", "0042", "x"])
async def test_no_way_back_is_told(database_url: str, revision: str) -> None:
    """A revision that cannot be reached leaves the database as it is."""
    async with connect(database_url) as connections:
        await migrate(connections)
        with pytest.raises(SettingsError, match="no way back from|is none before it"):
            await migrate(connections, revision)
        assert await connections.read(is_current)
