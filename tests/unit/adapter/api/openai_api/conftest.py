"""A worker whose engine writes four pieces, and OpenAI's client of it."""

from collections.abc import AsyncIterator

import pytest
from adapter_fakes import (
    ScriptedEngine,
    denoising,
    fast_settings,
    served_app,
)
from openai import AsyncOpenAI
from openai_calls import until_healthy


@pytest.fixture
def engine() -> ScriptedEngine:
    """An engine that writes four pieces."""
    return ScriptedEngine([list(denoising(4))])


@pytest.fixture
async def url(database_url: str, engine: ScriptedEngine) -> AsyncIterator[str]:
    """A worker that is ready, behind a real socket."""
    settings = fast_settings(database_url, heartbeat_interval=0.02, engine_idle_timeout=10)
    async with served_app(settings, engine) as address:
        await until_healthy(address)
        yield address


@pytest.fixture
async def client(url: str) -> AsyncIterator[AsyncOpenAI]:
    """OpenAI's client, which makes each call once."""
    async with AsyncOpenAI(base_url=f"{url}/v1", api_key="-", max_retries=0) as opened:
        yield opened
