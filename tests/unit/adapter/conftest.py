"""Fixtures of the adapter's unit tests: a database of their own, a clock that is set by hand."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from adapter_fakes import HandClock

from adapter.database import Database
from adapter.jobs.store import JobStore


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DLLM_MAX_GEN_LENGTH", "DLLM_TRITON_URL", "DLLM_DATABASE_URL"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def database_url(tmp_path: Path) -> str:
    """Address of a database that does not exist yet."""
    return f"sqlite+aiosqlite:///{tmp_path}/jobs.db"


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
def store(database: Database, clock: HandClock) -> JobStore:
    """A store in which jobs get three attempts."""
    return JobStore(database, max_attempts=3, clock=clock)
