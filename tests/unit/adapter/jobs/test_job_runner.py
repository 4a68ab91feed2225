"""Jobs when engine, worker or database fail."""

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest
from adapter_fakes import (
    DONE,
    HANG,
    SIGN_OF_LIFE,
    WAITING,
    RunningApp,
    ScriptedEngine,
    fast_settings,
    running_app,
    until,
)

from adapter.db.database import Database
from adapter.errors import (
    ConnectionLost,
    EngineDead,
    EngineDraining,
    EngineFailure,
    Overloaded,
    StoreUnavailable,
    Unavailable,
)
from adapter.jobs.job import Job, JobState
from adapter.jobs.store import JobStore
from adapter.types import Event


@pytest.fixture
async def api(database_url: str, engine: ScriptedEngine) -> AsyncIterator[RunningApp]:
    """A worker for which three seconds pass in some milliseconds."""
    async with running_app(fast_settings(database_url), engine) as running:
        yield running


@pytest.mark.parametrize("error", [Unavailable("connection refused"), Overloaded("queue full")])
async def test_absence_of_the_engine_is_not_the_jobs_fault(
    database_url: str, engine: ScriptedEngine, error: Exception
) -> None:
    """A job is tried until Triton takes it, however few attempts it has."""
    engine.scripts = [[error], [error], [DONE]]
    async with running_app(fast_settings(database_url, job_max_attempts=1), engine) as api:
        assert DONE.text == (await api.result(await api.submit()))["text"]

    assert len(engine.requests) == 3


async def test_job_that_takes_tritonserver_down_is_given_up(
    api: RunningApp, engine: ScriptedEngine
) -> None:
    """What a connection breaks under that had begun may have done it, and is tried so often."""
    engine.scripts = [[WAITING, SIGN_OF_LIFE, Unavailable("Socket closed")]]
    result = await api.result(await api.submit())

    assert result["error"] == "given up after 3 attempts: Socket closed"
    assert len(engine.requests) == 3


@pytest.mark.parametrize(
    "script",
    [
        pytest.param([WAITING, Unavailable("Socket closed")], id="it waited"),
        pytest.param(
            [SIGN_OF_LIFE, EngineDraining("the server is stopping")], id="an orderly stop"
        ),
    ],
)
async def test_job_that_cannot_have_taken_tritonserver_down_keeps_its_attempts(
    database_url: str, engine: ScriptedEngine, script: list[Event | str | Exception]
) -> None:
    """A job that had no place yet, or that the engine gives back itself, is snoozed."""
    engine.scripts = [list(script), [DONE]]
    async with running_app(fast_settings(database_url, job_max_attempts=1), engine) as api:
        assert DONE.text == (await api.result(await api.submit()))["text"]


async def test_nothing_is_claimed_while_the_engine_is_away(
    api: RunningApp, engine: ScriptedEngine
) -> None:
    """Jobs wait in the store while probes fail, and run once they are answered."""
    await until(lambda: api.monitor.state.ok)
    engine.probe_error = Unavailable("failed to connect")
    await until(lambda: not api.monitor.state.ok)
    await api.submit()
    await asyncio.sleep(0.1)
    status, body = await api.health()
    assert (status, body["reason"]) == (503, "failed to connect")
    assert engine.requests == []

    engine.probe_error = None
    assert (await api.result(0))["status"] == "finished"


async def test_failing_engine_uses_up_attempts(api: RunningApp, engine: ScriptedEngine) -> None:
    """Errors of the engine are retried, and the last one is the job's."""
    engine.scripts = [[EngineFailure("CUDA error")]]
    result = await api.result(await api.submit())

    assert result["error"] == "given up after 3 attempts: CUDA error"
    assert len(engine.requests) == 3


async def test_engine_is_told_that_the_last_attempt_runs_alone(
    api: RunningApp, engine: ScriptedEngine
) -> None:
    """Streams run beside jobs, which only the engine can keep away from a last attempt."""
    engine.scripts = [[EngineFailure("CUDA error")]]
    await api.result(await api.submit())

    assert [inputs.get("exclusive") for inputs in engine.requests] == [None, None, True]


@pytest.mark.parametrize("end", [[], [SIGN_OF_LIFE], [Event("", "cancelled")]])
async def test_stream_without_result_is_run_again(
    api: RunningApp, engine: ScriptedEngine, end: list[Event | str | Exception]
) -> None:
    """A stream that ends without a result of its own is a lost attempt."""
    engine.scripts = [list(end), [DONE]]

    assert DONE.text == (await api.result(await api.submit()))["text"]


