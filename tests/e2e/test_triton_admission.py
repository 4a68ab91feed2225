"""Requests beyond the engine's places wait in Triton's queue, under Triton's rules."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from launcher.tritonserver import TritonServer
from tests.e2e.triton_calls import LONG, GrpcStream
from tests.support.servers import PATIENCE, eventually, metric, triton_server

SHORT: dict[str, Any] = {"text_input": "short", "gen_length": 32, "ignore_eos": True}


@pytest.fixture(scope="module")
def narrow(checkpoint: Path) -> Iterator[TritonServer]:
    """A server whose engine has one place."""
    with triton_server(checkpoint, settings={"DLLM_MAX_NUM_SEQS": "1"}) as server:
        yield server


class Queue:
    """Short requests behind a long one; remembers in which order they were answered.

    Of the first two, Triton hands one to the engine, which lets it wait at the door, and keeps
    one ready. Those after them are in the queue proper.
    """

    def __init__(self, server: TritonServer) -> None:
        self._server = server
        self._threads: list[threading.Thread] = []
        self.answered: list[str] = []
        self.errors: dict[str, str] = {}

    def add(self, name: str, **options: int) -> None:
        thread = threading.Thread(target=self._ask, args=(name, options))
        self._threads.append(thread)
        thread.start()
        # Each must have arrived before the next: all but the first count as pending.
        self.expect_pending(len(self._threads) - len(self.errors) - 1)

    def expect_pending(self, count: int) -> None:
        eventually(
            lambda: metric(self._server, "nv_inference_pending_request_count") >= count,
            f"{count} requests are pending",
        )
        if count == 0:
            time.sleep(0.5)  # the first leaves the queue at once, so that there is nothing to see

    def join(self) -> None:
        for thread in self._threads:
            thread.join(PATIENCE)
            assert not thread.is_alive()

    def _ask(self, name: str, options: dict[str, int]) -> None:
        try:
            with GrpcStream(self._server, SHORT, **options) as stream:  # type: ignore[arg-type]
                [answer] = stream
                assert answer.finish_reason == "length"
                self.answered.append(name)
        except Exception as error:  # noqa: BLE001 - for the test to judge
            self.errors[name] = str(error)


def test_waiting_happens_in_tritons_queue(narrow: TritonServer) -> None:
    """While the engine is full requests are pending in Triton; afterwards all are answered."""
    queue = Queue(narrow)
    with GrpcStream(narrow, LONG | {"stream": True}) as long:
        next(iter(long))
        for name in "abcdef":
            queue.add(name)
        assert queue.answered == []
    queue.join()
    assert queue.errors == {}
    assert sorted(queue.answered) == list("abcdef")
    assert metric(narrow, "nv_inference_pending_request_count") == 0


def test_priority_overtakes(narrow: TritonServer) -> None:
    """A request of priority 1 is answered before those of priority 2 that were queued earlier."""
    queue = Queue(narrow)
    with GrpcStream(narrow, LONG | {"stream": True}) as long:
        next(iter(long))
        for name in ("at the door", "ready", "early"):
            queue.add(name, priority=2)
        queue.add("default")
        queue.add("urgent", priority=1)
    queue.join()
    assert queue.errors == {}
    assert queue.answered.index("urgent") < queue.answered.index("early")
    assert queue.answered.index("urgent") < queue.answered.index("default")


def test_request_that_runs_alone(triton: TritonServer) -> None:
    """With `alone` a request begins when nothing else runs, however many places are free."""
    with ExitStack() as stack:
        with GrpcStream(triton, LONG | {"stream": True}) as before:
            steps = iter(before)
            next(steps)
            alone = stack.enter_context(GrpcStream(triton, SHORT | {"alone": True}))
            for _ in range(3 * int(SHORT["gen_length"])):
                next(steps)
            assert alone.unanswered
        [answer] = alone
        assert answer.finish_reason == "length"


def test_timeout_in_the_queue(narrow: TritonServer) -> None:
    """A request that waits for longer than its own time-out is refused; the others are answered."""
    queue = Queue(narrow)
    with GrpcStream(narrow, LONG | {"stream": True}) as long:
        next(iter(long))
        for name in ("at the door", "ready", "patient"):
            queue.add(name)
        with (
            pytest.raises(Exception, match="Request timeout expired"),
            GrpcStream(narrow, SHORT, timeout=200_000) as hasty,
        ):
            list(hasty)
    queue.join()
    assert queue.errors == {}
    assert sorted(queue.answered) == ["at the door", "patient", "ready"]
