"""Errors of OpenAI's calls, unknown paths, keys, and calls that end early."""

import asyncio
import hashlib
import re
from typing import Any

import httpx
import openai
import pytest
from adapter_fakes import (
    DONE,
    HANG,
    ScriptedEngine,
    denoising,
    fast_settings,
    served_app,
    until,
)
from openai import AsyncOpenAI
from openai_calls import CHAT, QUESTION, TEXT, post, until_healthy

from adapter.errors import (
    EngineFailure,
    InvalidRequest,
    Overloaded,
)


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/responses/resp_1"),
        ("POST", "/v1/embeddings"),
        ("GET", "/v1/files"),
        ("POST", "/v1/chat/completions/x"),
        ("GET", "/v1//nothing"),
        ("POST", "/v1/chat//x"),
    ],
)
async def test_unknown_path_names_what_is_offered(url: str, method: str, path: str) -> None:
    """A 404 below /v1 has OpenAI's shape, blames no model, and says which paths there are."""
    async with httpx.AsyncClient() as http:
        answer = await http.request(method, f"{url}{path}", json={"model": "dllm"})

    assert answer.status_code == 404
    error = answer.json()["error"]
    assert (error["type"], error["code"]) == ("invalid_request_error", None)
    assert error["message"] == (
        f"{method} {path} is not offered here; /v1/chat/completions, /v1/completions, "
        "/v1/responses, /v1/decisions, /v1/score and /v1/models are"
    )


@pytest.mark.parametrize(
    ("sent", "right"),
    [
        ("//v1/chat/completions", "/v1/chat/completions"),
        ("/v1//chat/completions", "/v1/chat/completions"),
        ("/v1/chat/completions/", "/v1/chat/completions"),
        ("/v1/models/", "/v1/models"),
        ("/v1//models?a=1", "/v1/models?a=1"),
        ("/v1/generate//", "/v1/generate"),
        ("//v1/health", "/v1/health"),
    ],
)
async def test_slash_too_many_is_redirected(url: str, sent: str, right: str) -> None:
    """A path with slashes too many leads to the path without, with the same method and body."""
    method = "GET" if "models" in sent else "POST"
    async with httpx.AsyncClient() as http:
        answer = await http.request(method, f"{url}{sent}", json={})

    assert answer.status_code == 307
    # Without scheme and host: behind a proxy, this server does not know them.
    assert answer.headers["location"] == right


async def test_base_url_may_end_in_a_slash(url: str) -> None:
    """OpenAI's client follows, so its answer is the same."""
    async with AsyncOpenAI(base_url=f"{url}//v1/", api_key="-", max_retries=0) as client:
        answer = await client.chat.completions.create(model="dllm", messages=QUESTION)
        assert answer.choices[0].message.content == "<0><1><2><3>"
        assert [model.id async for model in client.models.list()] == ["dllm"]


@pytest.mark.parametrize(
    "path",
    ["/", "/v1/health", "/v1/livez", "/v1/models", "/v1/models/dllm", "/metrics", "/v1/result/9"],
)
async def test_head_is_get_without_the_body(url: str, path: str) -> None:
    """HEAD is answered wherever GET is, with the same status and type, and no body."""
    async with httpx.AsyncClient() as http:
        head, get = await http.head(f"{url}{path}"), await http.get(f"{url}{path}")
        posted = await http.head(f"{url}/v1/generate")

    assert head.status_code == get.status_code
    assert head.headers["content-type"] == get.headers["content-type"]
    assert head.content == b""
    assert posted.status_code == 405


