"""The OpenAI calls, through OpenAI's own client and beneath it."""

import asyncio
import hashlib
import json
import re
from collections.abc import AsyncIterator
from typing import Any

import httpx
import openai
import pytest
from adapter_fakes import (
    DONE,
    HANG,
    WAITING,
    ScriptedEngine,
    denoising,
    fast_settings,
    served_app,
    until,
)
from openai import AsyncOpenAI

from adapter.errors import EngineFailure, InvalidRequest, Overloaded
from adapter.types import Event, StreamDetail, Usage

CHAT = "/chat/completions"
TEXT = "/completions"
QUESTION: Any = [{"role": "user", "content": "What is AI?"}]


@pytest.fixture
def engine() -> ScriptedEngine:
    """An engine that writes four pieces."""
    return ScriptedEngine([list(denoising(4))])


@pytest.fixture
async def url(database_url: str, engine: ScriptedEngine) -> AsyncIterator[str]:
    """A worker that is ready, behind a real socket."""
    settings = fast_settings(database_url, heartbeat_interval=0.02, engine_idle_timeout=10)
    async with served_app(settings, engine) as address:
        await until_healthy(address)
        yield address


async def until_healthy(url: str) -> None:
    """Wait for the worker's first look at the engine."""
    async with httpx.AsyncClient() as http, asyncio.timeout(10):
        while (await http.get(f"{url}/v1/health")).status_code != 200:
            await asyncio.sleep(0.005)


@pytest.fixture
async def client(url: str) -> AsyncIterator[AsyncOpenAI]:
    """OpenAI's client, which makes each call once."""
    async with AsyncOpenAI(base_url=f"{url}/v1", api_key="-", max_retries=0) as opened:
        yield opened


async def post(url: str, path: str, body: Any) -> httpx.Response:
    """A call as anybody can make it."""
    content = body if isinstance(body, str) else json.dumps(body)
    headers = {"Content-Type": "application/json"}
    async with httpx.AsyncClient() as http:
        return await http.post(f"{url}/v1{path}", content=content, headers=headers, timeout=10)


async def test_chat_completion(client: AsyncOpenAI, engine: ScriptedEngine) -> None:
    """A conversation goes to the engine as messages; the answer has text, reason and usage."""
    answer = await client.chat.completions.create(model="dllm", messages=QUESTION)

    (choice,) = answer.choices
    assert choice.message.content == "<0><1><2><3>"
    assert choice.message.role == "assistant"
    assert choice.finish_reason == "length"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (3, 4)
    assert answer.usage.total_tokens == 7
    assert answer.model == "dllm"
    assert answer.id.startswith("chatcmpl-")
    assert engine.requests == [
        {
            "temperature": 0.0,
            "gen_length": 128,
            "messages": '[{"role": "user", "content": "What is AI?"}]',
        }
    ]
    assert engine.details == [StreamDetail.RESULT]


async def test_parameters_reach_the_engine(client: AsyncOpenAI, engine: ScriptedEngine) -> None:
    """OpenAI's names and, in extra_body, those of diffusion become the engine's inputs."""
    await client.chat.completions.create(
        model="dllm",
        messages=QUESTION,
        max_completion_tokens=64,
        temperature=0.5,
        top_p=0.9,
        seed=11,
        stop=["END", "STOP"],
        extra_body={
            "steps": 16,
            "block_length": 16,
            "cache": "dual",
            "confidence_threshold": 0.9,
            "top_k": 5,
            "ignore_eos": True,
            "priority": 1,
        },
    )

    (request,) = engine.requests
    assert json.loads(str(request["messages"])) == QUESTION
    assert {name: value for name, value in request.items() if name != "messages"} == {
        "gen_length": 64,
        "temperature": 0.5,
        "top_p": 0.9,
        "seed": 11,
        "stop": ["END", "STOP"],
        "steps": 16,
        "block_length": 16,
        "cache": "dual",
        "confidence_threshold": 0.9,
        "top_k": 5,
        "ignore_eos": True,
    }
    assert engine.priorities == [1]


