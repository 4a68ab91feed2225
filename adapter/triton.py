"""The engine behind Triton: tensors out, events in, gRPC errors mapped to ours."""

import asyncio
import re
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import aclosing, suppress
from typing import Any

import grpc
import numpy as np
from tritonclient.grpc import InferenceServerException, InferInput, InferRequestedOutput
from tritonclient.grpc.aio import InferenceServerClient

from adapter.errors import (
    AdapterError,
    EngineDead,
    EngineError,
    EngineFailure,
    InvalidRequest,
    ModelControlRefused,
    Overloaded,
    StreamLost,
    Unavailable,
)
from adapter.generation import (
    DEFAULT_PRIORITY,
    Canvas,
    Detail,
    Event,
    Inputs,
    InputValue,
    Usage,
)
from adapter.tracing import TRACEPARENT

#: Data type of every input (`model_repository/dllm/config.pbtxt`).
INPUT_TYPES: Mapping[str, str] = {
    "text_input": "BYTES",
    "messages": "BYTES",
    "input_ids": "INT32",
    "suffix": "BYTES",
    "canvas_ids": "INT32",
    "temperature": "FP32",
    "gen_length": "INT32",
    "steps": "INT32",
    "block_length": "INT32",
    "cfg_scale": "FP32",
    "remasking": "BYTES",
    "confidence_threshold": "FP32",
    "factor": "FP32",
    "entropy_bound": "FP32",
    "low_threshold": "FP32",
    "credit": "BOOL",
    "anchor_threshold": "FP32",
    "neighbor_threshold": "FP32",
    "alg": "BYTES",
    "alg_temp": "FP32",
    "top_p": "FP32",
    "top_k": "INT32",
    "seed": "INT64",
    "logits_eos_inf": "BOOL",
    "confidence_eos_eot_inf": "BOOL",
    "stop": "BYTES",
    "ignore_eos": "BOOL",
    "cache": "BYTES",
    "retention_ratio": "FP32",
    "pool_kernel": "INT32",
    "delay_steps": "INT32",
    "refresh_interval": "INT32",
    "priority": "INT32",
    "alone": "BOOL",
    "stream": "BOOL",
    "stream_interval": "FP32",
    "cancel": "BYTES",
}
NUMPY_TYPES: Mapping[str, type[Any]] = {
    "BYTES": np.object_,
    "INT32": np.int32,
    "INT64": np.int64,
    "FP32": np.float32,
    "BOOL": np.bool_,
}
OUTPUTS = ("text_output", "finish_reason", "usage", "seed")
CANCEL_OUTPUTS = ("finish_reason",)
CANVAS_OUTPUTS = ("token_ids", "token_texts", "confidence", "block")

# Left alone, gRPC waits for up to two minutes before it looks for a server that went away.
CHANNEL_OPTIONS: Sequence[tuple[str, int]] = (
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.min_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 2000),
)

#: The id of no request: they all have a dash.
NOBODY = "nobody"
END_OF_STREAM_SECONDS = 1.0
CANCEL_SECONDS = 5.0
INDEX_SECONDS = 10.0

#: What Triton says in a message; looked at first. On a stream an error has no code: the header
#: `triton_grpc_error` would keep it, but with it a few refused requests in a row crash the server
#: (2.51; docs/decisions/008-errors-by-text.md).
ERROR_TEXTS: Sequence[tuple[str, type[AdapterError]]] = (
    ("stub process", EngineDead),
    ("request for unknown model", Unavailable),
    ("exceeds maximum queue size", Overloaded),
    ("request timeout expired", Overloaded),
    ("explicit model load / unload is not allowed", ModelControlRefused),
)
ERROR_CODES: Mapping[str, type[AdapterError]] = {
    "INVALID_ARGUMENT": InvalidRequest,
    "RESOURCE_EXHAUSTED": Overloaded,
    "DEADLINE_EXCEEDED": Unavailable,
    "UNAVAILABLE": Unavailable,
    "NOT_FOUND": Unavailable,  # the model is not loaded
    "CANCELLED": StreamLost,
}
REQUEST_ID_PREFIX = re.compile(r"^(in ensemble '[^']*', )?\[request id: [^\]]*\] ")


