"""The cost of a request body, and when it is read."""

import asyncio
import json
import tracemalloc
from collections.abc import AsyncIterator, Iterator

import httpx
import pytest
from adapter_fakes import RunningApp, ScriptedEngine, fast_settings, running_app, served_app

from adapter.auth.keys import entry_of
from tests.support.bodies import BODIES

GENERATE, CHAT = "/v1/generate", "/v1/chat/completions"
DATABASES = ("sqlite",)


@pytest.fixture
async def api(database_url: str) -> AsyncIterator[RunningApp]:
    """A worker with the default limits."""
    async with running_app(fast_settings(database_url, engine_idle_timeout=30), _engine()) as api:
        yield api


def _engine() -> ScriptedEngine:
    return ScriptedEngine()


async def send(
    api: RunningApp, path: str, body: bytes, kind: str | None = "application/json"
) -> httpx.Response:
    """A call with these bytes."""
    headers = {} if kind is None else {"content-type": kind}
    return await api.client.post(path, content=body, headers=headers)


@pytest.mark.parametrize("number", range(len(BODIES)))
async def test_no_body_costs_more_than_its_size_allows(api: RunningApp, number: int) -> None:
    """Each bad body takes a worker less than 100 MB, and gets an answer of at most 64 KiB."""
    path, body = BODIES[number]
    tracemalloc.start()
    try:
        answer = await send(api, path, body)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert 400 <= answer.status_code < 500
    assert len(answer.content) <= 65_536
    assert peak < 100e6


async def test_only_the_first_problems_are_listed(api: RunningApp) -> None:
    """An answer lists the first problems, and says how many more there are."""
    body = {"prompt": "a"} | {f"unknown{number}": 1 for number in range(90)}
    detail = (await api.client.post(GENERATE, json=body)).json()["detail"]

    assert detail[0]["loc"] == ["body", "unknown0"]
    assert (len(detail), detail[-1]["msg"]) == (21, "and 70 more problems")


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"[" * 100_000, "nested too deeply"),
        (b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}", "too many digits"),
        (b'{"prompt": "\xff"}', "UTF-8"),
    ],
)
async def test_unreadable_json_is_told_why(api: RunningApp, body: bytes, reason: str) -> None:
    """JSON that cannot be read is a 400 with the reason, in each format of errors."""
    for path in (GENERATE, CHAT):
        answer = await send(api, path, body)
        assert answer.status_code == 400
        assert reason in answer.text


@pytest.mark.parametrize("path", [GENERATE, CHAT])
@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (None, "there is none"),
        ("application/x-www-form-urlencoded", "it is 'application/x-www-form-urlencoded'"),
        ("text/plain", "it is 'text/plain'"),
        ("application", "it is 'application'"),
    ],
)
async def test_missing_content_type_is_named(
    api: RunningApp, path: str, kind: str | None, reason: str
) -> None:
    """A body that does not say that it is JSON is a 415 that names the header."""
    answer = await send(api, path, b'{"prompt": "a"}', kind)

    assert answer.status_code == 415
    assert f"the header Content-Type must be application/json; {reason}" in answer.text


@pytest.mark.parametrize("kind", ["application/json; charset=utf-8", "application/x+json"])
async def test_kinds_of_json_are_accepted(api: RunningApp, kind: str) -> None:
    """Parameters and suffixes of the type make no difference."""
    assert (await send(api, GENERATE, b'{"prompt": "a"}', kind)).status_code == 200


async def test_other_encodings_than_utf8_are_refused(api: RunningApp) -> None:
    """JSON in UTF-16, whose values cannot be counted, is refused by its encoding."""
    answer = await send(api, GENERATE, '{"prompt": "a"}'.encode("utf-16"))

    assert (answer.status_code, answer.json()["detail"]) == (
        415,
        "the body must be encoded as UTF-8",
    )


@pytest.fixture
async def address(database_url: str) -> AsyncIterator[tuple[str, int]]:
    """Host and port of a worker that waits for a body for 0.3 s, and wants keys."""
    settings = fast_settings(database_url, body_timeout=0.3, api_keys=entry_of("one", "k1"))
    async with served_app(settings, _engine()) as url:
        host, port = url.removeprefix("http://").split(":")
        yield host, int(port)


async def unfinished(address: tuple[str, int], path: str, key: str, method: str = "POST") -> bytes:
    """The answer to a call that never sends the second half of its body."""
    reader, writer = await asyncio.open_connection(*address)
    try:
        lines = [f"{method} {path} HTTP/1.1", "Host: a", "Content-Length: 100000"]
        lines += ["Content-Type: application/json", f"X-API-Key: {key}", "", " " * 1000]
        writer.write("\r\n".join(lines).encode())
        return await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)
    finally:
        writer.close()


