"""The REST API through its front door."""

import asyncio
import inspect
import json
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import jsonschema_rs
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
from fastapi.dependencies.models import Dependant
from fastapi.routing import APIRoute, iter_route_contexts

from adapter.errors import InvalidRequest


@pytest.fixture
async def api(database_url: str, engine: ScriptedEngine) -> AsyncIterator[RunningApp]:
    """A worker with the default limits."""
    async with running_app(fast_settings(database_url), engine) as running:
        yield running


async def error_responses(api: RunningApp, path: str, body: Any) -> list[tuple[str, str]]:
    content = body if isinstance(body, str) else json.dumps(body)
    headers = {"content-type": "application/json"}
    answer = await api.client.post(path, content=content, headers=headers)
    assert answer.status_code == 422, answer.text
    return [(".".join(map(str, item["loc"])), item["msg"]) for item in answer.json()["detail"]]


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


async def test_prompt_is_one_user_message(api: RunningApp, engine: ScriptedEngine) -> None:
    """A prompt goes to the engine as a chat of one message, for its template to render."""
    await api.result(await api.submit("hi"))

    assert engine.requests == [
        {"temperature": 0.0, "gen_length": 32, "messages": '[{"role": "user", "content": "hi"}]'}
    ]


async def test_raw_prompt_is_passed_as_it_is(api: RunningApp, engine: ScriptedEngine) -> None:
    """With raw, the engine gets the text itself."""
    await api.result(await api.submit("hi", raw=True))

    assert engine.requests == [{"temperature": 0.0, "gen_length": 32, "text_input": "hi"}]


async def test_every_option_reaches_the_engine(api: RunningApp, engine: ScriptedEngine) -> None:
    """Each optional field becomes the input of that name; one that is null is left out."""
    options = {
        "temperature": 1.5,
        "gen_length": 64,
        "steps": 16,
        "block_length": 16,
        "cfg_scale": 1,
        "remasking": "random",
        "confidence_threshold": 0.9,
        "factor": 1.5,
        "entropy_bound": 0.25,
        "low_threshold": 0.5,
        "anchor_threshold": 0.75,
        "neighbor_threshold": 0.5,
        "alg": "entropy",
        "alg_temp": 0.5,
        "logits_eos_inf": True,
        "confidence_eos_eot_inf": True,
        "suffix": "the end",
        "canvas_ids": [1, 2, 3],
        "top_p": 0.5,
        "top_k": 4,
        "seed": -(2**63),
        "stop": ["a", "b"],
        "cache": "dual",
        "retention_ratio": 0.5,
        "ignore_eos": True,
    }
    body = {"input_ids": [1, 2], "prompt": None, **options}
    answer = await api.client.post("/v1/generate", json=body)
    assert answer.status_code == 200, answer.text
    await api.result(0)

    assert [{"input_ids": [1, 2], **options}] == engine.requests


async def test_canvas_says_how_long_it_is(api: RunningApp, engine: ScriptedEngine) -> None:
    """A canvas without gen_length has its own length, not the default one."""
    await api.result(await api.submit(canvas_ids=[5, 6, 7]))

    assert engine.requests[0]["gen_length"] == 3


async def test_block_fits_the_canvas(api: RunningApp, engine: ScriptedEngine) -> None:
    """A block may be as long as the canvas, whichever of the two fields says how long that is."""
    await api.result(await api.submit(canvas_ids=[5] * 64, block_length=64))
    assert engine.requests[0]["block_length"] == 64

    long = {"prompt": "a", "canvas_ids": [5] * 3, "block_length": 4}
    ((where, why),) = await error_responses(api, "/v1/generate", long)
    assert where == "body.block_length"
    assert "less than or equal to 3" in why


async def test_single_stop_string(api: RunningApp, engine: ScriptedEngine) -> None:
    """One stop string may stand without a list."""
    await api.result(await api.submit(stop="END"))

    assert engine.requests[0]["stop"] == ["END"]


