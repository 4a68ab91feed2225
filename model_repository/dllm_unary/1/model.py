"""The Triton model `dllm_unary`: `infer()` of tritonclient, one request and one response.

`infer()` refuses decoupled models, so this one calls `dllm` inside the server and passes its one
response on. It never asks for a stream: relaying several responses this way hangs the server.
"""

from __future__ import annotations

import json
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import triton_python_backend_utils as pb_utils

FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
ENGINE_MODEL = "dllm"
#: Whoever had to wait for a thread for longer is asked whether he is still there.
LONG_WAIT_SECONDS = 0.1
QUEUED_IN_VAIN = re.compile("exceeds maximum queue size|request timeout expired")


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
        self._closing = threading.Event()
        self._places = threading.BoundedSemaphore(in_flight + waiting)
        self._pool = ThreadPoolExecutor(in_flight, thread_name_prefix="dllm-unary")

    def execute(self, requests: list[Any]) -> None:
        """Hand each request to a thread, which answers through its response sender."""
        for request in requests:
            sender = request.get_response_sender()
            if self._places.acquire(blocking=False):
                self._pool.submit(self._answer, request, sender, time.monotonic())
            else:
                sender.send(self._failed(self._queue_full), flags=FINAL)

    def finalize(self) -> None:
        """Wait for what is in flight; what waits for a thread is refused."""
        self._closing.set()
        self._pool.shutdown(wait=True)

    def _answer(self, request: Any, sender: Any, came: float) -> None:
        try:
            response = self._ask_engine(request, sender, time.monotonic() - came)
        except Exception as error:  # noqa: BLE001
            # Nobody looks at what a thread of the pool raises, and the caller would wait for ever.
            response = self._failed(str(error))
        finally:
            self._places.release()
        sender.send(response, flags=FINAL)

    def _ask_engine(self, request: Any, sender: Any, waited: float) -> Any:
        if self._closing.is_set():
            return self._failed("the server is stopping")
        if waited > LONG_WAIT_SECONDS and sender.is_cancelled():
            return self._failed("the caller has left")
        timeout = request.timeout()  # microseconds; 0: none
        if timeout:
            timeout -= int(waited * 1e6)
            if timeout <= 0:
                return self._failed("request timeout expired")
        call = pb_utils.InferenceRequest(
            model_name=ENGINE_MODEL,
            # Those and no others: an output that the caller did not ask for would be dropped by the
            # stub without Python's lock, and corrupt the interpreter's memory.
            requested_output_names=list(request.requested_output_names()),
            inputs=request.inputs(),
            request_id=request.request_id(),  # to be cancelled by
            parameters=json.loads(request.parameters() or "{}"),
            timeout=timeout,
        )
        responses = call.exec(decoupled=True)
        answers = [answer for answer in responses if _has_content(answer)]
        # A thread of the stub forgets the finished `responses`, again without the lock, so ours
        # must be the last reference. It takes its messages in order; once it has answered this
        # question, it has forgotten them.
        sender.is_cancelled()
        if not answers:
            return self._failed("the engine sent no answer")
        if answers[0].has_error():
            return self._failed(answers[0].error().message())
        return pb_utils.InferenceResponse(output_tensors=answers[0].output_tensors())

    def _failed(self, message: str) -> Any:
        # A call inside the server loses the error's code. The engine's messages about an input
        # start with its name, which is how an invalid argument is told from a failure.
        errors = pb_utils.TritonError
        if self._about_a_field.search(message):
            code = errors.INVALID_ARG
        elif QUEUED_IN_VAIN.search(message):
            code = errors.UNAVAILABLE
        else:
            code = errors.INTERNAL
        return pb_utils.InferenceResponse(error=errors(message, code))


def _has_content(answer: Any) -> bool:
    return bool(answer.has_error() or answer.output_tensors())