async def test_messages_in_parts(client: AsyncOpenAI, engine: ScriptedEngine) -> None:
    """Text parts are joined, a developer speaks as the system, and old answers may be sent back."""
    first = await client.chat.completions.create(model="dllm", messages=QUESTION)
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    messages: Any = [
        {"role": "developer", "content": "be brief"},
        first.choices[0].message,
        {"role": "user", "content": parts},
    ]
    await client.chat.completions.create(model="dllm", messages=messages, stop=[])

    assert json.loads(str(engine.requests[1]["messages"])) == [
        {"role": "system", "content": "be brief"},
        {"role": "assistant", "content": "<0><1><2><3>"},
        {"role": "user", "content": "one\ntwo"},
    ]
    assert "stop" not in engine.requests[1]


async def test_chat_stream(client: AsyncOpenAI, engine: ScriptedEngine) -> None:
    """A stream brings the role, the text piece by piece, the reason and, if asked, the usage."""
    stream = await client.chat.completions.create(
        model="dllm", messages=QUESTION, stream=True, stream_options={"include_usage": True}
    )
    *chunks, last = [chunk async for chunk in stream]

    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == "<0><1><2><3>"
    assert [chunk.choices[0].finish_reason for chunk in chunks][-2:] == [None, "length"]
    assert all(chunk.usage is None for chunk in chunks)
    assert last.choices == []
    assert last.usage is not None
    assert last.usage.total_tokens == 7
    assert len({chunk.id for chunk in [*chunks, last]}) == 1
    assert engine.details == [StreamDetail.TEXT]


async def test_only_what_is_final_is_streamed(url: str, engine: ScriptedEngine) -> None:
    """A step that finishes nothing from the left sends no text."""
    gap = [Event("a", usage=Usage(1, 1, n, n), seed=1) for n in (1, 2, 3)]
    engine.scripts = [[*gap, Event("ab", "stop", Usage(1, 2, 4, 4), 1)]]
    body = {"model": "dllm", "messages": QUESTION, "stream": True}
    lines = (await post(url, "/chat/completions", body)).text.split("\n\n")

    sent = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    deltas = [chunk["choices"][0]["delta"] for chunk in sent]
    assert deltas in (
        [{"role": "assistant", "content": ""}, {"content": "a"}, {"content": "b"}, {}],
        [{"role": "assistant", "content": ""}, {"content": "ab"}, {}],
    )
    assert all("usage" not in chunk for chunk in sent)
    assert [line for line in lines if line][-1] == "data: [DONE]"


async def test_steps_without_text_are_silence_too(url: str, engine: ScriptedEngine) -> None:
    """Comments are sent while steps bring nothing that may be shown, such as of one that waits."""
    ticks = [asyncio.Event() for _ in range(8)]
    loop = asyncio.get_running_loop()
    for number, tick in enumerate(ticks):
        loop.call_later(0.08 * (number + 1), tick.set)
    nothing = Event("", usage=Usage(1, 0, 1, 1), seed=1)
    engine.scripts = [[item for tick in ticks for item in (WAITING, nothing, tick)] + [DONE]]
    text = (await post(url, TEXT, {"model": "dllm", "prompt": "a", "stream": True})).text

    assert text.count(": ping\n\n") >= 2
    assert text.endswith("data: [DONE]\n\n")


async def test_silence_of_a_stream_is_filled_with_comments(
    url: str, engine: ScriptedEngine
) -> None:
    """While the engine says nothing the stream stays alive; a timeout ends it with its reason."""
    engine.scripts = [[Event("a", usage=Usage(1, 1, 1, 1), seed=1), HANG]]
    body = {"model": "dllm", "prompt": ["a", "b"], "stream": True, "timeout": 0.3}
    text = (await post(url, TEXT, body)).text

    assert text.count(": ping\n\n") >= 2
    last = text.strip().split("\n\n")[-1]
    assert "timeout of 0.3 s" in json.loads(last.removeprefix("data: "))["error"]["message"]
    assert "[DONE]" not in text
    await until(lambda: engine.closed == 2)


