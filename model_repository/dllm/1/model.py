"""The Triton model `dllm`: hands requests to the engine and its updates back.

Decoupled: a request gets one response, or one per step with `stream`. Requests wait in the engine,
under its priorities and limits, so that `execute` returns at once.
"""

from __future__ import annotations

import gc
import logging
import os
import sys
import time
from typing import Any

import triton_python_backend_utils as pb_utils
from dllm_dispatcher import PendingRequest, ResponseDispatcher
from dllm_engine import (
    Engine,
    EngineConfig,
    EngineDead,
    EngineThread,
    InvalidRequest,
    QueueFull,
)
from dllm_fail_fast import FailFast
from dllm_readings import ReadingGroup, is_reading
from dllm_settings import (
    EXIT_ON_ENGINE_DEATH,
    log_to_triton,
    openable,
    parse_switch,
    read_settings,
)
from dllm_tensors import (
    check_response,
    describe_response,
    error_response,
    inputs_of,
    is_check,
    is_describe,
    parse_cancel,
    parse_request,
)

logger = logging.getLogger("dllm_engine.triton")

FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
#: How long unloading waits for running requests.
DRAIN_SECONDS = 30
#: A dead engine refuses new requests for this long before its process ends.
NOTICE_SECONDS = 1.0
#: How long a thread may keep Python's lock while another waits for it. The engine's thread gives
#: the lock up in every tensor operation; with Python's 5 ms it would wait that long for it each
#: time, behind the thread that turns tokens into responses.
SWITCH_SECONDS = 50e-6


class TritonPythonModel:
    """The model as Triton's Python backend loads it."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the checkpoint; an error here is a failed model load that carries its message."""
        log_to_triton()
        sys.setswitchinterval(SWITCH_SECONDS)
        settings = read_settings(args)
        fail_fast = parse_switch(EXIT_ON_ENGINE_DEATH, settings.pop(EXIT_ON_ENGINE_DEATH, ""))
        logger.info("loading checkpoint path=%s", settings["MODEL_PATH"])
        with openable(settings) as mapping:
            engine = Engine(EngineConfig.from_mapping(mapping))
        self._worker = EngineThread(engine, on_death=self._on_engine_death)
        self._dispatcher = ResponseDispatcher(
            self._worker, args["model_name"], args["model_instance_name"]
        )
        # These objects stay: a full collection that visits them takes as long as several steps.
        gc.collect()
        gc.freeze()
        self._fail_fast = FailFast()
        if fail_fast:
            self._fail_fast.arm()

    def execute(self, requests: list[Any]) -> None:
        """Queue a batch with the engine; the dispatcher's thread sends the responses."""
        for request in requests:
            sender = request.get_response_sender()
            try:
                self._submit(request, sender)
            except InvalidRequest as error:
                _refuse(sender, error, pb_utils.TritonError.INVALID_ARG)
            except QueueFull as error:
                _refuse(sender, error, pb_utils.TritonError.UNAVAILABLE)
            except EngineDead as error:
                # The engine was dead before: this request did not kill it.
                refusal = EngineDead(f"the engine takes no more requests: {error}")
                _refuse(sender, refusal, pb_utils.TritonError.UNAVAILABLE)
            except Exception as error:
                # A defect that one request meets must not fail its whole batch.
                logger.exception("request not parsed")
                _refuse(sender, error, pb_utils.TritonError.INTERNAL)

    def finalize(self) -> None:
        """Finish running requests and stop every thread; an engine that hangs is left behind."""
        self._fail_fast.disarm()
        if not self._worker.close(timeout=DRAIN_SECONDS):
            logger.error("engine did not finish within %d s, leaving it", DRAIN_SECONDS)
        self._dispatcher.close()

    def _submit(self, request: Any, sender: Any) -> None:
        outputs = frozenset(request.requested_output_names())
        inputs = inputs_of(request)
        if ends := parse_cancel(inputs):
            self._dispatcher.cancel(ends, sender, outputs)
            return
        if is_describe(inputs):
            sender.send(describe_response(self._worker.engine, outputs), flags=FINAL)
            return
        if is_check(inputs):
            response = check_response(self._worker.engine, request, inputs, outputs)
            sender.send(response, flags=FINAL)
            return
        if is_reading(inputs):
            self._submit_group(ReadingGroup(self._worker.engine, request, inputs, sender, outputs))
            return
        parsed = parse_request(self._worker.engine, request, inputs)
        self._dispatcher.register(PendingRequest(parsed, sender, outputs))
        try:
            self._worker.submit(parsed, self._dispatcher.post)
        except (EngineDead, QueueFull):
            self._dispatcher.forget(parsed.request_id)
            raise

    def _submit_group(self, group: ReadingGroup) -> None:
        """Queue all requests of a group or none."""
        for index, part in enumerate(group.parts):
            self._dispatcher.register(part)
            try:
                self._worker.submit(part.request, self._dispatcher.post)
            except (EngineDead, QueueFull):
                group.refuse()
                self._dispatcher.forget(part.request.request_id)
                for earlier in group.parts[:index]:
                    self._worker.cancel(earlier.request.request_id)
                raise

    def _on_engine_death(self, death: EngineDead) -> None:
        # Nothing here can work again, and a process that lives on would look healthy. Its end is
        # the server's as well (dllm_fail_fast.py).
        logger.critical("engine dead, ending the process: %s", death)
        self._dispatcher.flush(timeout=5)
        time.sleep(NOTICE_SECONDS)
        os._exit(1)


def _refuse(sender: Any, error: Exception, code: int) -> None:
    sender.send(error_response(str(error), code), flags=FINAL)