@pytest.mark.parametrize(
    ("method", "path", "key", "status"),
    [
        ("POST", GENERATE, "k1", 408),
        ("POST", CHAT, "k1", 408),
        ("POST", GENERATE, "unknown", 401),
        ("POST", "/v1/unknown", "k1", 404),
        ("POST", "/unknown", "", 404),
        ("PUT", GENERATE, "k1", 405),
        ("GET", "/v1/health", "", 200),
    ],
)
async def test_a_body_is_read_only_where_a_route_takes_one(
    address: tuple[str, int], method: str, path: str, key: str, status: int
) -> None:
    """A call that needs no body is answered without waiting for it; the others wait for a time."""
    head = await unfinished(address, path, key, method)

    assert head.split()[1] == str(status).encode()
    assert (b"connection: close" in head.lower()) == (status == 408)


def client_at(api: RunningApp, address: str) -> httpx.AsyncClient:
    """A client whose calls come from this address."""
    transport = httpx.ASGITransport(api.app, client=(address, 1))
    return httpx.AsyncClient(transport=transport, base_url="http://adapter")


async def test_bodies_at_once_are_bounded(database_url: str) -> None:
    """Beyond 16 of the largest bodies at once, a worker reads no further one."""

    async def slow() -> AsyncIterator[bytes]:
        yield b" " * 1000
        await asyncio.sleep(0.5)

    settings = fast_settings(database_url, max_body_bytes=1000)
    async with running_app(settings, _engine()) as api:

        def sent() -> Iterator[asyncio.Task[httpx.Response]]:
            headers = {"content-type": "application/json"}
            for address in range(18):
                client = client_at(api, str(address % 3))
                call = client.post(GENERATE, content=slow(), headers=headers)
                yield asyncio.create_task(call)

        answers = await asyncio.gather(*sent())
        assert sorted(answer.status_code for answer in answers) == [422] * 16 + [503] * 2
        refused = next(answer for answer in answers if answer.status_code == 503)
        assert "too many bodies" in refused.json()["detail"]
        assert (await send(api, GENERATE, json.dumps({"prompt": "a"}).encode())).status_code == 200


@pytest.mark.parametrize("source", ["key", "address"])
async def test_bodies_of_one_caller_leave_room_for_others(database_url: str, source: str) -> None:
    """If a key, or without keys an address, sends many bodies at once, only its own are refused."""

    async def slow() -> AsyncIterator[bytes]:
        yield b" " * 1000
        await asyncio.sleep(0.5)

    keys = f"{entry_of('a', 'first')},{entry_of('b', 'second')}" if source == "key" else ""
    settings = fast_settings(database_url, max_body_bytes=1000, api_keys=keys)
    async with running_app(settings, _engine()) as api:

        async def call(who: str, content: AsyncIterator[bytes] | bytes) -> httpx.Response:
            headers = {"content-type": "application/json", "x-api-key": who}
            return await client_at(api, who).post(GENERATE, content=content, headers=headers)

        slow_calls = [asyncio.create_task(call("first", slow())) for _ in range(18)]
        await asyncio.sleep(0.2)
        assert (await call("second", json.dumps({"prompt": "a"}).encode())).status_code == 200
        answers = await asyncio.gather(*slow_calls)
        assert sorted(answer.status_code for answer in answers) == [422] * 8 + [503] * 10
        refused = next(answer for answer in answers if answer.status_code == 503)
        assert f"this {source} at the same time" in refused.json()["detail"]
        assert (await call("first", json.dumps({"prompt": "a"}).encode())).status_code == 200


async def test_no_turn_for_a_body_whose_client_is_gone(database_url: str) -> None:
    """Large bodies of clients that are gone do not delay another one."""
    body = b" " * 2**20
    head = f"POST {GENERATE} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
    call = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
    async with served_app(fast_settings(database_url), _engine()) as url:
        host, port = url.removeprefix("http://").split(":")
        for _ in range(15):
            _, writer = await asyncio.open_connection(host, int(port))
            writer.write(call)
            await writer.drain()
            await asyncio.sleep(0.02)
            writer.transport.abort()
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(call)
        # The turns of all would take 4 s.
        answer = await asyncio.wait_for(reader.readline(), 2)
        writer.close()

    assert b"422" in answer
