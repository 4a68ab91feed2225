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
from typing import Any

import triton_python_backend_utils as pb_utils

FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
#: A call that waited for a thread for longer is dropped if its client has disconnected.
LONG_WAIT_SECONDS = 0.1
STOPPING = "the server is stopping"
REFUSED = "the engine takes no more requests"
#: Errors that are not the request's fault: the client may repeat it.
TRY_AGAIN = re.compile(
    f"exceeds maximum queue size|request timeout expired|not healthy|{STOPPING}|{REFUSED}"
)


@dataclasses.dataclass(eq=False)
class Call:
    """One request, when it arrived and when a thread took it (seconds, monotonic)."""

    request: Any
    sender: Any
    came: float
    began: float = 0.0


class TritonPythonModel:
    """What Triton's Python backend loads."""

    def initialize(self, args: dict[str, str]) -> None:
        """Start a thread for each request that may be in flight; further ones wait for a thread."""
        config = json.loads(args["model_config"])
        self._engine = config["parameters"]["ENGINE_MODEL"]["string_value"]
        fields = "|".join(tensor["name"] for tensor in config["input"])
        self._about_a_field = re.compile(rf"\b(?:{fields}): ")
        in_flight, waiting = (
            int(config["parameters"][name]["string_value"])
            for name in ("MAX_IN_FLIGHT", "MAX_QUEUE_SIZE")
        )
        self._queue_full = f"exceeds maximum queue size of {waiting} (MAX_QUEUE_SIZE)"
        self._places = threading.BoundedSemaphore(in_flight + waiting)
        self._calls: queue.SimpleQueue[Call] = queue.SimpleQueue()
        self._open = 0
        self._changed = threading.Condition()
        self._closing = threading.Event()
        for _ in range(in_flight):
            threading.Thread(target=self._work, name="dllm-unary", daemon=True).start()

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
        """Wait for requests in flight; refuse those that wait for a thread."""
        self._closing.set()
        with self._changed:
            self._changed.wait_for(lambda: self._open == 0)

    def _work(self) -> None:
        while True:
            call = self._calls.get()
            call.began = time.monotonic()
            try:
                response = self._ask_engine(call)
            except Exception as error:  # noqa: BLE001
                # An error that a thread raises is lost, and the client would wait for ever.
                response = self._failed(str(error))
            self._answer(call, response)

    def _answer(self, call: Call, response: Any) -> None:
        try:
            call.sender.send(response, flags=FINAL)
        except pb_utils.TritonModelException as error:
            pb_utils.Logger.log_error(f"[dllm_unary] answer lost: {error}")
        finally:
            self._places.release()
            with self._changed:  # not before it is sent: finalize() waits for this
                self._open -= 1
                self._changed.notify_all()

    def _ask_engine(self, call: Call) -> Any:
        request, waited = call.request, call.began - call.came
        if self._closing.is_set():
            return self._failed(STOPPING)
        if waited > LONG_WAIT_SECONDS and call.sender.is_cancelled():
            return self._failed("the client has disconnected")
        timeout = request.timeout()  # microseconds; 0: none
        if timeout:
            timeout -= int(waited * 1e6)
            if timeout <= 0:
                return self._failed("request timeout expired")
        question = pb_utils.InferenceRequest(
            model_name=self._engine,
            # No others: the stub drops an output that was not requested without Python's lock, and
            # corrupts the interpreter's memory.
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
        call.sender.is_cancelled()
        if not answers:
            return self._failed("the engine sent no answer")
        if answers[0].has_error():
            return self._failed(answers[0].error().message())
        return pb_utils.InferenceResponse(output_tensors=answers[0].output_tensors())

    def _failed(self, message: str) -> Any:
        # A call inside the server loses the error's code. But the engine's messages about an input
        # start with its name, which tells an invalid argument from a failure.
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