@pytest.mark.parametrize(
    ("body", "loc", "message"),
    [
        ({"prompt": ""}, "prompt", "at least 1 character"),
        ({"prompt": "x" * 4097}, "prompt", "at most 4096 characters"),
        ({"prompt": 7}, "prompt", "valid string"),
        ({"prompt": "a\x00b"}, "prompt", "NUL"),
        ('{"prompt": "\\ud800"}', "prompt", "unicode"),
        ('{"messages": [{"role": "user", "content": "\\ud800"}]}', "messages.0.content", "unicode"),
        ({"prompt": "a", "temperature": 2.1}, "temperature", "less than or equal to 2"),
        ({"prompt": "a", "temperature": -0.1}, "temperature", "greater than or equal to 0"),
        ('{"prompt": "a", "temperature": NaN}', "temperature", "finite"),
        ('{"prompt": "a", "cfg_scale": Infinity}', "cfg_scale", "finite"),
        ('{"prompt": "a", "temperature": 1e999}', "temperature", "finite"),
        ({"prompt": "a", "temperature": True}, "temperature", "valid number"),
        ({"prompt": "a", "gen_length": 0}, "gen_length", "greater than or equal to 1"),
        ({"prompt": "a", "gen_length": 513}, "gen_length", "less than or equal to 512"),
        ({"prompt": "a", "canvas_ids": [1] * 513}, "canvas_ids", "at most 512 items"),
        ({"prompt": "a", "suffix": "x" * 4097}, "suffix", "at most 4096 characters"),
        ({"prompt": "a", "factor": -1}, "factor", "greater than or equal to 0"),
        ({"prompt": "a", "gen_length": True}, "gen_length", "valid integer"),
        ({"prompt": "a", "gen_length": "32"}, "gen_length", "valid integer"),
        ({"prompt": "a", "gen_length": 1.5}, "gen_length", "valid integer"),
        ({"prompt": "a", "steps": 0}, "steps", "greater than or equal to 1"),
        ({"prompt": "a", "block_length": 0}, "block_length", "greater than or equal to 1"),
        ({"prompt": "a", "block_length": 33}, "block_length", "less than or equal to 32"),
        ({"prompt": "a", "cfg_scale": -1}, "cfg_scale", "greater than or equal to 0"),
        ({"prompt": "a", "confidence_threshold": 0}, "confidence_threshold", "greater than 0"),
        ({"prompt": "a", "confidence_threshold": 1.1}, "confidence_threshold", "equal to 1"),
        ({"prompt": "a", "timeout": 0}, "timeout", "greater than 0"),
        ({"prompt": "a", "timeout": 86401}, "timeout", "less than or equal to 86400"),
        ({"prompt": "a", "priority": 0}, "priority", "greater than or equal to 1"),
        ({"prompt": "a", "priority": 4}, "priority", "less than or equal to 3"),
        ({"prompt": "a", "top_p": 0}, "top_p", "greater than 0"),
        ({"prompt": "a", "top_k": 0}, "top_k", "greater than or equal to 1"),
        ({"prompt": "a", "retention_ratio": 2}, "retention_ratio", "less than or equal to 1"),
        ({"prompt": "a", "seed": 2**63}, "seed", "less than or equal to 9223372036854775807"),
        ({"prompt": "a", "stop": ["x"] * 17}, "stop", "at most 16 items"),
        ({"prompt": "a", "stop": ["x", ""]}, "stop.1", "at least 1 character"),
        ({"prompt": "a", "stop": "x" * 257}, "stop.0", "at most 256 characters"),
        ({"prompt": "a", "max_tokens": 3}, "max_tokens", "Extra inputs are not permitted"),
        ({"prompt": "a", "\u2028": 3}, "\u2028", "Extra inputs are not permitted"),
        ({"input_ids": [1, -1]}, "input_ids.1", "greater than or equal to 0"),
        ({"input_ids": [1] * 4097}, "input_ids", "at most 4096 items"),
        ({"messages": []}, "messages", "at least 1 item"),
        ({"messages": [{"role": "user"}]}, "messages.0.content", "required"),
        (
            {"messages": [{"role": "user", "content": "x" * 1366}] * 3},
            "messages",
            "at most 4096 characters",
        ),
    ],
)
async def test_bad_value_is_422_naming_field_and_limit(
    api: RunningApp, body: Any, loc: str, message: str
) -> None:
    """A value out of bounds is refused with the field's name and the limit."""
    ((where, why),) = await error_responses(api, "/v1/generate", body)

    assert f"body.{loc}" == where
    assert message in why


async def test_a_chat_may_have_as_many_characters_as_the_limit_says(api: RunningApp) -> None:
    """Only characters count towards the limit of characters; messages have the same limit."""
    for chat, status in (
        ([{"role": "user", "content": "x" * 4096}], 200),
        ([{"role": "user", "content": "x" * 2048}] * 2, 200),
        ([{"role": "user", "content": ""}] * 4097, 422),
    ):
        answer = await api.client.post("/v1/generate", json={"messages": chat})
        assert answer.status_code == status, answer.text


