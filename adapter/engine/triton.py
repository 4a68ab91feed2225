"""The engine behind Triton: requests out, events in, gRPC errors mapped to ours."""

import asyncio
import json
import re
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import fields, replace
from ipaddress import ip_address
from typing import Any

import grpc
from tritonclient.grpc import service_pb2

from adapter.engine.channel import Headers, TritonChannel, TritonCredentials
from adapter.engine.tensors import (
    CANVAS_OUTPUTS,
    DETAILS_INPUTS,
    DETAILS_OUTPUT,
    INPUT_TYPES,
    OUTPUTS,
    make_request,
    read_event,
)
from adapter.errors import (
    AdapterError,
    ConnectionLost,
    EngineDead,
    EngineDraining,
    EngineError,
    EngineFailure,
    InvalidRequest,
    Overloaded,
    StreamInterrupted,
    Unavailable,
    refusal,
)
from adapter.telemetry.tracing import TRACEPARENT
from adapter.types import (
    DEFAULT_PRIORITY,
    CheckResult,
    Event,
    Inputs,
    ModelInfo,
    Repository,
    StreamDetail,
)

CHECK_OUTPUTS = ("finish_reason", "text_output")
CANCEL_OUTPUTS = ("finish_reason", "text_output")
DESCRIBE_OUTPUTS = ("finish_reason", "text_output")

# Left alone, gRPC waits for up to two minutes before it looks for a server that went away.
CHANNEL_OPTIONS: Sequence[tuple[str, int]] = (
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.min_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 2000),
)

#: No request has this id: the ids of requests contain a dash.
PROBE_ID = "probe"
END_OF_STREAM_SECONDS = 1.0
CANCEL_SECONDS = 5.0

#: What Triton says in a message; looked at first. On a stream an error has no code: the header
#: `triton_grpc_error` would keep it, but with it a few refused requests in a row crash the server
#: (2.51; docs/decisions/008-errors-by-text.md).
ERROR_TEXTS: Sequence[tuple[str, type[AdapterError]]] = (
    ("stub process", EngineDead),
    ("request for unknown model", Unavailable),
    ("exceeds maximum queue size", Overloaded),
    ("request timeout expired", Overloaded),
    ("the server is stopping", EngineDraining),
    ("the engine takes no more requests", EngineDraining),
    # gRPC's own words for a connection that ended under a request.
    ("socket closed", ConnectionLost),
    ("connection reset", ConnectionLost),
    ("broken pipe", ConnectionLost),
    ("ping timeout", ConnectionLost),
    ("stream removed", ConnectionLost),
)
ERROR_CODES: Mapping[str, type[AdapterError]] = {
    "INVALID_ARGUMENT": InvalidRequest,
    "RESOURCE_EXHAUSTED": Overloaded,
    "DEADLINE_EXCEEDED": Unavailable,
    "UNAVAILABLE": Unavailable,
    "NOT_FOUND": Unavailable,  # the model is not loaded
    "CANCELLED": StreamInterrupted,
}
NO_CREDENTIALS = TritonCredentials()
REQUEST_ID_PREFIX = re.compile(r"^(in ensemble '[^']*', )?\[request id: [^\]]*\] ")


def _keepalive(idle_timeout: float) -> Sequence[tuple[str, int]]:
    """Close a connection within `idle_timeout` seconds when the other host is gone.

    Without pings gRPC keeps it, and every new stream on it, for a quarter of an hour.

    Triton takes the fourth ping for abuse if it has sent nothing in between. That happens after
    twice `idle_timeout`, and after two minutes at the earliest, since gRPC then sends at most one
    ping a minute.
    """
    half = round(idle_timeout * 1000) // 2
    return (
        ("grpc.keepalive_time_ms", half),
        ("grpc.keepalive_timeout_ms", half),
        ("grpc.http2.ping_timeout_ms", half),
    )


def _proxy(url: str) -> Sequence[tuple[str, int]]:
    """Reach this machine itself without the environment's proxies (`http_proxy`, `grpc_proxy`).

    Other targets are left to `no_proxy`: their proxy may be the only way there.
    """
    host = url.rpartition(":")[0].strip("[]")
    try:
        loopback = ip_address(host).is_loopback
    except ValueError:
        loopback = host == "localhost"
    return (("grpc.enable_http_proxy", 0),) if loopback else ()