@pytest.mark.parametrize(
    ("prompt", "inputs"),
    [
        ("one", [{"text_input": "one"}]),
        (["one", "two"], [{"text_input": "one"}, {"text_input": "two"}]),
        ([1, 2, 3], [{"input_ids": [1, 2, 3]}]),
        ([[1, 2], [3]], [{"input_ids": [1, 2]}, {"input_ids": [3]}]),
    ],
)
async def test_prompts_of_a_completion(
    client: AsyncOpenAI, engine: ScriptedEngine, prompt: Any, inputs: list[dict[str, Any]]
) -> None:
    """Texts are passed as they are, token ids as such; each prompt has its choice."""
    engine.scripts = [[Event(f"answer {n}", "stop", Usage(3, n, 1, 1), 7)] for n in (1, 2)]
    answer = await client.completions.create(model="dllm", prompt=prompt)

    common = {"temperature": 0.0, "gen_length": 16}
    assert engine.requests == [common | one for one in inputs]
    count = len(inputs)
    assert [choice.text for choice in answer.choices] == ["answer 1", "answer 2"][:count]
    assert [choice.index for choice in answer.choices] == list(range(count))
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == 3 * count
    assert answer.usage.completion_tokens == (1, 3)[count - 1]


async def test_completion_fills_a_gap(client: AsyncOpenAI, engine: ScriptedEngine) -> None:
    """`suffix` is what stands behind the text that is asked for."""
    await client.completions.create(model="dllm", prompt="a", suffix="c", max_tokens=5)

    assert engine.requests == [
        {"temperature": 0.0, "gen_length": 5, "text_input": "a", "suffix": "c"}
    ]


async def test_stream_of_several_prompts(client: AsyncOpenAI, engine: ScriptedEngine) -> None:
    """Chunks of all prompts come as they are ready, each with its prompt's number."""
    engine.scripts = [list(denoising(3)), list(denoising(5))]
    stream = await client.completions.create(
        model="dllm", prompt=["a", "b"], stream=True, stream_options={"include_usage": True}
    )
    texts, reasons = ["", ""], [None, None]
    async for chunk in stream:
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            reasons[choice.index] = choice.finish_reason  # type: ignore[call-overload]

    assert texts == ["<0><1><2>", "<0><1><2><3><4>"]
    assert reasons == ["length", "length"]
    assert chunk.usage is not None
    assert (chunk.usage.prompt_tokens, chunk.usage.completion_tokens) == (6, 8)


async def test_models(client: AsyncOpenAI) -> None:
    """The model can be listed and looked up; another is not found."""
    assert [model.id async for model in client.models.list()] == ["dllm"]
    assert (await client.models.retrieve("dllm")).id == "dllm"
    for call in (
        client.models.retrieve("gpt-4o"),
        client.chat.completions.create(model="gpt-4o", messages=QUESTION),
        client.completions.create(model="org/gpt-4o", prompt="a"),
    ):
        with pytest.raises(openai.NotFoundError) as caught:
            await call
        assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


async def test_model_has_the_name_it_is_served_under(
    database_url: str, engine: ScriptedEngine
) -> None:
    """Clients with a fixed model name can be served under that."""
    settings = fast_settings(database_url, served_model_name="llada/8b")
    async with (
        served_app(settings, engine) as address,
        AsyncOpenAI(base_url=f"{address}/v1", api_key="-") as client,
    ):
        assert [model.id async for model in client.models.list()] == ["llada/8b"]
        assert (await client.models.retrieve("llada/8b")).id == "llada/8b"


