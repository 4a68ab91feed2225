"""Two threads beside the engine's: one sends responses, one polls for cancellations and metrics.

The engine's thread must not wait for Triton: it puts updates into the outbox and goes on.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import triton_python_backend_utils as pb_utils
from dllm_engine import CanvasUpdate, Engine, EngineDead, EngineThread, Request
from dllm_metrics import Metrics
from dllm_peers import InstanceBus
from dllm_tensors import cancel_response, error_response, to_response

logger = logging.getLogger("dllm_engine.triton")

#: A request with this many unsent updates skips further ones. Each update carries the whole
#: canvas, so a slow reader sees fewer steps and misses nothing.
MAX_UNSENT = 64
#: Shortest pause between two polls for cancelled requests, and the share of its time that the
#: polling thread may compute. Each request costs a round trip to the server's process: 64 of them
#: every 40 ms cost a small model a sixteenth of its throughput on two cores. A cancel by id does
#: not wait for a poll (`ResponseDispatcher.cancel`).
WATCH_SECONDS = 0.02
WATCH_SHARE = 0.005
#: Queued requests that one poll asks about, in turn.
POLLED_WAITING = 8
METRICS_SECONDS = 1.0


@dataclasses.dataclass(eq=False)
class PendingRequest:
    """One request that is not answered yet, and the sender for its responses."""

    request: Request
    sender: Any
    #: Names of the requested outputs.
    outputs: frozenset[str]
    num_unsent: int = 0
    #: Held while the sender is used: any call to it after the final response reaches memory that
    #: the server has freed, and crashes it.
    lock: threading.Lock = dataclasses.field(default_factory=threading.Lock)
    answered: bool = False

    def send(self, response: Any, *, final: bool) -> None:
        """Send a response. The last one carries the final flag, so that no empty one follows."""
        flags = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL if final else 0
        with self.lock:
            self.answered = final
            self.sender.send(response, flags=flags)

    def answer(self, engine: Engine, update: CanvasUpdate) -> tuple[Any, bool]:
        """The response to an update, and whether it is the last; None: none is due."""
        response = to_response(engine, update, self.request.params, self.outputs)
        return response, update.finished

    def is_cancelled(self) -> bool:
        """Whether the client cancelled or disconnected."""
        with self.lock:
            return not self.answered and bool(self.sender.is_cancelled())


class _Countdown:
    """Calls `done` after `parts` calls of `count`."""

    def __init__(self, parts: int, done: Callable[[], None]) -> None:
        self._left = parts
        self._done = done
        self._lock = threading.Lock()

    def count(self) -> None:
        """One part is done."""
        with self._lock:
            self._left -= 1
            if self._left:
                return
        self._done()


class ResponseDispatcher:
    """Sends the engine's updates to Triton, and cancels requests whose clients disconnected."""

    def __init__(self, worker: EngineThread, model: str, instance: str) -> None:
        self._worker = worker
        self._started = time.monotonic()
        self._pending: dict[int, PendingRequest] = {}
        self._outbox: deque[Callable[[], None]] = deque()
        self._changed = threading.Condition()
        self._stopping = threading.Event()
        self._metrics = Metrics(model, instance)
        self._bus = self._join_bus(model, instance)
        self._threads = [
            threading.Thread(target=self._send_loop, name="dllm-send", daemon=True),
            threading.Thread(target=self._watch_loop, name="dllm-watch", daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def register(self, entry: PendingRequest) -> None:
        """Expect updates for this request."""
        with self._changed:
            self._pending[entry.request.request_id] = entry

    def forget(self, request_id: int) -> None:
        """Expect no more updates for this request: the model answers it itself."""
        with self._changed:
            entry = self._pending.pop(request_id, None)
        if entry is not None:
            with entry.lock:
                entry.answered = True

    def cancel(self, triton_id: str, sender: Any, outputs: Collection[str]) -> None:
        """End the requests with this id before each instance's next step, then answer `sender`.

        An unknown id ends nothing; the answer then shows that the engines take steps.

        Raises:
            EngineDead: this engine takes no steps any more.
        """
        answer = functools.partial(self._send_cancelled, sender, frozenset(outputs))
        parts = _Countdown(2, lambda: self._put(answer))
        self._end(triton_id, parts.count)
        if self._bus is None:
            parts.count()
        else:
            self._bus.broadcast_cancel(triton_id, parts.count)

    def _join_bus(self, model: str, instance: str) -> InstanceBus | None:
        # All instances are children of the server.
        folder = Path(tempfile.gettempdir()) / f"dllm-serve-{os.getppid()}-{model}"
        try:
            return InstanceBus(folder, instance, self._end_for_peer)
        except OSError as error:
            logger.warning("requests of other instances cannot be cancelled by id: %s", error)
            return None

    def _end(self, triton_id: str, done: Callable[[], None]) -> None:
        with self._changed:
            ids = [i for i, entry in self._pending.items() if entry.request.name == triton_id]
        for request_id in ids:
            self._worker.cancel(request_id)
        self._worker.call_between_steps(done)

    def _end_for_peer(self, triton_id: str, done: Callable[[], None]) -> None:
        try:
            self._end(triton_id, done)
        except EngineDead:
            done()  # it runs nothing any more

    def post(self, update: CanvasUpdate) -> None:
        """Queue an update for sending; called on the engine's thread."""
        with self._changed:
            entry = self._pending[update.request_id]
            if update.finished:
                del self._pending[update.request_id]
            elif entry.num_unsent >= MAX_UNSENT:
                return
            entry.num_unsent += 1
        self._put(functools.partial(self._send, entry, update))

    def _put(self, message: Callable[[], None]) -> None:
        with self._changed:
            self._outbox.append(message)
            self._changed.notify_all()

    def flush(self, timeout: float) -> bool:
        """Wait until everything is sent; False after `timeout` seconds."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._outbox, timeout)

    def close(self) -> None:
        """Send what is left, stop the threads and withdraw the metrics."""
        if self._bus is not None:
            self._bus.close()
        self._stopping.set()
        with self._changed:
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()
        self._metrics.close()

    def _send_loop(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._outbox or self._stopping.is_set())
                if not self._outbox:
                    return
                message = self._outbox[0]
            message()
            with self._changed:
                self._outbox.popleft()
                self._changed.notify_all()

    def _send(self, entry: PendingRequest, update: CanvasUpdate) -> None:
        try:
            response, final = entry.answer(self._worker.engine, update)
        except Exception as error:
            # A defect must not leave the client waiting for ever.
            logger.exception("answer not made request_id=%s", entry.request.name)
            response = error_response(f"answer not made: {error}", pb_utils.TritonError.INTERNAL)
            final = update.finished
        try:
            if response is not None:
                entry.send(response, final=final)
        except pb_utils.TritonModelException:
            logger.exception("response lost request_id=%s", entry.request.name)
        with self._changed:
            entry.num_unsent -= 1

    def _send_cancelled(self, sender: Any, outputs: Collection[str]) -> None:
        response = cancel_response(outputs, self._started)
        try:
            sender.send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
        except pb_utils.TritonModelException:
            logger.exception("answer to a cancel lost")

    def _watch_loop(self) -> None:
        waiting: list[PendingRequest] = []
        pause, published = WATCH_SECONDS, 0.0
        while not self._stopping.wait(pause):
            began, spent = time.monotonic(), time.thread_time()
            running = {request.request_id for request in self._worker.engine.scheduler.running}
            with self._changed:
                pending = dict(self._pending)
            waiting = waiting or [c for i, c in pending.items() if i not in running]
            for entry in [pending[i] for i in running if i in pending] + waiting[:POLLED_WAITING]:
                # Repeated until the final update: the engine may not know the request yet.
                if entry.is_cancelled():
                    self._worker.cancel(entry.request.request_id)
            del waiting[:POLLED_WAITING]
            pause = max(WATCH_SECONDS, (time.thread_time() - spent) / WATCH_SHARE)
            if began - published >= METRICS_SECONDS:
                self._metrics.publish(self._worker)
                published = began
