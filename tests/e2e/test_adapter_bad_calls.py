"""One caller's mistakes, and what they cost another caller."""

from __future__ import annotations

import itertools
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import httpx
import pytest

from tests.conftest import StartAdapter
from tests.support.bodies import BODIES
from tests.support.servers import AdapterServer

CALLS = 60
HELD = 50
JSON = {"Content-Type": "application/json"}
CHAT = {
    "model": "dllm",
    "messages": [{"role": "user", "content": "tell me"}],
    "max_tokens": 128,
    "ignore_eos": True,
}


@contextmanager
def bad_calls(adapter: AdapterServer) -> Iterator[None]:
    """Send one bad body after the other, and hold posts and connections that never go on."""
    over = threading.Event()

    def send_bodies() -> None:
        with httpx.Client(base_url=adapter.url, timeout=60) as client:
            for path, body in itertools.cycle(BODIES):
                if over.is_set():
                    return
                answer = client.post(path, content=body, headers=JSON)
                assert answer.status_code < 500

    with ExitStack() as stack:
        for number in range(2 * HELD):
            held = stack.enter_context(socket.create_connection(("127.0.0.1", adapter.port)))
            if number % 2:
                head = b"POST /v1/generate HTTP/1.1\r\nContent-Type: application/json\r\n"
                held.sendall(head + b"Content-Length: 4000000\r\n\r\n" + b" " * 10_000)
        sender = threading.Thread(target=send_bodies)
        sender.start()
        try:
            yield
        finally:
            over.set()
            sender.join()


def slow_chat(adapter: AdapterServer) -> float:
    """Seconds that the slowest but one of many chats takes, one at a time."""
    seconds = []
    with httpx.Client(base_url=adapter.url, timeout=60) as client:
        for _ in range(CALLS):
            began = time.monotonic()
            answer = client.post("/v1/chat/completions", json=CHAT)
            assert answer.status_code == 200, answer.text
            seconds.append(time.monotonic() - began)
    return sorted(seconds)[-2]


@pytest.mark.slow
def test_bad_calls_do_not_slow_others(start_adapter: StartAdapter) -> None:
    """While one caller sends the worst bodies, another's slow chats take at most twice as long."""
    adapter = start_adapter()
    slow_chat(adapter)
    alone = slow_chat(adapter)
    with bad_calls(adapter):
        among = slow_chat(adapter)

    assert among <= 2 * alone, f"{alone:.3f} s alone, {among:.3f} s among bad calls"
    assert httpx.get(f"{adapter.url}/v1/health").status_code == 200
