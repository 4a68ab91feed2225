"""Requests beyond the engine's places wait in it: priorities, time-outs, signs of life, a limit."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import tritonclient.http as triton_http
from tritonclient.utils import InferenceServerException

from launcher.tritonserver import TritonServer
from tests.e2e.triton_calls import LONG, GrpcStream, post, tensors
from tests.support.servers import PATIENCE, eventually, metric, triton_server

SHORT: dict[str, Any] = {"text_input": "short", "gen_length": 32, "ignore_eos": True}


PLACES, MOST_WAITING = 1, 6


@pytest.fixture(scope="module")
def narrow(checkpoint: Path) -> Iterator[TritonServer]:
    """A server whose engine has one place, and lets six requests wait for it."""
    settings = {"DLLM_MAX_NUM_SEQS": str(PLACES), "DLLM_MAX_QUEUE_SIZE": str(MOST_WAITING)}
    with triton_server(checkpoint, settings=settings) as server:
        yield server


class Queue:
    """Short requests behind a long one; remembers in which order they were answered."""

    def __init__(self, server: TritonServer) -> None:
        self._server = server
        self._threads: list[threading.Thread] = []
        self.answered: list[str] = []
        self.errors: dict[str, str] = {}

    def add(self, name: str, **fields: object) -> None:
        """Ask, on a thread of its own."""
        thread = threading.Thread(target=self._ask, args=(name, fields))
        self._threads.append(thread)
        thread.start()

    def join(self) -> None:
        for thread in self._threads:
            thread.join(PATIENCE)
            assert not thread.is_alive()

    def _ask(self, name: str, fields: dict[str, object]) -> None:
        try:
            with GrpcStream(self._server, SHORT | fields) as stream:
                [answer] = stream
                assert answer.finish_reason == "length"
                self.answered.append(name)
        except Exception as error:  # noqa: BLE001 - for the test to judge
            self.errors[name] = str(error)


def expect_waiting(server: TritonServer, count: int) -> None:
    """Wait until so many requests wait in the engine."""
    waiting = lambda: metric(server, "dllm_waiting_requests")  # noqa: E731
    eventually(lambda: waiting() == count, f"{count} requests wait")


def test_waiting_happens_in_the_engine(narrow: TritonServer) -> None:
    """While the engine is full requests wait; one too many is refused; the others are answered."""
    queue = Queue(narrow)
    with GrpcStream(narrow, LONG | {"stream": True}) as long:
        next(iter(long))
        for count, name in enumerate("abcdef", 1):
            queue.add(name)
            expect_waiting(narrow, count)
        assert queue.answered == []
        refused = post(narrow, SHORT)  # of any error, Triton makes a 400 here
        assert refused.status_code == 400
        assert "maximum queue size of 6 (DLLM_MAX_QUEUE_SIZE)" in refused.json()["error"]
        client = triton_http.InferenceServerClient(narrow.http_url)
        with pytest.raises(InferenceServerException, match="maximum queue size of 6") as error:
            client.infer("dllm_unary", tensors(narrow, triton_http, SHORT))
        assert error.value.status() == "503"
        client.close()
    queue.join()
    assert queue.errors == {}
    assert queue.answered == list("abcdef")
    expect_waiting(narrow, 0)


def test_priority_overtakes(narrow: TritonServer) -> None:
    """The most urgent of requests that arrive together is answered first."""
    queue = Queue(narrow)
    with GrpcStream(narrow, LONG | {"stream": True}) as long:
        next(iter(long))
        for name, priority in (("low", 3), ("low too", 3), ("urgent", 1), ("default", 2)):
            queue.add(name, priority=priority)
        expect_waiting(narrow, 4)
    queue.join()
    assert queue.errors == {}
    assert queue.answered[:2] == ["urgent", "default"]


def test_who_waits_gives_signs_of_life(narrow: TritonServer) -> None:
    """A stream brings events while its request waits, so that silence means a dead engine."""
    with GrpcStream(narrow, LONG | {"stream": True}) as long:
        next(iter(long))
        with GrpcStream(narrow, SHORT | {"stream": True, "stream_interval": 0.2}) as waiting:
            signs = [answer for answer, _ in zip(waiting, range(3), strict=False)]
    assert {sign.usage[2] for sign in signs} == {0}
    assert {sign.finish_reason for sign in signs} == {""}
    expect_waiting(narrow, 0)


def test_who_leaves_the_queue_is_not_run(narrow: TritonServer) -> None:
    """A caller that goes while its request waits makes room for another."""
    with GrpcStream(narrow, LONG | {"stream": True}) as long:
        next(iter(long))
        for _ in range(2):
            with ExitStack() as stack:
                for _ in range(MOST_WAITING):
                    stack.enter_context(GrpcStream(narrow, SHORT))
                expect_waiting(narrow, MOST_WAITING)
            expect_waiting(narrow, 0)


def test_request_that_runs_alone(triton: TritonServer) -> None:
    """With `exclusive` a request begins when nothing else runs, however many places are free."""
    with ExitStack() as stack:
        with GrpcStream(triton, LONG | {"stream": True}) as before:
            steps = iter(before)
            next(steps)
            alone = stack.enter_context(GrpcStream(triton, SHORT | {"exclusive": True}))
            for _ in range(3 * int(SHORT["gen_length"])):
                next(steps)
            assert alone.unanswered
        [answer] = alone
        assert answer.finish_reason == "length"


@pytest.mark.parametrize("model", ["dllm", "dllm_unary"])
def test_timeout_in_the_queue(narrow: TritonServer, model: str) -> None:
    """A request that waits for longer than its own time-out is refused; the others are answered."""
    queue = Queue(narrow)
    with GrpcStream(narrow, LONG | {"stream": True}) as long:
        next(iter(long))
        queue.add("patient")
        expect_waiting(narrow, 1)
        with (
            pytest.raises(Exception, match="request timeout expired"),
            GrpcStream(narrow, SHORT, model=model, timeout=200_000) as hasty,
        ):
            list(hasty)
    queue.join()
    assert queue.errors == {}
    assert queue.answered == ["patient"]
