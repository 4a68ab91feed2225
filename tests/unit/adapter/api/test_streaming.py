"""Watching a text being denoised: server-sent events through the front door."""

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import httpx
import pytest
from adapter_fakes import (
    HANG,
    WAITING,
    RunningApp,
    ScriptedEngine,
    denoising,
    fast_settings,
    running_app,
    served_app,
    until,
)

from adapter.errors import EngineDead, EngineFailure, InvalidRequest, Overloaded
from adapter.settings import Settings
from adapter.types import Event, StreamDetail, Usage

STREAM = "/v1/generate/stream"
Events = list[tuple[str, dict[str, Any]]]


@pytest.fixture
def engine() -> ScriptedEngine:
    """An engine that decodes a canvas of four."""
    return ScriptedEngine([list(denoising(4))])


@pytest.fixture
async def api(database_url: str, engine: ScriptedEngine) -> AsyncIterator[RunningApp]:
    """A worker whose engine is ready."""
    async with running_app(fast_settings(database_url), engine) as running:
        await until_healthy(running)
        yield running


async def until_healthy(api: RunningApp) -> None:
    """Wait for the worker's first look at the engine."""
    async with asyncio.timeout(5):
        while (await api.health())[0] != 200:
            await asyncio.sleep(0.005)


def events_of(body: str) -> Events:
    """The events of a stream; comments are left out."""
    found = []
    for block in body.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.splitlines() if line[:1] != ":")
        if fields:
            found.append((fields["event"], json.loads(fields["data"])))
    return found


async def watch(api: RunningApp, **fields: Any) -> Events:
    """All events of one call."""
    answer = await api.client.post(STREAM, json={"prompt": "hello"} | fields)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/event-stream")
    return events_of(answer.text)


def committed(events: Events) -> list[int]:
    """Every position that was said to be committed, in order."""
    return [c["position"] for _, data in events for c in data.get("committed", ())]


async def test_events_show_the_canvas_until_the_answer(
    api: RunningApp, engine: ScriptedEngine
) -> None:
    """Steps tell what is shown, what is new and what is final; the last event is the answer."""
    *steps, done = await watch(api, gen_length=4)

    assert [name for name, _ in steps] == ["step"] * len(steps)
    assert steps[-1][1] == {
        "step": 4,
        "block": {"index": 0, "start": 0, "end": 4},
        "canvas": ["<0>", "<1>", "<2>", "<3>"],
        "committed": steps[-1][1]["committed"],
        "final_text": "<0><1><2><3>",
        "seed": 7,
    }
    assert committed(steps) == [0, 1, 2, 3]
    assert steps[0][1]["committed"][0] == {
        "position": 0,
        "token_id": 100,
        "text": "<0>",
        "confidence": 0.5,
    }
    assert done == (
        "done",
        {
            "text": "<0><1><2><3>",
            "finish_reason": "length",
            "usage": {
                "prompt_tokens": 3,
                "completion_tokens": 4,
                "steps": 4,
                "forward_passes": 4,
                "cached_tokens": 2,
            },
            "seed": 7,
        },
    )
    assert engine.details == [StreamDetail.CANVAS]


async def test_masked_positions_are_null(api: RunningApp, engine: ScriptedEngine) -> None:
    """What is not decoded yet is null, which no token's text can be taken for."""
    engine.scripts = [[denoising(4)[1], EngineFailure("it broke")]]
    step, error = await watch(api)
    assert step[1]["canvas"] == ["<0>", "<1>", None, None]
    assert error == ("error", {"error": "it broke"})


async def test_given_tokens_are_not_committed(api: RunningApp, engine: ScriptedEngine) -> None:
    """Tokens given in the request are shown, but not as decoded ones."""
    engine.scripts = [list(denoising(4, given={1: 55, 3: 56}))]
    *steps, _ = await watch(api, canvas_ids=[9, 55, 9, 56])

    assert committed(steps) == [0, 2]
    assert steps[0][1]["canvas"][1::2] == ["<1>", "<3>"]


async def test_no_text_ends_a_line(api: RunningApp, engine: ScriptedEngine) -> None:
    """Characters that some clients take for ends of lines are escaped, and arrive."""
    text = "a\u2028b\u2029c\x85d\r\ne"
    last = denoising(1)[0]
    engine.scripts = [[replace(last, text=text)]]
    answer = await api.client.post(STREAM, json={"prompt": "hello"})

    assert len(answer.text.splitlines()) == len(answer.text.split("\n")) - 1
    assert events_of(answer.text)[-1][1]["text"] == text


async def test_limits_and_fields_are_those_of_generate(api: RunningApp) -> None:
    """A field out of range is named, with its limit, before anything is streamed."""
    answer = await api.client.post(STREAM, json={"prompt": "a", "gen_length": 513})

    assert answer.status_code == 422
    assert answer.json()["detail"][0]["loc"] == ["body", "gen_length"]
    assert "512" in answer.json()["detail"][0]["msg"]