@pytest.mark.parametrize(
    ("body", "given"),
    [
        ({}, "none"),
        ({"prompt": None}, "none"),
        ({"prompt": "a", "input_ids": [1]}, "prompt and input_ids"),
        ({"prompt": "a", "messages": [{"role": "user", "content": "b"}]}, "prompt and messages"),
    ],
)
async def test_exactly_one_prompt(api: RunningApp, body: Any, given: str) -> None:
    """Prompt, messages and input_ids exclude one another, and the answer says so."""
    ((where, why),) = await error_responses(api, "/v1/generate", body)

    assert where == "body"
    expected = f"Exactly one of prompt, messages, input_ids should be given, not {given}"
    assert expected == why


async def test_raw_goes_with_a_prompt_only(api: RunningApp) -> None:
    """Raw means nothing for token ids, so it is refused rather than ignored."""
    ((_, why),) = await error_responses(api, "/v1/generate", {"input_ids": [1], "raw": True})

    assert why == "raw should be given together with prompt only"


@pytest.mark.parametrize(
    ("body", "loc", "message"),
    [
        ({}, "prompts", "required"),
        ({"prompts": []}, "prompts", "at least 1 item"),
        ({"prompts": ["a"] * 65}, "prompts", "at most 64 items"),
        ({"prompts": ["a", ""]}, "prompts.1", "at least 1 character"),
        ({"prompts": ["a", "x" * 4097]}, "prompts.1", "at most 4096 characters"),
        ({"prompts": ["a"], "gen_length": 513}, "gen_length", "less than or equal to 512"),
        ({"prompts": ["a"], "prompt": "a"}, "prompt", "Extra inputs are not permitted"),
    ],
)
async def test_bad_batch_leaves_no_job(api: RunningApp, body: Any, loc: str, message: str) -> None:
    """One bad prompt refuses the whole batch."""
    ((where, why),) = await error_responses(api, "/v1/generate_batch", body)

    assert f"body.{loc}" == where
    assert message in why
    assert await api.submit() == 0


async def test_all_excesses_are_named_at_once(api: RunningApp) -> None:
    """A request that exceeds several limits learns of all of them."""
    body = {"prompt": "x" * 4097, "temperature": 3, "gen_length": 600}

    where = [loc for loc, _ in await error_responses(api, "/v1/generate", body)]
    assert where == ["body.prompt", "body.temperature", "body.gen_length"]


@pytest.mark.parametrize(
    "content",
    [b"{", b"[]", b"null", b"", b"\xff", b'{"\\ud800": 1, "prompt": "a"}', b"[" * 100_000],
)
async def test_malformed_body_is_a_client_error(api: RunningApp, content: bytes) -> None:
    """Whatever the bytes, the answer is a 4xx."""
    answer = await api.client.post(
        "/v1/generate", content=content, headers={"content-type": "application/json"}
    )
    assert answer.status_code in (400, 422)


async def test_limits_are_settings(database_url: str) -> None:
    """Every limit can be moved in both directions."""
    settings = fast_settings(
        database_url, max_prompt_chars=5000, max_gen_length=8, max_temperature=0.5, max_batch_size=1
    )
    async with running_app(settings, ScriptedEngine()) as api:
        assert await api.submit("x" * 5000, gen_length=8, temperature=0.5) == 0
        body = {"prompts": ["a", "b"], "gen_length": 9, "temperature": 0.6}
        where = [loc for loc, _ in await error_responses(api, "/v1/generate_batch", body)]
        assert where == ["body.prompts", "body.temperature", "body.gen_length"]


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


async def test_health_is_ok_once_the_engine_answers(api: RunningApp) -> None:
    """Health is about a real answer of the engine."""
    for _ in range(100):
        if (await api.health())[0] == 200:
            both = {"jobs": {"status": "ok"}, "live": {"status": "ok"}}
            assert await api.health() == (200, {"status": "ok", **both})
            return
        await asyncio.sleep(0.01)
    pytest.fail(str(await api.health()))


async def test_health_is_503_with_the_reason(database_url: str) -> None:
    """While the engine does not answer, health says why; the process itself is alive."""
    settings = fast_settings(database_url)
    async with running_app(settings, ScriptedEngine(alive=False)) as api:
        for _ in range(100):
            status, body = await api.health()
            if "healthy" in body["reason"]:
                break
            await asyncio.sleep(0.01)
        reason = "Stub process 'dllm_0_0' is not healthy."
        live = {"status": "unavailable", "reason": reason}
        assert (503, {**live, "jobs": {"status": "ok"}, "live": live}) == (status, body)
        assert (await api.client.get("/v1/livez")).status_code == 200


