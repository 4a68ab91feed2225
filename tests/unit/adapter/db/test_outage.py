"""A PostgreSQL that goes silent: frozen, or behind a network that swallows packets."""

import asyncio
import signal
import sqlite3
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractContextManager, asynccontextmanager, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import httpx
import pytest
from adapter_fakes import (
    DONE,
    SIGN_OF_LIFE,
    RunningApp,
    ScriptedEngine,
    denoising,
    fast_settings,
    running_app,
    until,
)
from sqlalchemy import Connection, make_url

from adapter.db.database import Database
from adapter.db.sqlite import SqliteBackend
from adapter.jobs.store import JobStore
from launcher.ports import free_port
from tests.support.proxy import swallowing_proxy

if TYPE_CHECKING:
    from tests.support.postgres import PostgresServer

#: A limit of transactions that passes quickly.
TIMEOUT = 1.0

T = TypeVar("T")


@dataclass
class Silenceable:
    """A database that can be made silent."""

    url: str
    silent: Callable[[], AbstractContextManager[None]]


@pytest.fixture(params=["frozen", pytest.param("swallowed", marks=pytest.mark.slow)])
async def silenceable(
    request: pytest.FixtureRequest, postgres: "PostgresServer"
) -> AsyncIterator[Silenceable]:
    """An empty database, and either way of making it silent."""
    url = await asyncio.to_thread(postgres.fresh_database)
    if request.param == "frozen":
        yield Silenceable(url, postgres.frozen)
        return
    async with swallowing_proxy(postgres.port) as proxy:
        behind = make_url(url).set(port=proxy.port)
        yield Silenceable(behind.render_as_string(hide_password=False), proxy.swallowing)


def settings(url: str, **changes: Any) -> Any:
    """Fast settings whose engines are patient."""
    values = {"database_timeout": TIMEOUT, "engine_idle_timeout": 60, "lease_seconds": 3}
    return fast_settings(url, **{**values, **changes})


@asynccontextmanager
async def ready_app(chosen: Any, engine: ScriptedEngine) -> AsyncIterator[RunningApp]:
    async with running_app(chosen, engine) as api:
        await until(lambda: api.monitor.state.ok)
        yield api


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """What happens inside takes no longer than this."""
    began = time.monotonic()
    yield
    assert time.monotonic() - began < seconds


async def healthy(api: RunningApp, expected: bool, seconds: float) -> dict[str, Any]:
    """Wait until health says so; its body."""
    async with asyncio.timeout(seconds):
        while True:
            status, body = await api.health()
            if (status == 200) is expected:
                return body
            await asyncio.sleep(0.05)


async def test_silent_database_is_told_in_time_and_live_calls_go_on(
    silenceable: Silenceable,
) -> None:
    """Jobs are 503 with a reason, streams and completions go on, and the worker stays live."""
    engine = ScriptedEngine([[DONE], denoising(2), [DONE]])
    chosen = settings(silenceable.url, rate_limit="100/minute", database_timeout=5)
    async with ready_app(chosen, engine) as api:
        assert (await api.result(await api.submit()))["status"] == "finished"
        with silenceable.silent():
            with within(10):
                refused = await api.client.post("/v1/generate", json={"prompt": "a"})
                assert refused.status_code == 503
                assert "job store" in refused.json()["detail"]
            with within(5):
                body = await healthy(api, False, seconds=15)
            assert body["live"] == {"status": "ok"}
            assert body["jobs"]["status"] == "unavailable"
            assert body["jobs"]["reason"] == body["reason"]
            assert "has not answered" in body["reason"]
            with within(1):
                for call in ("result/0", "result/0?wait=60"):
                    assert (await api.client.get(f"/v1/{call}")).status_code == 503
                stream = await api.client.post("/v1/generate/stream", json={"prompt": "a"})
                assert "event: done" in stream.text
                body = {"model": "dllm", "prompt": "a"}
                answer = await api.client.post("/v1/completions", json=body)
                assert answer.json()["choices"][0]["text"] == DONE.text
                assert (await api.client.get("/v1/livez")).json() == {"status": "ok"}
                page = (await api.client.get("/metrics")).text
            assert "dllm_adapter_database_ready 0.0" in page
        await healthy(api, True, seconds=15)
        assert (await api.result(await api.submit()))["status"] == "finished"


async def test_held_poll_ends_when_the_database_goes_away(silenceable: Silenceable) -> None:
    """A held poll is answered 503 soon after the database has gone silent."""
    engine = ScriptedEngine([[SIGN_OF_LIFE, "hang"]])
    async with ready_app(settings(silenceable.url), engine) as api:
        await api.submit()
        poll = asyncio.create_task(api.client.get("/v1/result/0", params={"wait": 60}))
        await until(lambda: api.app.state.jobs.held == 1)
        with silenceable.silent(), within(10):
            assert (await poll).status_code == 503