REFUSED: list[tuple[str, dict[str, Any], str, str]] = [
    (CHAT, {"n": 2}, "n", "not supported"),
    (CHAT, {"logprobs": True}, "logprobs", "not supported"),
    (CHAT, {"top_logprobs": 3}, "top_logprobs", "not supported"),
    (CHAT, {"tools": [{"type": "function"}]}, "tools", "not supported"),
    (CHAT, {"tool_choice": "required"}, "tool_choice", "not supported"),
    (CHAT, {"response_format": {"type": "json_object"}}, "response_format", "not supported"),
    (CHAT, {"frequency_penalty": 0.5}, "frequency_penalty", "not supported"),
    (CHAT, {"presence_penalty": -1}, "presence_penalty", "not supported"),
    (CHAT, {"logit_bias": {"1": 5}}, "logit_bias", "not supported"),
    (CHAT, {"reasoning_effort": "high"}, "reasoning_effort", "not supported"),
    (CHAT, {"store": True}, "store", "not supported"),
    (CHAT, {"min_p": 0.1}, "min_p", "not permitted"),
    (CHAT, {"gen_length": 5}, "gen_length", "not permitted"),
    (CHAT, {"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
    (CHAT, {"max_tokens": 513}, "max_tokens", "less than or equal to 512"),
    (CHAT, {"max_completion_tokens": 513}, "max_completion_tokens", "less than or equal to 512"),
    (CHAT, {"max_tokens": 513, "max_completion_tokens": 513}, "max_completion_tokens", "512"),
    (CHAT, {"temperature": 2.5}, "temperature", "less than or equal to 2"),
    (CHAT, {"top_p": 0}, "top_p", "greater than 0"),
    (CHAT, {"stop": ["x"] * 17}, "stop", "at most 16"),
    (CHAT, {"seed": 1.5}, "seed", "valid integer"),
    (CHAT, {"messages": []}, "messages", "at least 1 item"),
    (CHAT, {"messages": [{"role": "tool", "content": "a"}]}, "messages.0.role", "'user'"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
     "messages.0.content.0.type", "'text'"),
    (CHAT, {"messages": [{"role": "user", "content": "x" * 4097}]}, "messages", "4096"),
    (CHAT, {"stream_options": {"include_usage": True}}, "", "only with stream"),
    (CHAT, {"max_tokens": 5, "max_completion_tokens": 6}, "", "must be equal"),
    (CHAT, {"block_length": 129}, "block_length", "less than or equal to 128"),
    (TEXT, {"best_of": 2}, "best_of", "not supported"),
    (TEXT, {"echo": True}, "echo", "not supported"),
    (TEXT, {"logprobs": 0}, "logprobs", "not supported"),
    (TEXT, {"prompt": ""}, "prompt", "at least 1 character"),
    (TEXT, {"prompt": []}, "prompt", "Should be a string"),
    (TEXT, {"prompt": 5}, "prompt", "Should be a string"),
    (TEXT, {"prompt": ["a", 5]}, "prompt.1", "valid string"),
    (TEXT, {"prompt": ["a"] * 65}, "prompt", "at most 64"),
    (TEXT, {"prompt": [-1]}, "prompt.0", "greater than or equal to 0"),
]  # fmt: skip


async def test_what_cannot_be_honoured_is_refused_by_name(url: str, engine: ScriptedEngine) -> None:
    """A parameter that is wrong, or that is not offered, is a 400 with its name and the reason."""
    for path, fields, param, reason in REFUSED:
        body = {"model": "dllm"} | ({"messages": QUESTION} if path == CHAT else {"prompt": "a"})
        answer = await post(url, path, body | fields)

        assert answer.status_code == 400, fields
        error = answer.json()["error"]
        assert error["type"] == "invalid_request_error", fields
        assert error["param"] == (param or None), fields
        assert reason in error["message"], fields
    assert engine.requests == []


async def test_values_that_ask_for_nothing_are_accepted(url: str) -> None:
    """A value that means the same as leaving the parameter out is accepted."""
    chat = {
        "n": 1, "frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {},
        "logprobs": False, "top_logprobs": None, "tools": [], "tool_choice": "none",
        "response_format": {"type": "text"}, "stream": False, "user": "me", "store": False,
        "max_tokens": None, "temperature": None, "top_p": 1, "seed": None, "stop": None,
        "parallel_tool_calls": True, "metadata": {}, "service_tier": "auto", "modalities": ["text"],
    }  # fmt: skip
    text = {"best_of": 1, "echo": False, "logprobs": None, "n": 1, "suffix": None}

    first = await post(url, CHAT, {"model": "dllm", "messages": QUESTION} | chat)
    second = await post(url, TEXT, {"model": "dllm", "prompt": "a"} | text)
    assert (first.status_code, second.status_code) == (200, 200), first.text + second.text


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
    async with served_app(fast_settings(database_url, max_live=1), engine) as address:
        await until_healthy(address)
        answer = await post(address, TEXT, {"model": "dllm", "prompt": ["a", "b"]})
        assert answer.status_code == 429
        assert answer.headers["retry-after"] == "1"
        assert answer.json()["error"]["code"] == "rate_limit_exceeded"
        await until(lambda: engine.closed == len(engine.requests))

        engine.scripts = [[DONE]]
        answer = await post(address, TEXT, {"model": "dllm", "prompt": "a"})
        assert answer.json()["choices"][0]["text"] == "an answer"
