"""Servers that tests share; each is started when the first test asks for it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import requests

from launcher.tritonserver import TritonServer
from tests.support.budget import register_profiles
from tests.support.servers import AdapterServer, kept_running, triton_server

if TYPE_CHECKING:  # torch takes seconds to import, and most tests do without
    from dllm_engine import LLM

    from tests.support.postgres import PostgresServer

register_profiles()

# The tests' own calls to servers of this machine must not go to a proxy of the environment.
os.environ["no_proxy"] = os.environ["NO_PROXY"] = "127.0.0.1,localhost,::1"

StartAdapter = Callable[..., AdapterServer]

MAX_MODEL_LEN = 1024
#: One probe at the start and then none, so that the engine's counters move by tests alone.
NO_PROBES = {"DLLM_PROBE_INTERVAL": "3600"}


@pytest.fixture(scope="session", autouse=True)
def _no_settings_of_the_developer() -> Iterator[None]:
    """Servers under test take no settings from the shell that runs the tests."""
    with pytest.MonkeyPatch.context() as patch:
        for name in list(os.environ):
            if name.startswith("DLLM_") or name == "MODEL_PATH":
                patch.delenv(name)
        yield


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    """A PostgreSQL server; every test makes a database of its own in it."""
    from tests.support.postgres import postgres_server

    with postgres_server() as server:
        yield server


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random LLaDA with room for long requests."""
    from tests.support.checkpoints import write_llada

    folder = tmp_path_factory.mktemp("checkpoint")
    return write_llada(folder, max_sequence_length=MAX_MODEL_LEN)


@pytest.fixture(scope="session")
def llm(checkpoint: Path) -> LLM:
    """The same checkpoint in this process."""
    from dllm_engine import LLM

    return LLM(checkpoint, device="cpu")


@pytest.fixture(scope="session")
def triton(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    """tritonserver with our model repository; to be left as it was found."""
    log_file = tmp_path_factory.mktemp("triton") / "triton.log"
    with triton_server(checkpoint, log_file=log_file) as server:
        yield server


@pytest.fixture(scope="session")
def _mortal(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    log_file = tmp_path_factory.mktemp("mortal") / "triton.log"
    with triton_server(checkpoint, log_file=log_file) as server:
        yield server


@pytest.fixture
def mortal(_mortal: TritonServer) -> TritonServer:
    """A tritonserver that the test may harm.

    One that has ended is started again for the next test.
    """
    ready = f"http://{_mortal.http_url}/v2/models/dllm/ready"
    if not _mortal.running or requests.get(ready, timeout=30).status_code != 200:
        _mortal.stop()
        _mortal.start()
    return _mortal


@pytest.fixture
def undying(mortal: TritonServer) -> Iterator[TritonServer]:
    """A tritonserver that the test may kill, with its models: it is started again each time."""
    with kept_running(mortal):
        yield mortal


@pytest.fixture(scope="session")
def adapter(
    triton: TritonServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[AdapterServer]:
    """The adapter, one worker."""
    database = tmp_path_factory.mktemp("adapter") / "jobs.db"
    with AdapterServer(triton, database, settings=NO_PROBES) as server:
        yield server


@pytest.fixture(scope="session")
def adapter_workers(
    triton: TritonServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[AdapterServer]:
    """The adapter, four workers behind one port."""
    database = tmp_path_factory.mktemp("adapter-workers") / "jobs.db"
    with AdapterServer(triton, database, workers=4, settings=NO_PROBES) as server:
        yield server


@pytest.fixture
def start_adapter(triton: TritonServer, tmp_path: Path) -> Iterator[StartAdapter]:
    """Start an adapter of the test's own on a fresh database, with the settings given by name."""
    with ExitStack() as stack:

        def start(
            server: TritonServer | None = None, *, workers: int = 1, **settings: str
        ) -> AdapterServer:
            database = tmp_path / "jobs.db"
            own = AdapterServer(server or triton, database, workers=workers, settings=settings)
            return stack.enter_context(own)

        yield start
