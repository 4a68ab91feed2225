"""Limits on connections: what clients that send or read too little are met with."""

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

import pytest
import uvicorn
from adapter_fakes import until
from uvicorn.main import main as uvicorn_command

from adapter.__main__ import main
from adapter.connection import Connection, process_settings

LARGE = b"x" * 2**20


async def respond(scope: Any, _receive: Any, send: Any) -> None:
    """Answer at once, without a look at the body; `/large` sends 64 MiB."""
    await send({"type": "http.response.start", "status": 200, "headers": []})
    for _ in range(64 if scope["path"] == "/large" else 0):
        await send({"type": "http.response.body", "body": LARGE, "more_body": True})
    await send({"type": "http.response.body", "body": b""})


@pytest.fixture
async def port(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[int]:
    """Port of a server that waits for 0.3 s, and keeps three connections of an address."""
    monkeypatch.setenv("DLLM_BODY_TIMEOUT", "0.3")
    monkeypatch.setenv("DLLM_SEND_TIMEOUT", "0.3")
    monkeypatch.setenv("DLLM_MAX_CONNECTIONS_PER_ADDRESS", "3")
    process_settings.cache_clear()
    config = uvicorn.Config(respond, port=0, http=Connection, lifespan="off", log_config=None)
    server = uvicorn.Server(config)
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(server.serve())
        try:
            await until(lambda: server.started)
            yield server.servers[0].sockets[0].getsockname()[1]
        finally:
            server.should_exit = True
    process_settings.cache_clear()


async def connect(port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A connection to the server."""
    return await asyncio.open_connection("127.0.0.1", port)


async def is_cut(reader: asyncio.StreamReader, seconds: float = 3) -> bool:
    """Whether the connection ends within the time."""
    with suppress(ConnectionError):
        try:
            await asyncio.wait_for(reader.read(), seconds)
        except TimeoutError:
            return False
    return True


@pytest.mark.parametrize("sent", [b"", b"GET / HTTP/1.1\r\nHost: a\r\n"])
async def test_a_call_that_does_not_come_is_not_waited_for(port: int, sent: bytes) -> None:
    """A connection on which no whole head arrives in time is cut."""
    reader, writer = await connect(port)
    writer.write(sent)

    assert await is_cut(reader)
    assert Connection.open.total() == 0


async def test_drops_do_not_keep_a_connection(port: int) -> None:
    """A head, or a body that no route reads, in small pieces does not keep a connection open."""
    heads = (b"GET / HTTP/1.1\r\nX: ", b"POST / HTTP/1.1\r\nContent-Length: 100000\r\n\r\n")
    for head in heads:
        reader, writer = await connect(port)
        writer.write(head)

        async def drip(to: asyncio.StreamWriter = writer) -> None:
            with suppress(ConnectionError):
                while True:
                    to.write(b"x")
                    await to.drain()
                    await asyncio.sleep(0.02)

        task = asyncio.create_task(drip())
        assert await is_cut(reader)
        task.cancel()


async def test_a_large_head_is_refused(port: int) -> None:
    """Headers without end are refused at 64 KiB."""
    reader, writer = await connect(port)
    writer.write(b"GET / HTTP/1.1\r\n" + b"X: " + b"x" * 100_000)

    assert b"400 Bad Request" in await reader.readline()


async def test_a_client_that_does_not_read_is_cut_off(port: int) -> None:
    """A response that is not read holds its connection for a time, and no longer."""
    _, writer = await connect(port)
    writer.write(b"GET /large HTTP/1.1\r\nHost: a\r\n\r\n")
    writer.transport.pause_reading()  # type: ignore[attr-defined]
    await until(lambda: Connection.open.total() == 1)

    await until(lambda: Connection.open.total() == 0)


async def test_an_address_has_so_many_connections(port: int) -> None:
    """One connection too many is cut; the others go on, and a closed one makes room."""
    kept = [await connect(port) for _ in range(3)]
    surplus, held = await connect(port)  # a writer that is collected would close the connection
    assert await is_cut(surplus, 0.2)
    held.close()
    for reader, writer in kept:
        writer.write(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        assert b"200 OK" in await reader.readline()
    kept[0][1].close()
    await until(lambda: Connection.open.total() == 2)
    reader, writer = await connect(port)
    writer.write(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
    assert b"200 OK" in await reader.readline()


async def test_calls_follow_one_another(port: int) -> None:
    """A connection outlives the time of a call, while its calls come whole."""
    reader, writer = await connect(port)
    for _ in range(5):
        writer.write(b"POST / HTTP/1.1\r\nContent-Length: 2\r\n\r\n{}")
        assert b"200 OK" in await reader.readline()
        await reader.readuntil(b"\r\n\r\n")
        await reader.readline()
        await reader.readline()
        await asyncio.sleep(0.1)
    assert Connection.open.total() == 1


async def test_a_websocket_is_not_counted_for_ever(port: int) -> None:
    """Connections that were upgraded do not use up their address's limit once they are closed."""
    head = b"GET / HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
    for _ in range(4):
        reader, writer = await connect(port)
        writer.write(head)
        await reader.readline()
        writer.close()

    await until(lambda: Connection.open.total() == 0)


def test_the_adapter_takes_no_websockets(monkeypatch: pytest.MonkeyPatch) -> None:
    """`python -m adapter` answers an upgrade as a plain call, which the limits cover."""
    given: dict[str, Any] = {}
    monkeypatch.setattr(sys, "argv", ["adapter", "--port", "1"])
    monkeypatch.setattr(uvicorn_command, "invoke", lambda context: given.update(context.params))

    main()

    assert given["ws"] == "none"
    assert given["http"] == "adapter.connection:Connection"
