"""Several models behind one API: `model` chooses, and each is on its own."""

import asyncio
from collections.abc import AsyncIterator

import pytest
from adapter_fakes import (
    HANG,
    SIGN_OF_LIFE,
    RunningApp,
    ScriptedEngine,
    fast_settings,
    running_app,
    until,
)

from adapter.errors import Unavailable
from adapter.types import Event, ModelInfo, Repository, Usage

DATABASES = ("sqlite",)
USAGE = Usage(3, 32, 32, 32, 2)


@pytest.fixture
def llada() -> ScriptedEngine:
    models = Repository(("dllm", "dream"))
    return ScriptedEngine([[Event("by llada", "stop", USAGE, 7)]], models=models)


@pytest.fixture
def dream() -> ScriptedEngine:
    model = ModelInfo(family="dream", max_model_len=2048)
    return ScriptedEngine([[Event("by dream", "stop", USAGE, 7)]], model=model)


@pytest.fixture
async def api(
    database_url: str, llada: ScriptedEngine, dream: ScriptedEngine
) -> AsyncIterator[RunningApp]:
    """A server with the models `dllm`, the default, and `dream`."""
    settings = fast_settings(
        database_url, max_inflight=2, max_queued_jobs=3, max_live=1, engine_idle_timeout=5
    )
    async with running_app(settings, {"a:1": llada, "a:1/dream": dream}) as running:
        await until(lambda: all(pool.state.ok for pool in running.app.state.fleet.pools))
        yield running


async def test_models_are_listed_with_family_and_context(api: RunningApp) -> None:
    """The default is the first; each says what its engine says."""
    listed = (await api.client.get("/v1/models")).json()["data"]
    assert [(m["id"], m["family"], m["max_model_len"]) for m in listed] == [
        ("dllm", "llada", 512),
        ("dream", "dream", 2048),
    ]
    one = await api.client.get("/v1/models/dream")
    assert one.json()["family"] == "dream"


@pytest.mark.parametrize(("model", "expected"), [("dream", "by dream"), ("dllm", "by llada")])
async def test_model_chooses_in_every_call(
    api: RunningApp, llada: ScriptedEngine, dream: ScriptedEngine, model: str, expected: str
) -> None:
    """Jobs, batches, streams and OpenAI's calls go to the model that they name."""
    job = await api.submit(model=model)
    assert (await api.result(job))["text"] == expected
    body = {"prompts": ["a", "b"], "model": model}
    ids = (await api.client.post("/v1/generate_batch", json=body)).json()["request_ids"]
    assert [(await api.result(job))["text"] for job in ids] == [expected] * 2
    engine = {"dllm": llada, "dream": dream}[model]
    before = len(engine.requests)
    await api.client.post("/v1/generate/stream", json={"prompt": "a", "model": model})
    assert len(engine.requests) == before + 1
    body = {"prompt": "a", "model": model}
    answer = (await api.client.post("/v1/completions", json=body)).json()
    assert (answer["model"], answer["choices"][0]["text"]) == (model, expected)
    body = {"messages": [{"role": "user", "content": "a"}], "model": model}
    answer = (await api.client.post("/v1/chat/completions", json=body)).json()
    assert (answer["model"], answer["choices"][0]["message"]["content"]) == (model, expected)


async def test_calls_that_name_no_model_get_the_default(
    api: RunningApp, dream: ScriptedEngine
) -> None:
    """Without `model` nothing changes."""
    assert (await api.result(await api.submit()))["text"] == "by llada"
    assert dream.requests == []


@pytest.mark.parametrize("path", ["generate", "generate/stream"])
async def test_unknown_models_are_named_with_those_known(api: RunningApp, path: str) -> None:
    """A name that no server has is a 404 that lists the models."""
    answer = await api.client.post(f"/v1/{path}", json={"prompt": "a", "model": "gpt"})
    expected = "the model 'gpt' does not exist; this server has 'dllm', 'dream'"
    assert (answer.status_code, answer.json()["detail"]) == (404, expected)


