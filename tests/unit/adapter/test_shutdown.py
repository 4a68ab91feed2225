"""Shutting a worker down."""

import asyncio
import signal
import sys
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import httpx
import pytest
from adapter_fakes import (
    DONE,
    SIGN_OF_LIFE,
    ScriptedEngine,
    fast_settings,
    running_app,
    served_app,
    until,
)

from adapter.jobs.job import Job, JobState
from adapter.jobs.store import JobStore
from adapter.types import Event, Inputs
from launcher.ports import free_port


async def test_running_jobs_may_finish(database_url: str, store: JobStore) -> None:
    """Jobs that finish within the drain time are kept, and no job starts meanwhile."""
    may_answer = asyncio.Event()

    class SlowEngine(ScriptedEngine):
        async def generate(self, inputs: Inputs, **_: Any) -> AsyncGenerator[Event, None]:
            self.requests.append(inputs)
            yield SIGN_OF_LIFE
            await may_answer.wait()
            yield DONE

    engine = SlowEngine()
    settings = fast_settings(database_url, drain_seconds=30, max_inflight=1)
    async with running_app(settings, engine) as api:
        await api.submit()
        await until(lambda: len(engine.requests) == 1)
        await api.submit()
        asyncio.get_running_loop().call_later(0.1, may_answer.set)

    assert await store.get(0) == Job(0, JobState.FINISHED, 0, DONE.text, None)
    assert await store.get(1) == Job(1, JobState.QUEUED, 0, None, None)
    assert len(engine.requests) == 1


async def test_stopping_worker_answers_held_polls(database_url: str) -> None:
    """A held poll is answered at once when its worker shuts down."""
    async with running_app(fast_settings(database_url), ScriptedEngine([["hang"]])) as api:
        await api.submit()
        poll = asyncio.create_task(api.result(0, wait=60))
        await asyncio.sleep(0.1)
        api.app.state.jobs.stop()
        assert (await poll)["status"] == "running"
        assert (await api.result(0, wait=60))["status"] == "running"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_signal_ends_the_process_while_a_poll_is_held(
    database_url: str, tmp_path: Path, number: signal.Signals
) -> None:
    """SIGTERM and Ctrl-C end the process at once, and held polls get an answer."""
    port = free_port()
    environment = {"DLLM_DATABASE_URL": database_url, "DLLM_TRITON_URL": f"127.0.0.1:{free_port()}"}
    command = [sys.executable, "-m", "uvicorn", "adapter.app:app", "--port", str(port)]
    with (tmp_path / "log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(*command, env=environment, stderr=log)
    try:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=90) as client:
            await until_up(client)
            await client.post("/v1/generate", json={"prompt": "a"})
            poll = asyncio.create_task(client.get("/v1/result/0", params={"wait": 60}))
            await asyncio.sleep(0.5)
            process.send_signal(number)
            async with asyncio.timeout(30):
                assert (await poll).json()["status"] == "running"
                await process.wait()
    finally:
        if process.returncode is None:
            process.kill()


async def test_calls_that_are_cut_at_a_stop_are_told_so(
    database_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """When the time for a graceful stop is over, a call gets a 503, and the log no traceback."""
    engine = ScriptedEngine([[SIGN_OF_LIFE, "hang"]])
    body = {"model": "dllm", "prompt": "a"}
    async with httpx.AsyncClient(timeout=30) as client:
        async with served_app(fast_settings(database_url, engine_idle_timeout=30), engine) as url:
            path = f"{url}/v1/completions"
            whole = asyncio.create_task(client.post(path, json=body))
            stream = asyncio.create_task(client.post(path, json=body | {"stream": True}))
            await until(lambda: len(engine.requests) == 2)
        answer = await whole
        with pytest.raises(httpx.RemoteProtocolError):
            await stream
    assert answer.status_code == 503
    assert answer.headers["retry-after"] == "1"
    assert answer.json()["error"]["message"] == "this worker stops; send the call again"
    assert not [record for record in caplog.records if record.exc_info]


async def until_up(client: httpx.AsyncClient) -> None:
    async with asyncio.timeout(60):
        while True:
            try:
                await client.get("/v1/livez")
            except httpx.TransportError:
                await asyncio.sleep(0.1)
            else:
                return