class TritonEngine:
    """`generation.Engine` over Triton's gRPC API; make it inside a running event loop."""

    def __init__(
        self, url: str, model_name: str, *, stream_interval: float, reload_timeout: float
    ) -> None:
        self._client = InferenceServerClient(url, channel_args=list(CHANNEL_OPTIONS))
        self._model_name = model_name
        self._stream_interval = stream_interval
        self._reload_timeout = reload_timeout
        self._cancelling: set[asyncio.Task[None]] = set()

    async def close(self) -> None:
        """Close the channel, and with it every stream."""
        if self._cancelling:
            await asyncio.wait(self._cancelling, timeout=CANCEL_SECONDS)
        await self._client.close()

    async def generate(
        self,
        inputs: Inputs,
        *,
        request_id: str,
        detail: Detail = Detail.RESULT,
        priority: int = DEFAULT_PRIORITY,
    ) -> AsyncGenerator[Event, None]:
        """Stream the events of one request; see `generation.Engine.generate`."""
        interval = self._stream_interval if detail is Detail.RESULT else 0.0
        streaming: Inputs = {"stream": True, "stream_interval": interval, "priority": priority}
        outputs = OUTPUTS + CANVAS_OUTPUTS if detail is Detail.CANVAS else OUTPUTS
        request = self._request({**inputs, **streaming}, request_id=request_id, outputs=outputs)
        ended = False
        try:
            async with aclosing(self._stream(request)) as events:
                async for event in events:
                    ended = bool(event.finish_reason)
                    yield event
                    if ended:
                        return
        except (asyncio.CancelledError, GeneratorExit):
            if not ended:
                self.cancel(request_id)
            raise

    def cancel(self, request_id: str) -> None:
        """Tell the engine, which asks its callers now and then only whether they are there."""
        task = asyncio.create_task(self._cancel(request_id), name="engine-cancel")
        self._cancelling.add(task)
        task.add_done_callback(self._cancelling.discard)

    async def probe(self) -> None:
        """See whether the engine takes steps: it answers between two of them, however many wait."""
        await self._end(NOBODY)

    async def loading(self) -> bool:
        """Whether Triton loads or unloads the model now: it goes on when who asked for it dies."""
        try:
            index = await self._client.get_model_repository_index(client_timeout=INDEX_SECONDS)
        except InferenceServerException as error:
            raise map_error(error.status(), error.message()) from error
        states = {model.state for model in index.models if model.name == self._model_name}
        return bool(states & {"LOADING", "UNLOADING"})

    async def reload(self) -> None:
        """Unload and load the model: loading alone does nothing while its files are the same."""
        bound = self._reload_timeout
        try:
            await self._client.unload_model(self._model_name, client_timeout=bound)
            await self._client.load_model(self._model_name, client_timeout=bound)
        except InferenceServerException as error:
            failure = map_error(error.status(), error.message())
            if isinstance(failure, InvalidRequest):  # so Triton calls a model that does not load
                failure = EngineFailure(str(failure))
            raise failure from error

    def _request(
        self,
        inputs: Inputs,
        *,
        request_id: str,
        outputs: Sequence[str] = OUTPUTS,
    ) -> dict[str, Any]:
        return {
            "model_name": self._model_name,
            "inputs": [make_tensor(name, value) for name, value in inputs.items()],
            "outputs": [InferRequestedOutput(name) for name in outputs],
            "request_id": request_id,
        }

    async def _stream(self, request: dict[str, Any]) -> AsyncGenerator[Event, None]:
        traceparent = TRACEPARENT.get()
        headers = {"traceparent": traceparent} if traceparent else None
        responses = self._client.stream_infer(_only(request), headers=headers)
        try:
            async for result, error in responses:
                if error is not None:
                    raise map_error(error.status(), error.message())
                event = read_event(result)
                if event.finish_reason:
                    await _drain(responses)
                yield event
        except grpc.aio.AioRpcError as error:
            raise map_error(error.code().name, error.details() or "") from error
        finally:
            responses.cancel()

    async def _cancel(self, request_id: str) -> None:
        with suppress(TimeoutError, EngineError):
            async with asyncio.timeout(CANCEL_SECONDS):
                await self._end(request_id)

    async def _end(self, request_id: str) -> None:
        """End the requests of this id; returns once the engine has done it."""
        request = self._request({"cancel": request_id}, request_id="cancel", outputs=CANCEL_OUTPUTS)
        async with aclosing(self._stream(request)) as events:
            async for _ in events:
                return
        msg = "the stream of a cancel ended without an event"
        raise StreamLost(msg)


def make_tensor(name: str, value: InputValue) -> InferInput:
    """The input as a batch of one. Raises KeyError for a name that the model does not have."""
    datatype = INPUT_TYPES[name]
    values = value if isinstance(value, list) else [value]
    encoded = [item.encode() if isinstance(item, str) else item for item in values]
    array = np.array([encoded], dtype=NUMPY_TYPES[datatype])
    tensor = InferInput(name, list(array.shape), datatype)
    tensor.set_data_from_numpy(array)
    return tensor


def read_event(result: Any) -> Event:
    """One response of the model; an output that it left out keeps its default."""
    usage = result.as_numpy("usage")
    seed = result.as_numpy("seed")
    return Event(
        text=_text(result.as_numpy("text_output")),
        finish_reason=_text(result.as_numpy("finish_reason")),
        usage=None if usage is None else Usage(*(int(count) for count in usage.reshape(-1))),
        seed=None if seed is None else int(seed.reshape(-1)[0]),
        canvas=_canvas(result),
    )


def _canvas(result: Any) -> Canvas | None:
    """The canvas, where the response has one."""
    texts = result.as_numpy("token_texts")
    if texts is None:
        return None
    index, start, end = result.as_numpy("block").reshape(-1).tolist()
    return Canvas(
        token_ids=result.as_numpy("token_ids").reshape(-1).tolist(),
        token_texts=[text.decode() for text in texts.reshape(-1)],
        confidence=result.as_numpy("confidence").reshape(-1).tolist(),
        block=(index, start, end),
    )


def map_error(code: str | None, message: str) -> AdapterError:
    """Our error for a gRPC one: by its text where Triton's code says little, else by its code.

    The engine's complaints about an input begin with the input's name and a colon.
    """
    text = REQUEST_ID_PREFIX.sub("", message).strip() or "no reason given"
    if text.partition(":")[0] in INPUT_TYPES:
        return InvalidRequest(text)
    for fragment, kind in ERROR_TEXTS:
        if fragment in text.lower():
            return kind(text)
    name = (code or "").removeprefix("StatusCode.")
    return ERROR_CODES.get(name, EngineFailure)(text)


def _text(array: Any) -> str:
    if array is None or array.size == 0:
        return ""
    # PostgreSQL cannot keep a NUL.
    return str(array.reshape(-1)[0].decode(errors="replace")).replace("\x00", "\ufffd")


async def _drain(responses: AsyncIterator[Any]) -> None:
    """Let a stream end that has said all: Triton logs an error when it is cancelled instead."""
    with suppress(TimeoutError):
        async with asyncio.timeout(END_OF_STREAM_SECONDS):
            async for _ in responses:
                pass


async def _only(request: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
    yield request