@pytest.mark.parametrize(
    ("message", "path", "reason"),
    [
        ("remasking: must be one of two", ["remasking"], "must be one of two"),
        ("text_input: must not be empty", ["prompt"], "must not be empty"),
        ("expected 2 inputs: got 1", [], "expected 2 inputs: got 1"),
    ],
)
async def test_engines_refusal_names_the_field(
    api: RunningApp, engine: ScriptedEngine, message: str, path: list[str], reason: str
) -> None:
    """What the engine refuses looks like what is refused before it."""
    engine.scripts = [[InvalidRequest(message)]]
    answer = await api.client.post(STREAM, json={"prompt": "a"})

    assert answer.status_code == 422
    problem = {"type": "engine_refusal", "loc": ["body", *path], "msg": reason}
    assert answer.json() == {"detail": [problem]}


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (Overloaded("exceeds maximum queue size"), 429),
        (EngineDead("stub process is not healthy"), 503),
        (EngineFailure("it broke"), 502),
    ],
)
async def test_what_fails_at_once_has_a_status(
    api: RunningApp, engine: ScriptedEngine, error: Exception, status: int
) -> None:
    """What goes wrong before the first event is told by the status, with the reason."""
    engine.scripts = [[error]]
    answer = await api.client.post(STREAM, json={"prompt": "a"})

    assert (answer.status_code, answer.json()) == (status, {"detail": str(error)})
    assert ("retry-after" in answer.headers) == (status in (429, 503))


async def test_one_failure_turns_nobody_else_away(api: RunningApp, engine: ScriptedEngine) -> None:
    """A request that the engine fails on does not keep the next one out."""
    engine.scripts = [[EngineFailure("it broke")], list(denoising(2))]
    assert (await api.client.post(STREAM, json={"prompt": "a"})).status_code == 502

    assert committed(await watch(api)) == [0, 1]


async def test_what_fails_later_is_an_event(api: RunningApp, engine: ScriptedEngine) -> None:
    """A stream that has begun ends with the reason; what was committed before is not lost."""
    engine.scripts = [[*denoising(4)[:2], EngineFailure("it broke")]]
    *steps, last = await watch(api)

    assert committed(steps) == [0, 1]
    assert last == ("error", {"error": "it broke"})


@pytest.mark.parametrize("script", [[], [Event("", "cancelled", Usage(1, 0, 0, 0), 1)]])
async def test_stream_without_a_result_is_an_error(
    api: RunningApp, engine: ScriptedEngine, script: list[Any]
) -> None:
    """An engine that ends the stream, or cancels, has lost the request."""
    engine.scripts = [[*denoising(4)[:1], *script]]

    assert (await watch(api))[-1][0] == "error"


async def test_engine_that_falls_silent_has_lost_the_request(
    api: RunningApp, engine: ScriptedEngine
) -> None:
    """A stream that said something and then nothing for too long ends with an error."""
    engine.scripts = [[denoising(4)[0], HANG]]

    name, data = (await watch(api))[-1]
    assert name == "error"
    assert "silent for 0.3 s" in data["error"]


async def test_engine_that_ends_breaks_the_stream(api: RunningApp, engine: ScriptedEngine) -> None:
    """When tritonserver ends before the first event, the client gets a 503 at once."""
    engine.scripts = [[HANG]]
    waiting = asyncio.create_task(api.client.post(STREAM, json={"prompt": "a"}))
    await until(lambda: len(engine.requests) == 1)
    engine.end()

    answer = await waiting
    assert (answer.status_code, answer.json()["detail"]) == (503, "Socket closed")


async def test_timeout_ends_the_request(api: RunningApp, engine: ScriptedEngine) -> None:
    """A request that asked to be done in time is ended when it is not, wherever it is."""
    engine.scripts = [[HANG]]
    answer = await api.client.post(STREAM, json={"prompt": "a", "timeout": 0.05})

    assert answer.status_code == 408
    assert "0.05 s" in answer.json()["detail"]
    await until(lambda: engine.closed == 1)


async def test_priority_reaches_the_engine(api: RunningApp, engine: ScriptedEngine) -> None:
    """A stream waits in the engine at the level that it asked for."""
    await watch(api, priority=1)

    assert engine.priorities == [1]


async def test_no_engine_is_a_503(database_url: str) -> None:
    """Nothing is begun while the engine is away."""
    dead = ScriptedEngine(alive=False)
    async with running_app(fast_settings(database_url), dead) as api:
        answer = await api.client.post(STREAM, json={"prompt": "a"})

    assert answer.status_code == 503
    assert answer.headers["retry-after"]