class TritonEngine:
    """`types.Engine` over Triton's gRPC API; make it inside a running event loop."""

    def __init__(
        self,
        url: str,
        model_name: str,
        *,
        stream_interval: float,
        idle_timeout: float,
        credentials: TritonCredentials = NO_CREDENTIALS,
        found_by: str = "",
    ) -> None:
        """Connect to `url`, an address that the name in `found_by` has, or that name itself."""
        options = (*CHANNEL_OPTIONS, *_keepalive(idle_timeout), *_proxy(url))
        if found_by not in ("", url):
            # Its certificate is for the name; a host with addresses of its own needs no proxy.
            options += (("grpc.enable_http_proxy", 0),)
            name = credentials.tls_name or found_by.rpartition(":")[0]
            credentials = replace(credentials, tls_name=name if credentials.ca_file else "")
        self._channel = TritonChannel(url, options, credentials)
        self._model_name = model_name
        self._stream_interval = stream_interval
        self._cancelling: set[asyncio.Task[None]] = set()

    async def close(self) -> None:
        """Close the channel, and with it every stream."""
        if self._cancelling:
            await asyncio.wait(self._cancelling, timeout=CANCEL_SECONDS)
        await self._channel.close()

    async def generate(
        self,
        inputs: Inputs,
        *,
        request_id: str,
        detail: StreamDetail = StreamDetail.RESULT,
        priority: int = DEFAULT_PRIORITY,
    ) -> AsyncGenerator[Event, None]:
        """Stream the events of one request; see `types.Engine.generate`."""
        interval = self._stream_interval if detail is StreamDetail.RESULT else 0.0
        streaming: Inputs = {"stream": True, "stream_interval": interval, "priority": priority}
        outputs = OUTPUTS + CANVAS_OUTPUTS if detail is StreamDetail.CANVAS else OUTPUTS
        if any(name in inputs for name in DETAILS_INPUTS):
            outputs = (*outputs, DETAILS_OUTPUT)
        request = self._request({**inputs, **streaming}, request_id=request_id, outputs=outputs)
        ended = False
        try:
            with self._open_stream(request) as responses:
                async for response in responses:
                    event = _event(response)
                    if event.finish_reason:
                        ended = True
                        await _drain(responses)
                    yield event
                    if ended:
                        return
        except (asyncio.CancelledError, GeneratorExit):
            if not ended:
                self.cancel(request_id)
            raise

    async def check(self, requests: Sequence[Inputs]) -> list[CheckResult]:
        """Check all requests on one stream; see `types.Engine.check`."""
        questions = [
            self._request({**inputs, "check": True}, request_id=str(index), outputs=CHECK_OUTPUTS)
            for index, inputs in enumerate(requests)
        ]
        results = [CheckResult() for _ in requests]
        unanswered = len(requests)
        with self._open_stream(*questions) as responses:
            async for response in responses:
                event = _event(response)
                results[int(response.infer_response.id)] = (
                    CheckResult(headroom=int(event.text))
                    if event.finish_reason == "valid"
                    else CheckResult(refusal=event.text)
                )
                unanswered -= 1
                if not unanswered:
                    await _drain(responses)
                    break
        return results

    async def describe(self) -> ModelInfo:
        """Ask which model is served; see `types.Engine.describe`."""
        request = self._request({"describe": True}, request_id="describe", outputs=DESCRIBE_OUTPUTS)
        told = json.loads((await self._one_event(request)).text)
        return ModelInfo(**{f.name: told.get(f.name) for f in fields(ModelInfo)})

    async def repository(self, known: Repository | None) -> Repository:
        """Ask which models the server has; see `types.Engine.repository`."""
        with self._calls() as (triton, headers):
            request = service_pb2.RepositoryIndexRequest()
            index = await triton.RepositoryIndex(request, metadata=headers)
        known = known or Repository()
        engines, others, unready = [], set(), {}
        for model in sorted(index.models, key=lambda model: model.name):
            if model.name in known.engines:
                engines.append(model.name)
            elif model.name in known.others:
                others.add(model.name)
            elif model.state != "READY":
                unready[model.name] = model.reason or model.state.lower() or "no reason given"
            elif await self._is_engine(model.name):
                engines.append(model.name)
            else:
                others.add(model.name)
        return Repository(tuple(engines), unready, frozenset(others))

    async def _is_engine(self, model: str) -> bool:
        """Whether the model can describe a checkpoint, as engines of ours do."""
        with self._calls() as (triton, headers):
            request = service_pb2.ModelConfigRequest(name=model)
            answer = await triton.ModelConfig(request, metadata=headers)
        config = answer.config
        names = {tensor.name for tensor in config.input}
        return config.model_transaction_policy.decoupled and "describe" in names

    def cancel(self, request_id: str) -> None:
        """Cancel the request now; by itself the engine notices a closed stream a little later."""
        task = asyncio.create_task(self._cancel(request_id), name="engine-cancel")
        self._cancelling.add(task)
        task.add_done_callback(self._cancelling.discard)

    async def probe(self) -> None:
        """See whether the engine takes steps: it answers between two, however full it is."""
        await self._cancel_and_wait(PROBE_ID)

    def _request(
        self,
        inputs: Inputs,
        *,
        request_id: str,
        outputs: Sequence[str] = OUTPUTS,
    ) -> service_pb2.ModelInferRequest:
        return make_request(self._model_name, inputs, request_id=request_id, outputs=outputs)

    @contextmanager
    def _open_stream(self, *requests: service_pb2.ModelInferRequest) -> Iterator[Any]:
        """Send the requests on one stream; leaving the context cancels it. Maps gRPC's errors."""
        traceparent = TRACEPARENT.get()
        trace = (("traceparent", traceparent),) if traceparent else ()
        with self._calls() as (triton, headers):
            call = triton.ModelStreamInfer(_each(requests), metadata=(*headers, *trace))
            try:
                yield call
            finally:
                call.cancel()

    @contextmanager
    def _calls(self) -> Iterator[tuple[Any, Headers]]:
        """The stub to call and the headers to send. Maps gRPC's errors."""
        with self._channel.use() as stub_and_headers:
            try:
                yield stub_and_headers
            except grpc.aio.AioRpcError as error:
                details = error.details() or ""
                if refused := self._channel.explain(details):
                    raise Unavailable(refused) from error
                raise map_error(error.code().name, details) from error

    async def _cancel(self, request_id: str) -> None:
        with suppress(TimeoutError, EngineError):
            async with asyncio.timeout(CANCEL_SECONDS):
                await self._cancel_and_wait(request_id)

    async def _cancel_and_wait(self, request_id: str) -> None:
        """End the requests of this id; returns once the engine has."""
        request = self._request({"cancel": request_id}, request_id="cancel", outputs=CANCEL_OUTPUTS)
        await self._one_event(request)

    async def _one_event(self, request: service_pb2.ModelInferRequest) -> Event:
        """Send a request that has one response, and return that."""
        with self._open_stream(request) as responses:
            async for response in responses:
                event = _event(response)
                await _drain(responses)
                return event
        msg = f"the stream of {request.id!r} ended without an event"
        raise StreamInterrupted(msg)


def map_error(code: str | None, message: str) -> AdapterError:
    """Our error for a gRPC one: by its text where Triton's code says little, else by its code.

    The engine's complaints about an input begin with the input's name and a colon.
    """
    text = REQUEST_ID_PREFIX.sub("", message).strip() or "no reason given"
    if text.partition(":")[0] in INPUT_TYPES:
        return refusal(text)
    for fragment, kind in ERROR_TEXTS:
        if fragment in text.lower():
            return kind(text)
    return ERROR_CODES.get(code or "", EngineFailure)(text)


def _event(response: Any) -> Event:
    if response.error_message:
        raise map_error(None, response.error_message)
    return read_event(response.infer_response)


async def _drain(responses: AsyncIterator[Any]) -> None:
    """Read a stream to its end: Triton logs an error for one that is cancelled before."""
    with suppress(TimeoutError):
        async with asyncio.timeout(END_OF_STREAM_SECONDS):
            async for _ in responses:
                pass


async def _each(
    requests: Sequence[service_pb2.ModelInferRequest],
) -> AsyncIterator[service_pb2.ModelInferRequest]:
    for request in requests:
        yield request
