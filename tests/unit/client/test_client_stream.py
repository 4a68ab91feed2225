"""Watching a denoising with the client, against a scripted server."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from client_fakes import Script
from dllm_client import (
    Answer,
    AsyncClient,
    BadRequestError,
    Block,
    Client,
    Committed,
    Step,
    StreamError,
    UnavailableError,
    UnexpectedResponseError,
    Usage,
)

STEP = {
    "step": 1,
    "block": {"index": 0, "start": 0, "end": 2},
    "canvas": ["a\u2028b", None],
    "committed": [{"position": 0, "token_id": 7, "text": "a\u2028b", "confidence": 0.5}],
    "final_text": "a\u2028b",
    "seed": 7,
}
DONE = {
    "text": "a\u2028b é🙂",
    "finish_reason": "stop",
    "usage": {"prompt_tokens": 3, "completion_tokens": 2, "steps": 2, "forward_passes": 2},
    "seed": 7,
}
EXPECTED = [
    Step(1, Block(0, 0, 2), ["a\u2028b", None], [Committed(0, 7, "a\u2028b", 0.5)], "a\u2028b", 7),
    Answer("a\u2028b é🙂", "stop", Usage(3, 2, 2, 2), 7),
]


def sse(name: str, data: Any) -> bytes:
    return f"event: {name}\ndata: {json.dumps(data, ensure_ascii=False)}\n\n".encode()


WHOLE = sse("step", STEP) + b": ping\n\n" + sse("done", DONE)


class Chunks(httpx.SyncByteStream, httpx.AsyncByteStream):
    """A body that arrives in pieces of a few bytes, and may break."""

    def __init__(self, body: bytes, size: int, error: Exception | None = None) -> None:
        self._pieces = [body[i : i + size] for i in range(0, len(body), size)]
        self._error = error
        self.closed = False

    def __iter__(self) -> Iterator[bytes]:
        yield from self._pieces
        if self._error is not None:
            raise self._error

    async def __aiter__(self):  # type: ignore[no-untyped-def]
        for piece in self:
            yield piece

    def close(self) -> None:
        self.closed = True


def streaming(chunks: Chunks) -> Client:
    answer = httpx.Response(200, stream=chunks)
    return Client("http://server", transport=httpx.MockTransport(lambda _: answer))


@pytest.mark.parametrize("size", [1, 7, 10_000])
def test_events_are_typed_however_the_body_is_cut(size: int) -> None:
    """Steps and the answer arrive whole, whatever characters they hold; comments say nothing."""
    with streaming(Chunks(WHOLE, size)) as client:
        assert list(client.stream("hi")) == EXPECTED


async def test_the_asyncio_client_does_the_same() -> None:
    """The same events from the asyncio client."""
    answer = httpx.Response(200, stream=Chunks(WHOLE, 5))
    transport = httpx.MockTransport(lambda _: answer)
    async with AsyncClient("http://server", transport=transport) as client:
        assert [event async for event in client.stream("hi")] == EXPECTED


def test_fields_are_those_of_a_request(client: Client, script: Script) -> None:
    """Prompt and parameters go out as they do for a job."""
    script.answers = [httpx.Response(200, content=WHOLE)]
    list(client.stream("hi", gen_length=8, priority=1, timeout=5))

    (request,) = script.requests
    assert (request.method, request.url.path) == ("POST", "/v1/generate/stream")
    sent = json.loads(request.content)
    assert sent == {"prompt": "hi", "gen_length": 8, "priority": 1, "timeout": 5}


def test_leaving_hangs_up() -> None:
    """Closing the generator closes the connection, which is how the server learns of it."""
    chunks = Chunks(WHOLE, 50)
    with streaming(chunks) as client:
        events = client.stream("hi")
        next(events)
        assert not chunks.closed
        events.close()
        assert chunks.closed


@pytest.mark.parametrize(
    ("chunks", "kind", "message"),
    [
        (Chunks(sse("error", {"error": "it broke"}), 9), StreamError, "it broke"),
        (Chunks(sse("step", STEP), 9), StreamError, "without an answer"),
        (Chunks(sse("step", {"step": 1}), 9), UnexpectedResponseError, "not a step event"),
        (Chunks(sse("else", {}), 9), UnexpectedResponseError, "else"),
        (Chunks(b"data: {\n\n", 9), UnexpectedResponseError, "not"),
        (Chunks(WHOLE[:40], 9, httpx.ReadError("reset")), UnavailableError, "reset"),
    ],
)
def test_broken_streams(chunks: Chunks, kind: type[Exception], message: str) -> None:
    """A stream that ends in any other way than with its answer is an error that says how."""
    with streaming(chunks) as client, pytest.raises(kind, match=message):
        list(client.stream("hi"))


async def test_refusals_are_those_of_every_call(client: Client, script: Script) -> None:
    """A status that is no success is the error it is elsewhere, with the field's name."""
    detail = [{"loc": ["body", "gen_length"], "msg": "too long"}]
    script.answers = [httpx.Response(422, json={"detail": detail})]
    with pytest.raises(BadRequestError, match="too long") as caught:
        next(client.stream("hi"))
    assert caught.value.field == "gen_length"
    async with AsyncClient("http://server", transport=httpx.MockTransport(script)) as other:
        with pytest.raises(BadRequestError, match="too long"):
            await anext(other.stream("hi"))
    script.answers = [httpx.Response(408, json={"detail": "not done within 5 s"})]
    with pytest.raises(TimeoutError, match="not done within 5 s"):
        next(client.stream("hi", timeout=5))
