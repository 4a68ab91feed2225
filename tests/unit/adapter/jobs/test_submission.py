"""The engine's check of a request before it becomes a job."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from adapter_fakes import RunningApp, ScriptedEngine, fast_settings, running_app, until

from adapter.jobs.service import CHECK_SECONDS
from adapter.types import CheckResult


@pytest.fixture
async def api(database_url: str, engine: ScriptedEngine) -> AsyncIterator[RunningApp]:
    """A worker whose engine is ready."""
    async with running_app(fast_settings(database_url), engine) as running:
        await until(lambda: running.monitor.state.ok)
        yield running


async def refusal(api: RunningApp, path: str, body: Any) -> tuple[str, str]:
    """Submit a body that has one problem; its field and reason."""
    answer = await api.client.post(path, json=body)
    assert answer.status_code == 422, answer.text
    [problem] = answer.json()["detail"]
    return ".".join(map(str, problem["loc"])), problem["msg"]


async def test_what_the_engine_would_refuse_is_not_queued(
    api: RunningApp, engine: ScriptedEngine
) -> None:
    """A request that the engine would refuse is refused at submission with the engine's reason."""
    engine.check_results["bad"] = CheckResult("steps: must be at least 2; got 1")
    found = await refusal(api, "/v1/generate", {"prompt": "bad", "steps": 1})

    assert found == ("body.steps", "must be at least 2; got 1")
    assert engine.requests == []
    assert await api.submit() == 0


async def test_refused_prompt_of_a_batch_is_named(api: RunningApp, engine: ScriptedEngine) -> None:
    """The first refused prompt is named, unless all are refused; none is queued."""
    engine.check_results["long"] = CheckResult("gen_length: too much")
    engine.headroom = 3
    for prompts, problem in (
        (["short", "long", "short", "long"], ("body.prompts.1", "gen_length: too much")),
        (["long", "long"], ("body.gen_length", "too much")),
    ):
        found = await refusal(api, "/v1/generate_batch", {"prompts": prompts})
        assert found == problem
    assert await api.submit() == 0


async def test_engine_is_asked_once_about_what_fits(
    api: RunningApp, engine: ScriptedEngine
) -> None:
    """Another text or seed needs no new check; a text that may not fit and token ids do."""
    engine.headroom = 10
    for fields in (
        {"prompt": "a first one", "seed": 1},
        {"prompt": "any other", "seed": 2},
        {"prompt": "more than ten bytes"},
        {"prompt": "any other", "steps": 8},
        {"prompt": "any other", "raw": True},
        {"messages": [{"role": "user", "content": "any other"}]},
        {"messages": [{"role": "system", "content": "any other"}]},
        {"input_ids": [1, 2]},
        {"input_ids": [1, 2]},
    ):
        assert (await api.client.post("/v1/generate", json=fields)).status_code == 200

    asked = [{k: v for k, v in request.items() if k != "seed"} for request in engine.checked]
    rest = {"temperature": 0.0, "gen_length": 32}
    user = '[{"role": "user", "content": "%s"}]'
    assert asked == [
        rest | {"messages": user % "a first one"},
        rest | {"messages": user % "more than ten bytes"},
        rest | {"steps": 8, "messages": user % "any other"},
        rest | {"text_input": "any other"},
        rest | {"messages": '[{"role": "system", "content": "any other"}]'},
        rest | {"input_ids": [1, 2]},
        rest | {"input_ids": [1, 2]},
    ]


async def test_another_engine_is_asked_again(api: RunningApp, engine: ScriptedEngine) -> None:
    """The cache of an earlier engine does not hold for its successor."""
    await api.submit()
    engine.end()
    api.monitor.request_probe()
    await until(lambda: not api.monitor.state.ok)
    engine.start()
    await until(lambda: api.monitor.state.ok)
    await api.submit()

    assert len(engine.checked) == 2


@pytest.mark.parametrize("trouble", ["dead", "silent"])
async def test_jobs_are_accepted_while_the_engine_does_not_answer(
    api: RunningApp, engine: ScriptedEngine, trouble: str
) -> None:
    """While the engine does not answer, jobs are accepted without a check."""
    engine.alive, engine.check_hangs = trouble != "dead", True
    async with asyncio.timeout(CHECK_SECONDS + 2):
        assert await api.submit() == 0


async def test_an_accepted_key_keeps_its_answer(api: RunningApp, engine: ScriptedEngine) -> None:
    """A submission that was accepted under a key is answered with its ids, whatever the engine
    says of it later; another body under that key is refused."""
    headers, body = {"Idempotency-Key": "one"}, {"prompt": "a"}
    first = await api.client.post("/v1/generate", json=body, headers=headers)
    assert first.status_code == 200
    engine.check_results["a"] = engine.check_results["b"] = CheckResult("steps: too few")
    engine.end()
    api.monitor.request_probe()
    await until(lambda: not api.monitor.state.ok)
    engine.start()
    await until(lambda: api.monitor.state.ok)

    again = await api.client.post("/v1/generate", json=body, headers=headers)
    assert (again.status_code, again.json()) == (200, first.json())
    for other, headers_ in (({"prompt": "b"}, headers), (body, {"Idempotency-Key": "two"})):
        refused = await api.client.post("/v1/generate", json=other, headers=headers_)
        assert refused.status_code == 422
