"""Clients of a scripted server."""

from collections.abc import Iterator

import httpx
import pytest
from client_fakes import Script
from dllm_client import Client, _operations


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retries without pauses."""
    monkeypatch.setattr(_operations, "RETRY_PAUSES", (0.0, 0.0, 0.0))
    monkeypatch.setattr(_operations, "POLL_SECONDS", 0.001)


@pytest.fixture
def script() -> Script:
    return Script()


@pytest.fixture
def client(script: Script, quick: None) -> Iterator[Client]:
    del quick
    with Client("http://server", transport=httpx.MockTransport(script)) as client:
        yield client