async def test_jobs_of_an_engine_that_ends_run_once_more(
    api: RunningApp, engine: ScriptedEngine
) -> None:
    """When a tritonserver ends, its jobs run again on the next one, each exactly once."""
    engine.scripts = [[SIGN_OF_LIFE, HANG], [HANG], [DONE]]
    await api.submit()
    await until(lambda: len(engine.requests) == 1)
    await api.submit()
    await until(lambda: len(engine.requests) == 2)
    engine.end()
    await until(lambda: not api.monitor.state.ok)
    status, body = await api.health()
    assert (status, body["reason"]) == (503, "failed to connect")
    engine.start()

    assert [DONE.text] * 2 == [(await api.result(n))["text"] for n in (0, 1)]
    assert (len(engine.requests), engine.closed) == (4, 4)


async def test_job_that_ends_the_server_before_its_first_event_is_given_up(
    api: RunningApp, engine: ScriptedEngine
) -> None:
    """A job whose connection breaks before any event may have broken it: it has three tries."""
    engine.scripts = [[ConnectionLost("Socket closed")]]
    result = await api.result(await api.submit())

    assert result["error"] == "given up after 3 attempts: Socket closed"
    assert len(engine.requests) == 3


async def test_hung_engine_is_reported(api: RunningApp, engine: ScriptedEngine) -> None:
    """An engine that answers neither streams nor probes makes health 503; a restart ends that."""
    engine.scripts = [[SIGN_OF_LIFE, HANG], [DONE]]
    await api.submit()
    await until(lambda: len(engine.requests) == 1)
    engine.probe_hangs = True
    await until(lambda: api.monitor.state.dead)
    assert "has not answered for 0.3 s" in (await api.health())[1]["reason"]
    engine.end()
    engine.start()

    assert DONE.text == (await api.result(0))["text"]
    assert len(engine.requests) == 2


async def test_engine_that_sends_events_is_not_dead(
    api: RunningApp, engine: ScriptedEngine
) -> None:
    """What Triton says about the process counts for less than the events that come from it."""
    await until(lambda: api.monitor.state.ok)
    probe, monitor = engine.probe, api.monitor

    async def busy_probe() -> None:
        await asyncio.sleep(0.01)
        monitor.heartbeat()
        await asyncio.sleep(0.01)
        await probe()

    engine.probe = busy_probe  # type: ignore[method-assign]
    engine.alive = False
    monitor.request_probe()
    await asyncio.sleep(0.3)
    assert monitor.state.ok

    engine.probe = probe  # type: ignore[method-assign]
    await until(lambda: monitor.state.dead)


async def test_request_that_meets_a_dead_process_costs_no_attempt(
    database_url: str, engine: ScriptedEngine
) -> None:
    """Triton says that a process is dead to requests that came after its death alone."""
    dead = EngineDead("Stub process 'dllm_0_0' is not healthy.")
    engine.scripts = [[dead], [dead], [dead], [DONE]]
    async with running_app(fast_settings(database_url, job_max_attempts=2), engine) as api:
        await until(lambda: api.monitor.state.ok)
        assert DONE.text == (await api.result(await api.submit()))["text"]
    assert len(engine.requests) == 4


async def test_silent_stream_of_a_living_engine_is_lost(
    api: RunningApp, engine: ScriptedEngine
) -> None:
    """A stream that fell silent while probes are answered is closed and its job runs again."""
    engine.scripts = [[SIGN_OF_LIFE, HANG], [DONE]]

    assert DONE.text == (await api.result(await api.submit()))["text"]
    assert (len(engine.requests), engine.closed) == (2, 2)


async def test_stream_without_any_event_is_lost(api: RunningApp, engine: ScriptedEngine) -> None:
    """A stream without any event is lost too, since queued requests send heartbeats."""
    engine.scripts = [[HANG], [DONE]]

    assert DONE.text == (await api.result(await api.submit()))["text"]
    assert (len(engine.requests), engine.closed) == (2, 2)


async def test_hanging_engine_costs_a_job_one_attempt(
    database_url: str, engine: ScriptedEngine
) -> None:
    """A job that a hanging engine has lost is not sent there again until the engine responds."""
    engine.scripts = [[SIGN_OF_LIFE, HANG], [DONE]]
    async with running_app(fast_settings(database_url, probe_interval=1.0), engine) as api:
        await api.submit()
        await until(lambda: len(engine.requests) == 1)
        engine.probe_hangs = True
        await until(lambda: engine.closed == 1)
        await asyncio.sleep(1.0)
        assert len(engine.requests) == 1

        engine.probe_hangs = False
        assert DONE.text == (await api.result(0))["text"]