async def test_too_many_streams_are_refused(database_url: str, engine: ScriptedEngine) -> None:
    """Beyond the limit a call is told to come back; a place is free when a stream ends."""
    engine.scripts = [[HANG], list(denoising(2))]
    settings = fast_settings(database_url, max_live=1)
    async with running_app(settings, engine) as api:
        await until_healthy(api)
        first = asyncio.create_task(api.client.post(STREAM, json={"prompt": "a", "timeout": 0.2}))
        await until(lambda: len(engine.requests) == 1)
        refused = await api.client.post(STREAM, json={"prompt": "b"})
        assert refused.status_code == 429
        assert refused.headers["retry-after"]
        assert "DLLM_MAX_LIVE" in refused.json()["detail"]
        assert (await first).status_code == 408
        assert committed(await watch(api)) == [0, 1]


@pytest.fixture
def patient(database_url: str) -> Settings:
    """Settings under which a silent engine is given time."""
    return fast_settings(database_url, engine_idle_timeout=30, heartbeat_interval=0.02)


async def open_stream(url: str, client: httpx.AsyncClient) -> AsyncIterator[str]:
    """Lines of a stream over a real connection, once the worker is ready."""
    await _ready(url, client)
    async with client.stream("POST", url + STREAM, json={"prompt": "a"}) as answer:
        assert answer.status_code == 200
        async for line in answer.aiter_lines():
            yield line


async def _ready(url: str, client: httpx.AsyncClient) -> None:
    while (await client.get(f"{url}/v1/health")).status_code != 200:
        await asyncio.sleep(0.005)


async def test_silence_is_filled_with_comments(patient: Settings, engine: ScriptedEngine) -> None:
    """While the engine says nothing the stream carries comments, so that no proxy cuts it."""
    engine.scripts = [[denoising(4)[0], HANG]]
    async with served_app(patient, engine) as url, httpx.AsyncClient() as client:
        lines = open_stream(url, client)
        seen = [await anext(lines) for _ in range(9)]
        await lines.aclose()  # type: ignore[attr-defined]

    assert seen.count(": ping") >= 2


async def test_waiting_for_a_place_is_silence(patient: Settings, engine: ScriptedEngine) -> None:
    """Heartbeats of a waiting request are no steps, and comments still keep the connection open."""
    ticking = [item for _ in range(4) for item in (WAITING, asyncio.Event())]
    engine.scripts = [[*ticking[:-1], *denoising(2)]]
    async with served_app(patient, engine) as url, httpx.AsyncClient() as client:
        lines = open_stream(url, client)
        seen = [await anext(lines)]
        for tick in ticking[1:-1:2]:
            seen += [await anext(lines) for _ in range(4)]
            tick.set()  # type: ignore[union-attr]
        assert {line for line in seen if line} == {": ping"}
        rest = [line async for line in lines]

    assert sum(line == "event: step" for line in rest) == 2
    assert sum(line == "event: done" for line in rest) == 1


async def test_hanging_up_cancels_the_stream(patient: Settings, engine: ScriptedEngine) -> None:
    """A caller who drops the connection frees the engine at once."""
    engine.scripts = [[denoising(4)[0], HANG]]
    async with served_app(patient, engine) as url:
        async with httpx.AsyncClient() as client:
            assert await anext(open_stream(url, client)) == "event: step"
            assert engine.closed == 0
        await until(lambda: engine.closed == 1)


async def test_hanging_up_in_the_queue_cancels(patient: Settings, engine: ScriptedEngine) -> None:
    """A caller who leaves before the first event frees its place too."""
    engine.scripts = [[HANG]]
    async with served_app(patient, engine) as url:
        async with httpx.AsyncClient() as client:
            await _ready(url, client)
            with pytest.raises(httpx.ReadTimeout):
                await client.post(url + STREAM, json={"prompt": "a"}, timeout=0.1)
        await until(lambda: engine.closed == 1)


async def test_slow_reader_holds_up_nobody(patient: Settings, engine: ScriptedEngine) -> None:
    """The engine ends while its reader still sleeps; the reader misses no committed position."""
    length = 600
    engine.scripts = [list(denoising(length))]
    async with served_app(patient, engine) as url, httpx.AsyncClient() as client:
        await _ready(url, client)
        reader = socket.socket()
        reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        reader.connect(("127.0.0.1", httpx.URL(url).port or 0))
        body = json.dumps({"prompt": "a"}).encode()
        head = f"POST {STREAM} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
        head += f"Connection: close\r\nContent-Length: {len(body)}\r\n\r\n"
        reader.sendall(head.encode() + body)
        await until(lambda: engine.closed == 1)
        received = await asyncio.to_thread(_read_to_the_end, reader)

    events = events_of(received)
    steps = [data["step"] for name, data in events if name == "step"]
    assert len(steps) < length
    assert steps == sorted(steps)
    assert committed(events) == list(range(length))
    assert events[-1][0] == "done"


def _read_to_the_end(reader: socket.socket) -> str:
    with reader:
        reader.settimeout(30)
        raw = b""
        while chunk := reader.recv(1 << 16):
            raw += chunk
    _, _, body = raw.partition(b"\r\n\r\n")
    text = b""
    while body:  # chunked transfer
        size, _, body = body.partition(b"\r\n")
        text, body = text + body[: int(size, 16)], body[int(size, 16) + 2 :]
    return text.decode()