async def test_jobs_run_once_however_long_the_database_was_silent(
    silenceable: Silenceable,
) -> None:
    """Jobs that end during a silence of several leases keep their results at two workers."""
    the_end = asyncio.Event()
    engine = ScriptedEngine([[SIGN_OF_LIFE, the_end, DONE]])
    chosen = settings(silenceable.url, lease_seconds=1.5, max_inflight=3)
    async with ready_app(chosen, engine) as one, ready_app(chosen, engine) as two:
        await one.client.post("/v1/generate_batch", json={"prompts": ["a"] * 5})
        await until(lambda: len(engine.requests) == 5)
        with silenceable.silent():
            await asyncio.sleep(2)
            the_end.set()
            await asyncio.sleep(3)
        for api in (one, two):
            await healthy(api, True, seconds=15)
        results = [await two.result(n, wait=20) for n in range(5)]
        assert [result["text"] for result in results] == [DONE.text] * 5
        assert len(engine.requests) == 5


async def test_worker_starts_without_its_database(silenceable: Silenceable) -> None:
    """Live calls are served before the database has answered once; jobs as soon as it has."""
    engine = ScriptedEngine()
    with silenceable.silent():
        context = ready_app(settings(silenceable.url), engine)
        api = await context.__aenter__()
        body = {"model": "dllm", "prompt": "a"}
        assert (await api.client.post("/v1/completions", json=body)).status_code == 200
        assert (await api.client.post("/v1/generate", json={"prompt": "a"})).status_code == 503
    try:
        await healthy(api, True, seconds=15)
        assert (await api.result(await api.submit()))["status"] == "finished"
    finally:
        await context.__aexit__(None, None, None)


async def test_sigterm_ends_a_worker_whose_database_is_silent(
    silenceable: Silenceable, tmp_path: Path
) -> None:
    """A worker whose database is silent ends within its drain time and some seconds, quietly."""
    port = free_port()
    environment = {
        "DLLM_DATABASE_URL": silenceable.url,
        "DLLM_TRITON_URL": f"127.0.0.1:{free_port()}",
        "DLLM_DRAIN_SECONDS": "1",
    }
    command = [sys.executable, "-m", "uvicorn", "adapter.app:app", "--port", str(port)]
    command += ["--timeout-graceful-shutdown", "1"]
    with (tmp_path / "log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(*command, env=environment, stderr=log)
    try:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            async with asyncio.timeout(60):
                while not await _submitted(client):
                    await asyncio.sleep(0.1)
            poll = asyncio.create_task(client.get("/v1/result/0", params={"wait": 60}))
            with silenceable.silent():
                await asyncio.sleep(1)
                with within(8):
                    process.send_signal(signal.SIGTERM)
                    await process.wait()
            poll.cancel()
            await asyncio.wait([poll])
        assert "closing connection" not in (tmp_path / "log").read_text()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def _submitted(client: httpx.AsyncClient) -> bool:
    try:
        answer = await client.post("/v1/generate", json={"prompt": "a"})
    except httpx.TransportError:
        return False
    return answer.status_code == 200


async def test_locked_file_is_told_in_time(tmp_path: Path) -> None:
    """While another process holds SQLite's lock, submissions are 503 in time; reads go on."""
    file = tmp_path / "jobs.db"
    chosen = settings(f"sqlite:///{file}", database_timeout=0.5)
    async with ready_app(chosen, ScriptedEngine()) as api:
        assert (await api.result(await api.submit()))["status"] == "finished"
        with closing(sqlite3.connect(file)) as other:
            other.execute("BEGIN IMMEDIATE")
            with within(3):
                refused = await api.client.post("/v1/generate", json={"prompt": "a"})
            assert (refused.status_code, "locked" in refused.text) == (503, True)
            assert (await api.result(0))["status"] == "finished"
        assert (await api.result(await api.submit()))["status"] == "finished"


class SlowToMigrate(SqliteBackend):
    """A database with a large table, which takes long to change."""

    def __init__(self, url: str) -> None:
        super().__init__(url, timeout=TIMEOUT)
        self.changed = asyncio.Event()

    async def migrate(self, change: Callable[[Connection], T]) -> T:
        """Migrate once the event is set."""
        await self.changed.wait()
        return await super().migrate(change)


async def test_long_upgrade_of_the_schema_is_no_stall(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a database that came late is upgraded, pings go on, and the outage says why."""
    monkeypatch.setattr("adapter.periodic.STALL_SECONDS", 1.5)
    monkeypatch.setattr("adapter.db.database.PING_PAUSE", 0.1)
    backend = SlowToMigrate(f"sqlite:///{tmp_path}/jobs.db")
    database = Database(backend)
    async with database.loop:
        await until(lambda: "being upgraded" in (database.outage or ""))
        await asyncio.sleep(1.6)
        assert not database.loop.stalled
        backend.changed.set()
        await until(lambda: database.outage is None)
        assert await JobStore(database, max_attempts=1).get(0) is None
    backend.close()
