"""A worker with the default limits."""

from collections.abc import AsyncIterator

import pytest
from adapter_fakes import RunningApp, ScriptedEngine, fast_settings, running_app


@pytest.fixture
async def api(database_url: str, engine: ScriptedEngine) -> AsyncIterator[RunningApp]:
    """A worker with the default limits."""
    async with running_app(fast_settings(database_url), engine) as running:
        yield running