async def test_a_model_that_is_away_is_away_for_its_own_calls(
    api: RunningApp, llada: ScriptedEngine, dream: ScriptedEngine
) -> None:
    """Its streams are 503 and its jobs wait; the other model goes on, and health stays 200."""
    dream.probe_error = Unavailable("loading")
    dream.scripts = [[Unavailable("loading")]]
    pool = api.app.state.fleet.find("dream")
    await until(lambda: not pool.state.ok)
    answer = await api.client.post("/v1/generate/stream", json={"prompt": "a", "model": "dream"})
    assert (answer.status_code, answer.json()["detail"]) == (503, "loading")
    waiting = await api.submit(model="dream")

    assert (await api.result(await api.submit()))["text"] == "by llada"
    status, health = await api.health()
    assert (status, health["models"]["dream"]) == (
        200,
        {"status": "unavailable", "reason": "loading"},
    )
    assert health["models"]["dllm"] == {"status": "ok"}
    assert (await api.result(waiting, wait=0))["status"] == "running"

    dream.probe_error, dream.scripts = None, [[Event("by dream", "stop", USAGE, 7)]]
    assert (await api.result(waiting))["text"] == "by dream"
    assert len(llada.requests) == 1


async def test_limits_are_of_each_model(api: RunningApp, llada: ScriptedEngine) -> None:
    """Jobs that run, jobs that wait and streams of one model leave no less room for the other."""
    llada.scripts = [[SIGN_OF_LIFE, HANG]]
    for _ in range(2 + 3):
        await api.submit()
        await asyncio.sleep(0.05)
    refused = await api.client.post("/v1/generate", json={"prompt": "a"})
    assert refused.status_code == 429
    body = {"prompt": "a", "model": "dllm"}
    call = asyncio.create_task(api.client.post("/v1/completions", json=body))
    await until(lambda: len(llada.requests) == 3)
    assert (await api.client.post("/v1/completions", json=body)).status_code == 429

    body["model"] = "dream"
    assert (await api.client.post("/v1/completions", json=body)).status_code == 200
    assert (await api.result(await api.submit(model="dream")))["text"] == "by dream"
    llada.end()
    await call


async def test_last_attempt_waits_for_no_model_that_is_away(
    api: RunningApp, dream: ScriptedEngine
) -> None:
    """A last attempt runs alone; but while its model is away, others' jobs are run."""
    dream.scripts = [[SIGN_OF_LIFE, Unavailable("died")]]
    job = await api.submit(model="dream")
    await until(lambda: len(dream.requests) >= 2)
    dream.probe_error = Unavailable("away")
    await until(lambda: not api.app.state.fleet.find("dream").state.ok)
    assert (await api.result(await api.submit()))["text"] == "by llada"
    dream.probe_error = None
    assert (await api.result(job, wait=20))["status"] == "failed"


async def test_metrics_tell_models_apart(api: RunningApp) -> None:
    """What a model does is counted under its name."""
    await api.result(await api.submit(model="dream"))
    page = (await api.client.get("/metrics")).text
    assert 'dllm_adapter_jobs_submitted_total{model="dream"}' in page
    assert 'dllm_adapter_engine_ready{engine="a:1",model="dream"} 1.0' in page
    assert 'dllm_adapter_jobs{model="dream",state="queued"} 0.0' in page


async def test_a_key_repeats_a_submission_to_the_same_model(api: RunningApp) -> None:
    """The same body for another model is another submission."""
    headers = {"Idempotency-Key": "k"}
    body = {"prompt": "a", "model": "dream"}
    first, again = [
        (await api.client.post("/v1/generate", json=body, headers=headers)).json() for _ in range(2)
    ]
    assert first == again
    other = await api.client.post("/v1/generate", json={"prompt": "a"}, headers=headers)
    assert other.status_code == 422
