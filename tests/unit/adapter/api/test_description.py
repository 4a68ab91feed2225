"""Health and the API's description, through the front door."""

import asyncio
import inspect
from collections.abc import Iterator
from typing import Any

import jsonschema_rs
import pytest
from adapter_fakes import (
    RunningApp,
    ScriptedEngine,
    fast_settings,
    running_app,
    until,
)
from fastapi.dependencies.models import Dependant
from fastapi.routing import APIRoute, iter_route_contexts


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
        "/v1/decisions",
        "/v1/score",
        "/v1/responses",
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


TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]


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
        ("/v1/generate", A_PROMPT | {"tools": TOOLS}),
        ("/v1/generate", A_PROMPT | {"tools": TOOLS, "raw": True}),
        ("/v1/generate", {"messages": A_CHAT, "tools": TOOLS}),
        ("/v1/generate", {"input_ids": [1], "tools": TOOLS}),
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
