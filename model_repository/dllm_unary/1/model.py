"""The Triton model `dllm_unary`: `infer()` of tritonclient, one request and one response.

`infer()` refuses decoupled models, so this one calls `dllm` inside the server and passes its one
response on. It never asks for a stream: relaying several responses this way hangs the server.
"""

from __future__ import annotations

import dataclasses
import json
import queue
import re
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
ENGINE_MODEL = "dllm"
#: Whoever had to wait for a thread for longer is asked whether he is still there.
LONG_WAIT_SECONDS = 0.1
#: While calls are in flight, the engine is asked so often whether it is still the same.
WATCH_SECONDS = 2.0
#: Triton may say for so long that it is dead: on a host short of processors it errs for moments.
PATIENCE_SECONDS = 10.0
LOST = "the engine was lost while it had this request"
STOPPING = "the server is stopping"
REFUSED = "the engine takes no more requests"
#: What is no fault of the request: it may be made again.
TRY_AGAIN = re.compile(
    f"exceeds maximum queue size|request timeout expired|not healthy|{LOST}|{STOPPING}|{REFUSED}"
)


@dataclasses.dataclass(eq=False)
class Call:
    """One request, and when it came and went to the engine (seconds, monotonic)."""

    request: Any
    sender: Any
    came: float
    began: float = 0.0
    answered: bool = False


