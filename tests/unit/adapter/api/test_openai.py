"""The OpenAI calls, through OpenAI's own client and beneath it."""

import asyncio
import hashlib
import json
import re
from collections.abc import AsyncIterator
from dataclasses import asdict
from typing import Any

import httpx
import openai
import pytest
from adapter_fakes import (
    DONE,
    HANG,
    MODEL,
    WAITING,
    ScriptedEngine,
    denoising,
    fast_settings,
    running_app,
    served_app,
    until,
)
from openai import AsyncOpenAI

from adapter.errors import (
    AdapterError,
    EngineFailure,
    InvalidRequest,
    Overloaded,
    Unavailable,
)
from adapter.types import CheckResult, Event, StreamDetail, Usage

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


async def test_model_says_what_the_engine_serves(database_url: str, engine: ScriptedEngine) -> None:
    """Family and sizes come from the engine, which is asked once for each start."""
    async with running_app(fast_settings(database_url), engine) as api:
        assert list((await api.client.get("/v1/models/dllm")).json()) == [
            "id",
            "object",
            "created",
            "owned_by",
        ]
        await until(lambda: api.monitor.state.ok)
        for _ in range(2):
            (model,) = (await api.client.get("/v1/models")).json()["data"]
            assert model == (await api.client.get("/v1/models/dllm")).json()
            assert model.items() >= asdict(MODEL).items()
        assert engine.described == 1
        engine.end()
        await until(lambda: not api.monitor.state.ok)
        assert "family" not in (await api.client.get("/v1/models/dllm")).json()
        engine.start()
        await until(lambda: api.monitor.state.ok)
        assert (await api.client.get("/v1/models/dllm")).json()["family"] == "llada"
        assert engine.described == 2


