"""Background tasks: when they hang, and how they stop."""

import asyncio
import time

import pytest
from adapter_fakes import ScriptedEngine, fast_settings, running_app, until

from adapter import periodic
from adapter.jobs.store import JobStore
from adapter.periodic import PeriodicTask


async def test_worker_whose_task_hangs_is_not_live(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When a background task hangs in a step, livez and health are 503 and name it."""

    async def hang(*_: object, **__: object) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(periodic, "STALL_SECONDS", 0.5)
    monkeypatch.setattr(periodic, "STOP_SECONDS", 0.1)
    async with running_app(fast_settings(database_url), ScriptedEngine()) as api:
        await until(lambda: api.monitor.state.ok)
        assert (await api.client.get("/v1/livez")).status_code == 200
        monkeypatch.setattr(JobStore, "claim", hang)
        async with asyncio.timeout(10):
            while (answer := await api.client.get("/v1/livez")).status_code == 200:
                await asyncio.sleep(0.05)
        assert answer.status_code == 503
        assert "background tasks hang: job-claims for" in answer.json()["reason"]
        status, body = await api.health()
        assert (status, body["jobs"]["status"], body["live"]["status"]) == (
            503,
            "unavailable",
            "ok",
        )


async def test_task_that_has_ended_is_stalled() -> None:
    """A task that something has cancelled does not count as alive; one that waits does."""

    async def step() -> None:
        if broken:
            raise asyncio.CancelledError

    broken = False
    async with PeriodicTask("t", step) as task:
        await asyncio.sleep(0)
        assert not task.stalled
        broken = True
        task.wake()
        await until(lambda: task.stalled)


async def test_step_in_time_may_end_when_its_task_stops() -> None:
    """Leaving the context waits for the running step."""
    ended = False

    async def step() -> None:
        nonlocal ended
        await asyncio.sleep(0.1)
        ended = True

    async with PeriodicTask("t", step):
        await asyncio.sleep(0.01)
    assert ended


async def test_step_that_hangs_does_not_hold_a_stop_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaving the context cancels a step that does not end."""
    monkeypatch.setattr(periodic, "STOP_SECONDS", 0.1)

    async def step() -> None:
        await asyncio.Event().wait()

    began = time.monotonic()
    async with PeriodicTask("t", step):
        await asyncio.sleep(0.01)
    assert time.monotonic() - began < 5
