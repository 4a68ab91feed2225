"""Jobs through the front door: submit, poll, wait, cancel, submit again under a key."""

import asyncio
import time
from typing import Any

import httpx
import pytest
from adapter_fakes import (
    DONE,
    HANG,
    RunningApp,
    ScriptedEngine,
    fast_settings,
    running_app,
    served_app,
    until,
)

from adapter.errors import InvalidRequest


async def test_generate_then_result(api: RunningApp) -> None:
    """The guide's round trip: submit, get an id, get the text."""
    answer = await api.client.post(
        "/v1/generate", json={"prompt": "Tell me", "temperature": 0.6, "gen_length": 128}
    )

    assert answer.json() == {"request_ids": [0], "status": "submitted"}
    result = await api.result(0)
    expected = {"request_id": 0, "status": "finished", "text": "an answer"}
    assert expected.items() <= result.items()


async def test_result_tells_how_it_came_about(api: RunningApp) -> None:
    """A result has what its run cost, why it ended, its seed and its times, at any worker."""
    before = time.time()
    await api.submit()
    for _ in range(2):  # from the worker that ran it, then from the database
        result = await api.result(0)
        assert result["finish_reason"] == "length"
        assert result["seed"] == 7
        assert result["usage"] == {
            "prompt_tokens": 3,
            "completion_tokens": 32,
            "steps": 32,
            "forward_passes": 32,
            "cached_tokens": 2,
        }
        times = [result[name] for name in ("created_at", "started_at", "finished_at")]
        assert before <= times[0] <= times[1] <= times[2] <= time.time()


async def test_result_is_the_same_at_every_poll(api: RunningApp, engine: ScriptedEngine) -> None:
    """A held poll, which is answered from memory, shows what a later one reads."""
    the_end = asyncio.Event()
    engine.scripts = [[the_end, DONE], [the_end, InvalidRequest("remasking: no")]]
    ids = [await api.submit(), await api.submit()]
    polls = [asyncio.create_task(api.result(n)) for n in ids]
    await until(lambda: len(engine.requests) == 2)
    the_end.set()
    assert await asyncio.gather(*polls) == [await api.result(n, wait=0) for n in ids]


async def test_running_job_shows_three_keys(api: RunningApp, engine: ScriptedEngine) -> None:
    """A job that is not done shows exactly what the guide shows."""
    engine.scripts = [[HANG]]
    await api.submit()

    expected = {"request_id": 0, "status": "running", "text": None}
    assert expected == await api.result(0, wait=0)


async def test_queued_job_reads_running(database_url: str) -> None:
    """A job that no worker has taken yet reads running."""
    async with running_app(fast_settings(database_url), ScriptedEngine(alive=False)) as api:
        await api.submit()
        assert (await api.result(0, wait=0))["status"] == "running"


async def test_batch_gets_consecutive_ids(api: RunningApp) -> None:
    """Every prompt of a batch gets an id, in order."""
    body = {"prompts": ["What is AI?", "Explain ML."], "temperature": 0.0, "gen_length": 64}
    answer = await api.client.post("/v1/generate_batch", json=body)

    assert answer.json() == {"request_ids": [0, 1], "status": "submitted"}
    assert [(await api.result(n))["status"] for n in (0, 1)] == ["finished"] * 2


async def test_engine_refusal_fails_the_job(api: RunningApp, engine: ScriptedEngine) -> None:
    """A job that was taken unseen, and is refused when it runs, fails with the engine's words."""
    engine.scripts = [[InvalidRequest("remasking: must be one of low_confidence, random")]]
    await api.submit(remasking="nonsense")

    result = await api.result(0)
    assert (result["status"], result["text"]) == ("failed", None)
    assert result["error"] == "remasking: must be one of low_confidence, random"
    assert "finish_reason" not in result


@pytest.mark.parametrize("method", ["GET", "DELETE"])
@pytest.mark.parametrize("job_id", ["0", "-1", str(2**70)])
async def test_unknown_id_is_404(api: RunningApp, method: str, job_id: str) -> None:
    """An id that was never given out is a 404 with a reason."""
    answer = await api.client.request(method, f"/v1/result/{job_id}")

    assert answer.status_code == 404
    assert f"request {job_id} is unknown, or its result has expired" == answer.json()["detail"]


async def test_key_makes_a_submission_once(api: RunningApp) -> None:
    """The same body under the same Idempotency-Key has the same ids, however it is written."""

    async def submit(content: str, key: str, call: str = "generate") -> list[int]:
        headers = {"Content-Type": "application/json", "Idempotency-Key": key}
        answer = await api.client.post(f"/v1/{call}", content=content, headers=headers)
        assert answer.status_code == 200, answer.text
        assert answer.json()["status"] == "submitted"
        return list(answer.json()["request_ids"])

    assert await submit('{"prompt": "a", "seed": 1}', "one") == [0]
    assert await submit('{"seed": 1,  "prompt": "a"}', "one") == [0]
    assert await submit('{"prompt": "a", "seed": 1}', "two") == [1]
    for _ in range(2):
        assert await submit('{"prompts": ["a", "b"]}', "three", "generate_batch") == [2, 3]
    assert await api.submit("a", seed=1) == 4