async def test_openapi_describes_the_calls(api: RunningApp) -> None:
    """The schema can be made, and knows every call."""
    paths = (await api.client.get("/openapi.json")).json()["paths"]

    assert {
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/models",
        "/v1/models/{model}",
        "/v1/generate",
        "/v1/generate/stream",
        "/v1/generate_batch",
        "/v1/result/{request_id}",
        "/v1/health",
        "/v1/livez",
        "/metrics",
    } == set(paths)


A_PROMPT: dict[str, Any] = {"prompt": "a"}
A_CHAT = [{"role": "user", "content": "a"}]
A_CALL: dict[str, Any] = {"model": "dllm", "messages": A_CHAT}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/generate", A_PROMPT),
        ("/v1/generate", {}),
        ("/v1/generate", {"prompt": None}),
        ("/v1/generate", {"prompt": None, "input_ids": [1], "raw": False}),
        ("/v1/generate", A_PROMPT | {"messages": None, "raw": True}),
        ("/v1/generate", A_PROMPT | {"messages": A_CHAT}),
        ("/v1/generate", A_PROMPT | {"input_ids": [1], "raw": True}),
        ("/v1/generate", {"messages": A_CHAT}),
        ("/v1/generate", {"messages": A_CHAT, "input_ids": [1]}),
        ("/v1/generate", {"messages": A_CHAT, "raw": True}),
        ("/v1/generate", {"input_ids": [1], "raw": True}),
        ("/v1/generate", A_PROMPT | {"unknown": 1}),
        ("/v1/generate", A_PROMPT | {"gen_length": 513}),
        ("/v1/generate/stream", A_PROMPT | {"messages": A_CHAT}),
        ("/v1/generate_batch", {"prompts": ["a"]}),
        ("/v1/generate_batch", {"prompts": ["a"], "prompt": "a"}),
        ("/v1/generate_batch", {"prompts": ["a", ""]}),
        ("/v1/generate_batch", {"prompts": ["a", "a" * 4097]}),
        ("/v1/generate_batch", {"prompts": ["a"] * 65}),
        ("/v1/chat/completions", A_CALL),
        ("/v1/chat/completions", A_CALL | {"stream_options": {"include_usage": True}}),
        ("/v1/chat/completions", A_CALL | {"stream": False, "stream_options": {}}),
        ("/v1/chat/completions", A_CALL | {"stream": True, "stream_options": {}}),
        ("/v1/chat/completions", A_CALL | {"stream": None, "stream_options": None}),
        ("/v1/completions", {"model": "dllm", "prompt": "a", "stream_options": {}}),
    ],
)
async def test_description_tells_what_is_refused(
    api: RunningApp, path: str, body: dict[str, Any]
) -> None:
    """The published schema allows a body exactly if the server accepts it, rules that span fields
    among them."""
    await until(lambda: api.monitor.state.ok)
    description = (await api.client.get("/openapi.json")).json()
    content = description["paths"][path]["post"]["requestBody"]["content"]["application/json"]
    schema = {**content["schema"], "components": description["components"]}
    answer = await api.client.post(path, json=body)

    assert jsonschema_rs.validator_for(schema).is_valid(body) == (answer.status_code == 200)
    assert answer.status_code in (200, 400, 422)


async def test_no_call_is_handed_to_a_thread(api: RunningApp) -> None:
    """Whatever a route is made of is asynchronous, so that no thread has to be woken for it."""

    def parts(dependant: Dependant) -> Iterator[Any]:
        yield dependant.call
        for further in dependant.dependencies:
            yield from parts(further)

    routes = [
        found.original_route
        for found in iter_route_contexts(api.app.routes)
        if isinstance(found.original_route, APIRoute)
    ]
    assert len(routes) >= 12
    for route in routes:
        assert all(map(inspect.iscoroutinefunction, parts(route.dependant))), route.path


async def test_description_names_the_limits_of_this_server(database_url: str) -> None:
    """What the settings limit is published with its number, for every name that a field has."""
    settings = fast_settings(
        database_url, max_gen_length=77, max_temperature=1.5, max_prompt_chars=99
    )
    async with running_app(settings, ScriptedEngine()) as api:
        for _ in range(2):  # the description is made once
            schemas = (await api.client.get("/openapi.json")).json()["components"]["schemas"]

    bodies = {name: schemas[name]["properties"] for name in ("GenerateRequest", "ChatCall")}
    assert bodies["GenerateRequest"]["gen_length"]["maximum"] == 77
    assert bodies["GenerateRequest"]["temperature"]["maximum"] == 1.5
    assert bodies["GenerateRequest"]["prompt"]["anyOf"][0]["maxLength"] == 99
    assert bodies["ChatCall"]["temperature"]["anyOf"][0]["maximum"] == 1.5
    assert bodies["ChatCall"]["model"]["const"] == "dllm"