async def test_deadline_closes_the_stream_and_fails_the_job(
    api: RunningApp, engine: ScriptedEngine
) -> None:
    """A running job fails at its deadline, and its stream is closed."""
    engine.scripts = [[SIGN_OF_LIFE, HANG]]
    result = await api.result(await api.submit(timeout=0.15))

    assert result["error"] == "timeout: the job was not done within 0.15 s"
    assert (len(engine.requests), engine.closed) == (1, 1)


async def test_deadline_holds_in_the_queue(database_url: str, engine: ScriptedEngine) -> None:
    """A queued job fails at its deadline; others stay queued."""
    engine.alive = False
    async with running_app(fast_settings(database_url), engine) as api:
        late, patient = await api.submit(timeout=0.1), await api.submit()
        error = (await api.result(late))["error"]
        assert error == "timeout: the job was not done within 0.1 s"
        assert (await api.result(patient, wait=0))["status"] == "running"


async def test_priority_reaches_the_engine(api: RunningApp, engine: ScriptedEngine) -> None:
    """A job's priority is passed to the engine."""
    await api.submit(priority=1)
    await api.result(0)
    await api.client.post("/v1/generate_batch", json={"prompts": ["a"], "priority": 3})
    await api.result(1)

    assert engine.priorities == [1, 3]


async def test_cancel_from_another_worker_closes_the_stream(
    database_url: str, engine: ScriptedEngine
) -> None:
    """The worker that gets the call cancels at the engine; the one that runs the job notices.

    So do calls that wait for it there.
    """
    engine.scripts = [[HANG]]
    bystander = ScriptedEngine(alive=False)
    async with (
        running_app(fast_settings(database_url), bystander) as other,
        running_app(fast_settings(database_url), engine) as driver,
    ):
        await other.submit()
        await until(lambda: len(engine.requests) == 1)
        async with asyncio.TaskGroup() as tasks:
            held = tasks.create_task(driver.result(0))
            await asyncio.sleep(0.05)
            await other.client.delete("/v1/result/0")
        assert bystander.cancels == engine.request_ids
        await until(lambda: engine.closed == 1)

        for result in (held.result(), await other.result(0)):
            assert result["status"] == "cancelled"


async def test_stopping_worker_releases_its_jobs(
    database_url: str, engine: ScriptedEngine, store: JobStore
) -> None:
    """A worker that stops releases its jobs without counting an attempt."""
    engine.scripts = [[SIGN_OF_LIFE, HANG]]
    async with running_app(fast_settings(database_url), engine) as api:
        await api.submit()
        await until(lambda: len(engine.requests) == 1)
    assert engine.closed == 1
    assert Job(0, JobState.QUEUED, 0, None, None) == await store.get(0)

    async with running_app(fast_settings(database_url), ScriptedEngine()) as api:
        assert (await api.result(0))["status"] == "finished"


async def test_jobs_of_a_dead_worker_are_rescued(
    database_url: str, engine: ScriptedEngine, database: Database
) -> None:
    """A job whose lease has expired is run by another worker."""
    store = JobStore(database, max_attempts=3)
    await store.add([{"text_input": "a"}], max_queued=1)
    await store.claim("a-dead-worker", limit=1, lease=0.05)
    async with running_app(fast_settings(database_url), engine) as api:
        assert (await api.result(0))["status"] == "finished"


async def test_worker_that_starts_lets_others_renew_their_leases(
    database_url: str, engine: ScriptedEngine, database: Database
) -> None:
    """A lease that ran out during an outage may be renewed after another worker has started."""
    store = JobStore(database, max_attempts=3)
    await store.add([{"text_input": "a"}], max_queued=1)
    await store.claim("another-worker", limit=1, lease=0)
    async with running_app(fast_settings(database_url, lease_seconds=4), engine) as api:
        await asyncio.sleep(0.5)
        assert await store.renew("another-worker", [0], lease=30) == {0}
        await asyncio.sleep(2.5)
        assert (await api.result(0, wait=0))["status"] == "running"
    assert engine.requests == []


async def test_leases_of_living_workers_are_renewed(
    database_url: str, engine: ScriptedEngine
) -> None:
    """A job that runs for many times its lease stays with its worker."""
    engine.scripts = [[HANG]]
    settings = fast_settings(database_url, engine_idle_timeout=30)
    async with (
        running_app(settings, engine) as api,
        running_app(settings, engine),
    ):
        await api.submit()
        await asyncio.sleep(2.0)
        assert len(engine.requests) == 1


async def test_unforeseen_error_does_not_keep_the_job(
    api: RunningApp, engine: ScriptedEngine, caplog: pytest.LogCaptureFixture
) -> None:
    """An unexpected error is logged, and the job runs again after its lease has expired."""
    engine.scripts = [[KeyError("surprise")], [DONE]]

    assert DONE.text == (await api.result(await api.submit()))["text"]
    assert "'job': 0, " in caplog.text
    assert "job_failed_unexpectedly" in caplog.text
    assert "surprise" in caplog.text


