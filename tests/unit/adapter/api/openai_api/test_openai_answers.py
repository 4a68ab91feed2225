"""Answers, streams and models, through OpenAI's own client and beneath it."""

import asyncio
import json
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
from openai_calls import CHAT, QUESTION, TEXT, post

from adapter.errors import (
    AdapterError,
    EngineFailure,
    Unavailable,
)
from adapter.types import Event, StreamDetail, Usage


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
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 2
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
    assert last.usage.prompt_tokens_details is not None
    assert last.usage.prompt_tokens_details.cached_tokens == 2
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
    assert {chunk["choices"][0]["seed"] for chunk in sent} == {1}
    assert [line for line in lines if line][-1] == "data: [DONE]"


async def test_steps_without_text_are_silence_too(url: str, engine: ScriptedEngine) -> None:
    """Comments are sent while steps bring nothing that may be shown, such as of one that waits."""
    ticks = [asyncio.Event() for _ in range(8)]

    async def run() -> None:
        await until(lambda: bool(engine.requests))
        for tick in ticks:
            await asyncio.sleep(0.08)
            tick.set()

    nothing = Event("", usage=Usage(1, 0, 1, 1), seed=1)
    engine.scripts = [[item for tick in ticks for item in (WAITING, nothing, tick)] + [DONE]]
    call = {"model": "dllm", "prompt": "a", "stream": True}
    answer, _ = await asyncio.gather(post(url, TEXT, call), run())
    text = answer.text

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
            known = {name: value for name, value in asdict(MODEL).items() if value is not None}
            assert model.items() >= known.items()
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


async def test_usage_in_each_chunk_if_asked_for(url: str, engine: ScriptedEngine) -> None:
    """With continuous_usage_stats, each chunk of text has the usage of its choice so far."""
    go_on = asyncio.Event()
    first, second, *_, last = denoising(4)
    engine.scripts = [[first, second, go_on, last]]
    options = {"include_usage": True, "continuous_usage_stats": True}
    body = {"model": "dllm", "messages": QUESTION, "stream": True, "stream_options": options}
    counts = []
    async with httpx.AsyncClient() as http, http.stream("POST", f"{url}/v1{CHAT}", json=body) as s:
        async for line in s.aiter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line.removeprefix("data: "))
            count = chunk["usage"] and chunk["usage"]["completion_tokens"]
            if chunk["choices"] and chunk["choices"][0]["delta"].get("content"):
                counts.append(count)
                if count == 2:
                    go_on.set()

    assert counts in ([1, 2, 4], [2, 4])  # a slow reader gets the newest event alone
    assert count == 4