@pytest.mark.parametrize("error", [EngineFailure("unexpected inference input"), Unavailable("")])
async def test_models_are_listed_when_the_engine_does_not_describe_its_own(
    database_url: str, engine: ScriptedEngine, error: AdapterError
) -> None:
    """An engine of an earlier release knows no such question; its model still has a name."""
    engine.model = error
    async with running_app(fast_settings(database_url), engine) as api:
        await until(lambda: api.monitor.state.ok)
        (model,) = (await api.client.get("/v1/models")).json()["data"]
        assert (model["id"], "family" in model) == ("dllm", False)


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
    (CHAT, {"min_p": 0.1}, "min_p", "not supported"),
    (CHAT, {"repetition_penalty": 1.1}, "repetition_penalty", "not supported"),
    (CHAT, {"min_tokens": 5}, "min_tokens", "not supported"),
    (CHAT, {"top_k": False}, "top_k", "valid integer"),
    (CHAT, {"verbosity": "low"}, "verbosity", "not supported"),
    (CHAT, {"chat_template_kwargs": {"enable_thinking": True}}, "chat_template_kwargs",
     "not supported"),
    (CHAT, {"unknown": 0}, "unknown", "not permitted"),
    (CHAT, {"tools": [{"type": "function"}], "tool_choice": "auto"}, "tools",
     "send tool_choice 'none' with it"),
    (CHAT, {"functions": [{"name": "a"}]}, "functions", "send function_call 'none' with it"),
    (CHAT, {"gen_length": 5}, "gen_length", "not permitted"),
    (CHAT, {"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
    (CHAT, {"temperature": 2.5}, "temperature", "less than or equal to 2"),
    (CHAT, {"top_p": 0}, "top_p", "greater than 0"),
    (CHAT, {"stop": ["x"] * 17}, "stop", "at most 16"),
    (CHAT, {"seed": 1.5}, "seed", "valid integer"),
    (CHAT, {"messages": []}, "messages", "at least 1 item"),
    (CHAT, {"messages": None}, "messages", "Field required"),
    (CHAT, {"messages": [{"role": "tool", "content": "a"}]}, "messages.0.role", "'user'"),
    (CHAT, {"messages": [{"role": "user", "content": None}]}, "messages.0.content", "required"),
    (CHAT, {"messages": [{"role": "user"}]}, "messages.0.content", "required"),
    (CHAT, {"messages": [{"role": "user", "content": 5}]}, "messages.0.content",
     "a string or a list of text parts"),
    (CHAT, {"messages": [{"role": "assistant", "tool_calls": [{"id": "a"}]}]},
     "messages.0.tool_calls", "not supported"),
    (CHAT, {"messages": [{"role": "user", "content": "a", "unknown": 1}]}, "messages.0.unknown",
     "not permitted"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
     "messages.0.content.0.type", "'text'"),
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


#: Values that mean the same as leaving a parameter out, and parameters that change no answer.
ACCEPTED: list[tuple[str, dict[str, Any]]] = [
    (CHAT, {"n": 1, "frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}}),
    (CHAT, {"logprobs": False, "top_logprobs": None, "tools": [], "tool_choice": "none"}),
    (CHAT, {"tools": [{"type": "function"}], "tool_choice": "none"}),
    (CHAT, {"functions": [{"name": "a"}], "function_call": "none"}),
    (CHAT, {"response_format": {"type": "text"}, "stream": False, "modalities": ["text"]}),
    (CHAT, {"max_tokens": None, "temperature": None, "top_p": 1, "seed": None, "stop": None}),
    (CHAT, {"max_tokens": -1, "max_completion_tokens": -1}),
    (CHAT, {"user": "me", "safety_identifier": "a", "prompt_cache_key": "b"}),
    (CHAT, {"store": True, "metadata": {"run": "7"}, "service_tier": "flex"}),
    (CHAT, {"parallel_tool_calls": True, "prediction": {"type": "content", "content": "a"}}),
    (CHAT, {"stream_options": {"include_usage": True}}),
    (CHAT, {"stream": False, "stream_options": {"continuous_usage_stats": True}}),
    (CHAT, {"verbosity": "medium", "reasoning_effort": "medium"}),
    (CHAT, {"top_k": 0, "min_p": 0, "repetition_penalty": 1.0, "priority": 0}),
    (CHAT, {"top_k": -1, "min_tokens": 0, "length_penalty": 1, "use_beam_search": False}),
    (CHAT, {"stop": "", "chat_template_kwargs": {"enable_thinking": False}}),
    (CHAT, {"stop": [""], "skip_special_tokens": True, "stop_token_ids": []}),
    (CHAT, {"unknown": None, "timeout": None, "priority": None, "steps": None}),
    (TEXT, {"best_of": 1, "echo": False, "logprobs": None, "n": 1, "suffix": None}),
    (TEXT, {"suffix": "", "logprobs": False, "repetition_penalty": 1, "top_k": -1}),
    (TEXT, {"response_format": {"type": "text"}, "add_special_tokens": False}),
]


async def test_values_that_ask_for_nothing_are_accepted(url: str, engine: ScriptedEngine) -> None:
    """What changes no answer is no reason to refuse, and reaches no engine."""
    for path, fields in ACCEPTED:
        body = {"model": "dllm"} | ({"messages": QUESTION} if path == CHAT else {"prompt": "a"})
        answer = await post(url, path, body | fields)

        assert answer.status_code == 200, f"{fields} {answer.text}"
    plain = {"temperature", "gen_length", "top_p"}
    assert all(inputs.keys() - {"messages", "text_input"} <= plain for inputs in engine.requests)


@pytest.mark.parametrize(
    ("message", "text"),
    [
        ({"role": "assistant", "content": None}, ""),
        ({"role": "assistant"}, ""),
        ({"role": "assistant", "content": []}, ""),
        ({"role": "assistant", "content": None, "refusal": "I will not"}, "I will not"),
        ({"role": "assistant", "content": "a", "reasoning_content": "b"}, "a"),
        ({"role": "assistant", "content": "a", "annotations": [{"type": "url"}]}, "a"),
        ({"role": "user", "content": "a", "type": "text"}, "a"),
        ({"role": "user", "content": "a", "name": "ann", "unknown": None}, "a"),
        ({"role": "user", "content": ""}, ""),
        (
            {"role": "user", "content": [{"type": "text", "text": "a", "cache_control": {}}]},
            "a",
        ),
    ],
)
async def test_messages_of_a_history(
    url: str, engine: ScriptedEngine, message: dict[str, Any], text: str
) -> None:
    """Messages are taken as clients keep them, empty ones and extra fields included."""
    answer = await post(url, CHAT, {"model": "dllm", "messages": [message, *QUESTION]})

    assert answer.status_code == 200, answer.text
    sent = json.loads(str(engine.requests[0]["messages"]))
    assert sent == [{"role": message["role"], "content": text}, *QUESTION]


async def test_usage_in_each_chunk_if_asked_for(url: str, engine: ScriptedEngine) -> None:
    """With continuous_usage_stats, each chunk of text has the usage of its choice so far."""
    go_on = asyncio.Event()
    asyncio.get_running_loop().call_later(0.2, go_on.set)
    first, second, *_, last = denoising(4)
    engine.scripts = [[first, second, go_on, last]]
    options = {"include_usage": True, "continuous_usage_stats": True}
    body = {"model": "dllm", "messages": QUESTION, "stream": True, "stream_options": options}
    lines = (await post(url, CHAT, body)).text.split("\n\n")
    sent = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]

    counts = [
        chunk["usage"]["completion_tokens"]
        for chunk in sent
        if chunk["choices"] and chunk["choices"][0]["delta"].get("content")
    ]
    assert counts in ([1, 2, 4], [2, 4])
    assert sent[-1]["usage"]["completion_tokens"] == 4


LENGTHS: list[tuple[str, dict[str, Any], int]] = [
    (CHAT, {}, 128),
    (CHAT, {"max_tokens": 4096}, 512),
    (CHAT, {"max_completion_tokens": 2**31 - 1}, 512),
    (CHAT, {"max_tokens": 20, "max_completion_tokens": 30}, 20),
    (TEXT, {}, 16),
    (TEXT, {"max_tokens": 1000}, 512),
]


@pytest.mark.parametrize(("path", "fields", "length"), LENGTHS)
async def test_max_tokens_is_an_upper_bound(
    url: str, engine: ScriptedEngine, path: str, fields: dict[str, Any], length: int
) -> None:
    """A length beyond DLLM_MAX_GEN_LENGTH is shortened to it; of two lengths the smaller counts."""
    body = {"model": "dllm"} | ({"messages": QUESTION} if path == CHAT else {"prompt": "a"})
    answer = await post(url, path, body | fields)

    assert answer.json()["choices"][0]["finish_reason"] == "length"
    assert [request["gen_length"] for request in engine.requests] == [length]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", [CHAT, TEXT])
async def test_length_is_what_the_context_has_left(
    url: str, engine: ScriptedEngine, path: str, stream: bool
) -> None:
    """A canvas that does not fit behind the prompt is shortened, and its block with it."""
    engine.longest = 82
    body = {"model": "dllm", "max_tokens": 128, "block_length": 100, "stream": stream}
    body |= {"messages": QUESTION} if path == CHAT else {"prompt": ["a", "b"]}
    answer = await post(url, path, body)

    assert answer.status_code == 200, answer.text
    wanted = [(82, 82)] * (1 if path == CHAT else 2)
    assert [(r["gen_length"], r["block_length"]) for r in engine.requests] == wanted


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("path", "param"), [(CHAT, "messages"), (TEXT, "prompt")])
async def test_prompt_without_room_is_named(
    url: str, engine: ScriptedEngine, path: str, param: str, stream: bool
) -> None:
    """A prompt that fills the context is the one at fault, and not a length that was not sent."""
    engine.longest = 0
    body: dict[str, Any] = {"model": "dllm", "stream": stream}
    body |= {"messages": QUESTION} if path == CHAT else {"prompt": "a"}
    answer = await post(url, path, body)

    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["param"], error["code"]) == (param, "context_length_exceeded")
    assert error["message"] == (
        f"{param}: its 512 tokens leave no room for an answer in the model's 512"
    )
    assert engine.requests == []


async def test_chats_are_limited_by_the_context_alone(url: str, engine: ScriptedEngine) -> None:
    """The limit in characters is not of OpenAI's calls."""
    long = "x" * 100_000
    for path, prompt in ((CHAT, {"messages": [{"role": "user", "content": long}]}),
                         (TEXT, {"prompt": long}), (TEXT, {"prompt": [1] * 10_000})):  # fmt: skip
        answer = await post(url, path, {"model": "dllm"} | prompt)
        assert answer.status_code == 200, answer.text
    assert len(engine.requests) == 3


async def test_what_the_engine_refuses_is_not_run(url: str, engine: ScriptedEngine) -> None:
    """A request that no length would make valid is refused before it runs."""
    engine.check_results["What is AI?"] = CheckResult(refusal="remasking: must be one of a, b")
    answer = await post(url, CHAT, {"model": "dllm", "messages": QUESTION, "remasking": "x"})

    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "remasking")
    assert engine.requests == []


async def test_engine_that_cannot_be_asked_is_not_waited_for(
    url: str, engine: ScriptedEngine
) -> None:
    """While an engine does not say what fits, a call runs as it is."""
    engine.check_hangs = True
    answer = await post(url, CHAT, {"model": "dllm", "messages": QUESTION})

    assert answer.status_code == 200
    assert engine.requests[0]["gen_length"] == 128


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v1/responses"),
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
        f"{method} {path} is not offered here; /v1/chat/completions, /v1/completions and "
        "/v1/models are"
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