@pytest.mark.parametrize(
    ("error", "kind", "shown"),
    [
        (
            InvalidRequest("gen_length: prompt (9 tokens) plus gen_length (16) must be at most 20"),
            openai.BadRequestError,
            "max_tokens: prompt (9 tokens) plus max_tokens (16) must be at most 20",
        ),
        (Overloaded("exceeds maximum queue size"), openai.RateLimitError, "maximum queue size"),
        (EngineFailure("it broke"), openai.InternalServerError, "it broke"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_engines_errors_have_openais_shape(
    client: AsyncOpenAI,
    engine: ScriptedEngine,
    error: Exception,
    kind: type[openai.APIStatusError],
    shown: str,
    stream: bool,
) -> None:
    """The engine's errors have OpenAI's names and statuses."""
    engine.scripts = [[error]]
    with pytest.raises(kind, match=re.escape(shown)) as caught:
        await client.completions.create(model="dllm", prompt="a", stream=stream)

    if kind is openai.BadRequestError:
        assert caught.value.param == "max_tokens"


@pytest.mark.parametrize("sent", ["max_tokens", "max_completion_tokens"])
async def test_engine_is_quoted_with_the_name_that_was_sent(
    url: str, engine: ScriptedEngine, sent: str
) -> None:
    """An error about the length uses the name that the caller sent."""
    engine.scripts = [[InvalidRequest("gen_length: plus gen_length (16) must be at most 20")]]
    for stream in (False, True):
        body = {"model": "dllm", "messages": QUESTION, sent: 16, "stream": stream}
        error = (await post(url, CHAT, body)).json()["error"]
        assert error["message"] == f"{sent}: plus {sent} (16) must be at most 20"
        assert error["param"] == sent


async def test_late_call_is_not_repeated_by_the_client(url: str, engine: ScriptedEngine) -> None:
    """OpenAI's client makes a call again that was answered 408, which would be as late."""
    engine.scripts = [[HANG]]
    async with AsyncOpenAI(base_url=f"{url}/v1", api_key="-") as persistent:
        with pytest.raises(openai.APIStatusError, match="not done within the timeout") as caught:
            await persistent.completions.create(
                model="dllm", prompt="a", extra_body={"timeout": 0.1}
            )
    assert caught.value.status_code == 408
    assert len(engine.requests) == 1


async def test_error_in_a_stream_is_raised_by_the_client(
    client: AsyncOpenAI, engine: ScriptedEngine
) -> None:
    """A stream that breaks says why; the text before it has arrived."""
    engine.scripts = [[*denoising(4)[:2], EngineFailure("it broke")]]
    stream = await client.chat.completions.create(model="dllm", messages=QUESTION, stream=True)
    texts: list[str] = []
    with pytest.raises(openai.APIError, match="it broke"):
        await _collect(stream, texts)
    assert "".join(texts) == "<0><1>"


async def _collect(stream: Any, texts: list[str]) -> None:
    async for chunk in stream:
        texts.append(chunk.choices[0].delta.content or "")


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("GET", "/v1/completions", None, 405),
        ("POST", "/v1/models", None, 405),
        ("POST", "/v1/chat/completions", "{", 400),
        ("POST", "/v1/completions", '{"model": "\\ud800"}', 400),
    ],
)
async def test_every_error_of_these_calls_has_openais_shape(
    url: str, method: str, path: str, body: str | None, status: int
) -> None:
    """Errors on OpenAI's paths have OpenAI's format; those of other paths keep theirs."""
    headers = {"Content-Type": "application/json"}
    async with httpx.AsyncClient() as http:
        answer = await http.request(method, url + path, content=body, headers=headers)
        ours = await http.request("PUT", f"{url}/v1/generate")

    assert answer.status_code == status
    assert answer.json()["error"].keys() == {"message", "type", "param", "code"}
    assert ours.json() == {"detail": "Method Not Allowed"}


async def test_defects_of_ours_have_openais_shape(
    client: AsyncOpenAI, engine: ScriptedEngine
) -> None:
    """An unexpected error is a 500 in the format of the call, without its details."""
    engine.scripts = [[RuntimeError("secret")]]
    with pytest.raises(openai.InternalServerError, match="internal error of the adapter") as caught:
        await client.completions.create(model="dllm", prompt="a")
    assert "secret" not in str(caught.value)


async def test_keys_and_rates_hold_for_these_calls(
    database_url: str, engine: ScriptedEngine
) -> None:
    """A key is asked for as OpenAI's clients send it, and refusals are errors that they know."""
    digest = hashlib.sha256(b"the key").hexdigest()
    settings = fast_settings(database_url, api_keys=f"me:{digest}", rate_limit="1/hour")
    async with served_app(settings, engine) as address:
        await until_healthy(address)
        base = f"{address}/v1"
        async with AsyncOpenAI(base_url=base, api_key="another", max_retries=0) as stranger:
            with pytest.raises(openai.AuthenticationError) as refused:
                await stranger.models.list()
            assert refused.value.code == "invalid_api_key"
        async with AsyncOpenAI(base_url=base, api_key="the key", max_retries=0) as friend:
            answer = await friend.completions.create(model="dllm", prompt="a")
            assert answer.choices[0].text == "<0><1><2><3>"
            assert answer._request_id
            with pytest.raises(openai.RateLimitError) as limited:
                await friend.completions.create(model="dllm", prompt="a")
            assert limited.value.code == "rate_limit_exceeded"


@pytest.mark.parametrize("stream", [False, True])
async def test_hanging_up_cancels(
    client: AsyncOpenAI, engine: ScriptedEngine, stream: bool
) -> None:
    """A caller who gives up frees every place that the call had in the engine."""
    engine.scripts = [[HANG]]
    with pytest.raises(openai.APITimeoutError):
        await client.completions.create(model="dllm", prompt=["a", "b"], stream=stream, timeout=0.2)

    await until(lambda: engine.closed == 2)


async def test_prompts_begin_together_or_not_at_all(
    database_url: str, engine: ScriptedEngine
) -> None:
    """A call whose prompts do not all find a place is told to come back, and has begun none."""
    engine.scripts = [[HANG]]
    settings = fast_settings(database_url, max_live=2, engine_idle_timeout=10)
    async with served_app(settings, engine) as address:
        await until_healthy(address)
        other = asyncio.create_task(post(address, TEXT, {"model": "dllm", "prompt": "a"}))
        await until(lambda: len(engine.requests) == 1)
        answer = await post(address, TEXT, {"model": "dllm", "prompt": ["a", "b"]})
        assert answer.status_code == 429
        assert answer.headers["retry-after"] == "1"
        assert answer.json()["error"]["code"] == "rate_limit_exceeded"
        other.cancel()
        await until(lambda: engine.closed == len(engine.requests) == 1)

        engine.scripts = [[DONE]]
        answer = await post(address, TEXT, {"model": "dllm", "prompt": "a"})
        assert answer.json()["choices"][0]["text"] == "an answer"