@pytest.mark.parametrize("change", [{"prompt": "b"}, {"priority": 1}, {"timeout": 9}, {"seed": 2}])
async def test_key_stands_for_one_body(api: RunningApp, change: dict[str, Any]) -> None:
    """Another body under a key that was used is a 422 that names the header, and makes no job."""
    headers = {"Idempotency-Key": "one"}
    body = {"prompt": "a", "seed": 1}
    await api.client.post("/v1/generate", json=body, headers=headers)
    answer = await api.client.post("/v1/generate", json=body | change, headers=headers)

    assert answer.status_code == 422
    assert answer.json() == {"detail": "Idempotency-Key: 'one' was used for another body"}
    assert await api.submit() == 1


@pytest.mark.parametrize("key", ["", "x" * 256, "with space", b"\xe9"])
async def test_key_has_a_form(api: RunningApp, key: str | bytes) -> None:
    """A key is up to 255 printable characters; what is none is a 422 that names the header."""
    headers = {b"Idempotency-Key": key if isinstance(key, bytes) else key.encode()}
    answer = await api.client.post("/v1/generate", json={"prompt": "a"}, headers=headers)

    assert answer.status_code == 422
    assert answer.json()["detail"][0]["loc"] == ["header", "Idempotency-Key"]


async def test_full_queue_is_429(database_url: str) -> None:
    """Beyond the queue's limit the answer is 429 and says when to come back."""
    settings = fast_settings(database_url, max_queued_jobs=2)
    async with running_app(settings, ScriptedEngine(alive=False)) as api:
        await api.client.post("/v1/generate_batch", json={"prompts": ["a", "b"]})
        answer = await api.client.post("/v1/generate", json={"prompt": "c"})

    assert answer.status_code == 429
    assert answer.headers["retry-after"] == "5"
    assert "at most 2 may (DLLM_MAX_QUEUED_JOBS)" in answer.json()["detail"]


async def test_cancel_answers_the_state_and_is_idempotent(
    api: RunningApp, engine: ScriptedEngine
) -> None:
    """Cancelling twice is the same as once, and the stream of the job is closed."""
    engine.scripts = [[HANG]]
    await api.submit()
    await until(lambda: bool(engine.requests))

    expected = {"request_id": 0, "status": "cancelled", "text": None}
    for _ in range(2):
        answer = await api.client.delete("/v1/result/0")
        assert answer.status_code == 200
        assert expected.items() <= answer.json().items()
    await until(lambda: engine.closed == 1)
    assert expected.items() <= (await api.result(0)).items()


async def test_cancel_leaves_a_finished_job(api: RunningApp) -> None:
    """A result that is there stays."""
    result = await api.result(await api.submit())

    assert (await api.client.delete("/v1/result/0")).json() == result


@pytest.mark.parametrize("wait", ["-1", "61", "nan", "x"])
async def test_wait_has_bounds(api: RunningApp, wait: str) -> None:
    """A poll can be held for up to 60 seconds."""
    answer = await api.client.get("/v1/result/0", params={"wait": wait})

    assert answer.status_code == 422
    assert answer.json()["detail"][0]["loc"] == ["query", "wait"]


async def test_wait_ends_with_the_time(api: RunningApp, engine: ScriptedEngine) -> None:
    """A held poll answers with what there is when its time is over."""
    engine.scripts = [[HANG]]
    await api.submit()

    assert (await api.result(0, wait=0.1))["status"] == "running"


async def test_too_many_held_polls_are_refused(database_url: str, engine: ScriptedEngine) -> None:
    """Beyond the limit a poll is told to come back, unless it need not be held."""
    engine.scripts = [[DONE], [HANG]]
    async with running_app(fast_settings(database_url, max_held_polls=1), engine) as api:
        done = await api.submit()
        await api.result(done)
        job = await api.submit()
        held = asyncio.create_task(api.result(job, wait=60))
        await until(lambda: api.app.state.jobs.held == 1)
        refused = await api.client.get(f"/v1/result/{job}", params={"wait": 60})
        assert refused.status_code == 429
        assert refused.headers["retry-after"]
        assert "DLLM_MAX_HELD_POLLS" in refused.json()["detail"]
        assert (await api.result(job, wait=0))["status"] == "running"
        assert (await api.result(done, wait=60))["status"] == "finished"

        await api.client.delete(f"/v1/result/{job}")
        assert (await held)["status"] == "cancelled"
        another = await api.submit()
        assert (await api.result(another, wait=0.05))["status"] == "running"


async def test_poll_that_is_held_ends_when_its_caller_hangs_up(database_url: str) -> None:
    """A held poll ends when its client disconnects."""
    left = 'route="/v1/result/{request_id}",status="499"} '
    settings = fast_settings(database_url)
    async with (
        served_app(settings, ScriptedEngine([[HANG]])) as url,
        httpx.AsyncClient(base_url=url) as client,
    ):

        async def gone() -> float:
            page = (await client.get("/metrics")).text
            return sum(float(line.rpartition(" ")[2]) for line in page.splitlines() if left in line)

        before = await gone()
        await client.post("/v1/generate", json={"prompt": "a"})
        with pytest.raises(httpx.ReadTimeout):
            await client.get("/v1/result/0", params={"wait": 60}, timeout=0.2)
        async with asyncio.timeout(5):
            while await gone() < before + 1:
                await asyncio.sleep(0.01)


async def test_wait_sees_jobs_of_other_workers(database_url: str) -> None:
    """A held poll ends soon after another worker has finished the job."""
    idle = fast_settings(database_url, poll_interval=60)
    async with running_app(idle, ScriptedEngine(alive=False)) as waiting:
        await waiting.submit()
        async with running_app(fast_settings(database_url), ScriptedEngine()):
            assert DONE.text == (await waiting.result(0))["text"]