class TritonPythonModel:
    """What Triton's Python backend loads."""

    def initialize(self, args: dict[str, str]) -> None:
        """Start a thread for each request that may be in flight; further ones wait for a thread."""
        config = json.loads(args["model_config"])
        fields = "|".join(tensor["name"] for tensor in config["input"])
        self._about_a_field = re.compile(rf"\b(?:{fields}): ")
        in_flight, waiting = (
            int(config["parameters"][name]["string_value"])
            for name in ("MAX_IN_FLIGHT", "MAX_QUEUE_SIZE")
        )
        self._queue_full = f"exceeds maximum queue size of {waiting} (MAX_QUEUE_SIZE)"
        self._places = threading.BoundedSemaphore(in_flight + waiting)
        self._calls: queue.SimpleQueue[Call] = queue.SimpleQueue()
        self._running: set[Call] = set()
        self._open = 0
        self._changed = threading.Condition()
        self._closing = threading.Event()
        #: Answers of the last probes: ours must be the last references (see `_ask_engine`).
        self._probes: deque[Any] = deque(maxlen=16)
        for _ in range(in_flight):
            self._start(self._work)
        self._start(self._watch)

    def execute(self, requests: list[Any]) -> None:
        """Hand each request to a thread, which answers through its response sender."""
        for request in requests:
            sender = request.get_response_sender()
            if self._places.acquire(blocking=False):
                with self._changed:
                    self._open += 1
                self._calls.put(Call(request, sender, time.monotonic()))
            else:
                sender.send(self._failed(self._queue_full), flags=FINAL)

    def finalize(self) -> None:
        """Wait for what is in flight; what waits for a thread is refused."""
        self._closing.set()
        with self._changed:
            self._changed.wait_for(lambda: self._open == 0)

    def _start(self, work: Callable[[], None]) -> None:
        threading.Thread(target=work, name="dllm-unary", daemon=True).start()

    def _work(self) -> None:
        while True:
            call = self._calls.get()
            call.began = time.monotonic()
            with self._changed:
                self._running.add(call)
            try:
                response = self._ask_engine(call)
            except Exception as error:  # noqa: BLE001
                # Nobody looks at what a thread raises, and the caller would wait for ever.
                response = self._failed(str(error))
            if not self._answer(call, response):
                return  # it was given up, and another thread has this one's place

    def _answer(self, call: Call, response: Any) -> bool:
        """Answer a call, unless it has been answered."""
        with self._changed:
            if call.answered:
                return False
            call.answered = True
            self._running.discard(call)
        try:
            call.sender.send(response, flags=FINAL)
        except pb_utils.TritonModelException as error:
            pb_utils.Logger.log_error(f"[dllm_unary] answer lost: {error}")
        finally:
            self._places.release()
            with self._changed:  # not before it is sent: finalize() waits for this
                self._open -= 1
                self._changed.notify_all()
        return True

    def _watch(self) -> None:
        """Answer the calls of an engine that is gone: Triton never does."""
        healthy = time.monotonic()
        while True:
            time.sleep(WATCH_SECONDS)
            with self._changed:
                running = list(self._running)
            asked = time.monotonic()
            started = self._engine_start() if running else 0.0
            if started is not None:
                healthy = asked
            elif asked - healthy > PATIENCE_SECONDS:
                started = healthy  # whatever comes next, it knows nothing of what was before
            for call in running:
                if call.began < (started or 0.0) and self._answer(call, self._failed(LOST)):
                    self._start(self._work)

    def _engine_start(self) -> float | None:
        """When the engine was started (seconds, monotonic).

        0 if it says nothing, as in a long step; None if Triton says that there is none.
        """
        found: queue.SimpleQueue[float | None] = queue.SimpleQueue()

        def ask() -> None:
            cancel = pb_utils.Tensor("cancel", np.array([[b"nobody"]], dtype=np.object_))
            probe = pb_utils.InferenceRequest(
                model_name=ENGINE_MODEL,
                requested_output_names=["text_output"],
                inputs=[cancel],
            )
            try:
                responses = probe.exec(decoupled=True)
                answers = [answer for answer in responses if _has_content(answer)]
            except pb_utils.TritonModelException:
                found.put(None)
                return
            self._probes.append((responses, answers))
            if not answers or answers[0].has_error():
                found.put(None)
                return
            [text] = answers[0].output_tensors()[0].as_numpy().reshape(-1)
            found.put(float(text))

        # On a thread of its own: an engine that dies now never answers it.
        self._start(ask)
        try:
            return found.get(timeout=PATIENCE_SECONDS)
        except queue.Empty:
            return 0.0

    def _ask_engine(self, call: Call) -> Any:
        request, waited = call.request, call.began - call.came
        if self._closing.is_set():
            return self._failed(STOPPING)
        if waited > LONG_WAIT_SECONDS and self._has_left(call):
            return self._failed("the caller has left")
        timeout = request.timeout()  # microseconds; 0: none
        if timeout:
            timeout -= int(waited * 1e6)
            if timeout <= 0:
                return self._failed("request timeout expired")
        question = pb_utils.InferenceRequest(
            model_name=ENGINE_MODEL,
            # Those and no others: an output that the caller did not ask for would be dropped by the
            # stub without Python's lock, and corrupt the interpreter's memory.
            requested_output_names=list(request.requested_output_names()),
            inputs=request.inputs(),
            request_id=request.request_id(),  # to be cancelled by
            parameters=json.loads(request.parameters() or "{}"),
            timeout=timeout,
        )
        responses = question.exec(decoupled=True)
        answers = [answer for answer in responses if _has_content(answer)]
        # A thread of the stub forgets the finished `responses`, again without the lock, so ours
        # must be the last reference. It takes its messages in order; once it has answered this
        # question, it has forgotten them.
        self._has_left(call)
        if not answers:
            return self._failed("the engine sent no answer")
        if answers[0].has_error():
            return self._failed(answers[0].error().message())
        return pb_utils.InferenceResponse(output_tensors=answers[0].output_tensors())

    def _has_left(self, call: Call) -> bool:
        """Whether the caller has left; asked of one who has been answered, it would be a crash:
        that reaches into memory that the server has freed."""
        with self._changed:
            return not call.answered and bool(call.sender.is_cancelled())

    def _failed(self, message: str) -> Any:
        # A call inside the server loses the error's code. The engine's messages about an input
        # start with its name, which is how an invalid argument is told from a failure.
        errors = pb_utils.TritonError
        if self._about_a_field.search(message):
            code = errors.INVALID_ARG
        elif TRY_AGAIN.search(message):
            code = errors.UNAVAILABLE
        else:
            code = errors.INTERNAL
        return pb_utils.InferenceResponse(error=errors(message, code))


def _has_content(answer: Any) -> bool:
    return bool(answer.has_error() or answer.output_tensors())