async def test_result_is_kept_when_the_database_was_away(
    api: RunningApp, engine: ScriptedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A result that could not be stored is stored later, not generated again."""
    finish, failures = JobStore.finish, [StoreUnavailable("away"), StoreUnavailable("away")]

    async def flaky(*args: Any, **kwargs: Any) -> bool:
        if failures:
            raise failures.pop()
        return await finish(*args, **kwargs)

    monkeypatch.setattr(JobStore, "finish", flaky)
    assert DONE.text == (await api.result(await api.submit()))["text"]
    assert len(engine.requests) == 1


async def test_jobs_that_end_at_once_leave_room_for_others(
    api: RunningApp, engine: ScriptedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 40 jobs that end at once, only a few are recorded between two turns of the event loop."""
    finish, settled = JobStore.finish, 0

    async def counted(*args: Any, **kwargs: Any) -> bool:
        nonlocal settled
        settled += 1
        return await finish(*args, **kwargs)

    monkeypatch.setattr(JobStore, "finish", counted)
    the_end = asyncio.Event()
    engine.scripts = [[SIGN_OF_LIFE, the_end, DONE]]
    await api.client.post("/v1/generate_batch", json={"prompts": ["a"] * 40})
    await until(lambda: len(engine.requests) == 40)
    the_end.set()
    most = before = 0
    async with asyncio.timeout(5):
        while settled < 40:
            await asyncio.sleep(0)
            most, before = max(most, settled - before), settled
    assert 1 <= most <= 5


async def test_no_more_than_max_inflight_at_a_time(
    database_url: str, engine: ScriptedEngine
) -> None:
    """A worker runs at most `max_inflight` jobs, and claims more when one ends."""
    engine.scripts = [[HANG], [HANG], [DONE]]
    async with running_app(fast_settings(database_url, max_inflight=2), engine) as api:
        await api.client.post("/v1/generate_batch", json={"prompts": ["a", "b", "c"]})
        await until(lambda: len(engine.requests) == 2)
        await asyncio.sleep(0.1)
        assert len(engine.requests) == 2

        await api.client.delete("/v1/result/1")
        assert DONE.text == (await api.result(2))["text"]


async def test_jobs_that_arrive_at_once_find_no_more_places(
    database_url: str, engine: ScriptedEngine
) -> None:
    """Concurrent submissions fill the free slots; the other jobs wait in the queue."""
    engine.scripts = [[HANG], [HANG], [DONE]]
    async with running_app(fast_settings(database_url, max_inflight=2), engine) as api:
        await until(lambda: api.monitor.state.ok)
        await asyncio.gather(*(api.submit() for _ in range(6)))
        await until(lambda: len(engine.requests) == 2)
        await asyncio.sleep(0.1)
        assert len(engine.requests) == 2

        running = [int(name.partition("-")[0]) for name in engine.request_ids]
        await api.client.delete(f"/v1/result/{running[0]}")
        for job_id in set(range(6)) - set(running):
            assert DONE.text == (await api.result(job_id))["text"]


async def test_many_jobs_on_two_workers_run_exactly_once(
    database_url: str, engine: ScriptedEngine
) -> None:
    """Two workers run each of many jobs exactly once."""
    settings = fast_settings(database_url, max_inflight=16, lease_seconds=30)
    async with running_app(settings, engine) as one, running_app(settings, engine) as two:
        for worker in (one, two) * 2:
            await worker.client.post("/v1/generate_batch", json={"prompts": ["x"] * 50})
        start = time.monotonic()
        results = [await one.result(n, wait=30) for n in range(200)]
        assert time.monotonic() - start < 30

    assert {"finished"} == {result["status"] for result in results}
    assert len(engine.requests) == 200


async def test_expired_results_go(database_url: str, engine: ScriptedEngine) -> None:
    """A result is unknown after its time to live."""
    async with running_app(fast_settings(database_url, result_ttl=0.05), engine) as api:
        await api.submit()
        async with asyncio.timeout(5):
            while (await api.client.get("/v1/result/0")).status_code != 404:
                await asyncio.sleep(0.02)


async def test_log_names_the_job_and_not_the_prompt(
    api: RunningApp, caplog: pytest.LogCaptureFixture
) -> None:
    """The log does not contain prompts."""
    caplog.set_level("DEBUG", "adapter")
    await api.result(await api.submit("a secret"))
    await asyncio.sleep(0.02)

    assert "'job': 0, " in caplog.text
    assert "secret" not in caplog.text
