"""Fixtures of the adapter's unit tests: a database of their own, a clock that is set by hand."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from adapter_fakes import HandClock, ScriptedEngine

from adapter.db.database import Database
from adapter.jobs.store import JobStore

if TYPE_CHECKING:
    from tests.support.postgres import PostgresServer


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DLLM_MAX_GEN_LENGTH", "DLLM_TRITON_URL", "DLLM_DATABASE_URL"):
        monkeypatch.delenv(name, raising=False)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run each test that uses a database on both kinds: on PostgreSQL in `make test-slow` alone,
    unless the module names its DATABASES."""
    if "database_url" in metafunc.fixturenames:
        slow = pytest.param("postgresql", marks=pytest.mark.slow)
        kinds = getattr(metafunc.module, "DATABASES", ("sqlite", slow))
        metafunc.parametrize("database_url", kinds, indirect=True)


@pytest.fixture
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Address of an empty database."""
    if request.param == "postgresql":
        server: PostgresServer = request.getfixturevalue("postgres")
        return server.fresh_database()
    return f"sqlite:///{tmp_path}/jobs.db"


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    """An open database."""
    async with Database.open(database_url) as opened:
        yield opened


@pytest.fixture
def clock() -> HandClock:
    """A clock to be moved by hand."""
    return HandClock()


@pytest.fixture
def engine() -> ScriptedEngine:
    """An engine that answers at once."""
    return ScriptedEngine()


@pytest.fixture
def store(database: Database, clock: HandClock) -> JobStore:
    """A store in which jobs get three attempts."""
    return JobStore(database, max_attempts=3, clock=clock)
