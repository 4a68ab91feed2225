"""The client of Triton against a gRPC server that says what the tests tell it to."""

import asyncio
import struct
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Self

import grpc
import pytest
from adapter_fakes import until
from tritonclient.grpc import service_pb2, service_pb2_grpc

from adapter.engine.triton import TritonEngine
from adapter.errors import (
    EngineDead,
    EngineDraining,
    EngineError,
    EngineFailure,
    InvalidRequest,
    Overloaded,
    StreamInterrupted,
    Unavailable,
)
from adapter.types import CheckResult, Event, ModelInfo, StreamDetail

#: When the engine was started, as it says itself.
PATIENCE = {"stream_interval": 0.5, "idle_timeout": 20}

Step = Event | str | tuple[grpc.StatusCode, str]


@dataclass
class ScriptedTriton(service_pb2_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc]
    """Plays one script on every stream and remembers what it was asked."""

    script: list[Step] = field(default_factory=list)
    requests: list[Any] = field(default_factory=list)
    headers: dict[str, str] = field(default_factory=dict)
    cancelled: int = 0
    ended: int = 0
    #: Ids of requests that it was told to end.
    ends: list[str] = field(default_factory=list)
    #: Finish reason and text for each request of a stream; the last is answered first.
    check_results: list[tuple[str, str]] = field(default_factory=list)
    #: It does not say that it has.
    mute: bool = False

    async def ModelStreamInfer(  # noqa: N802  the protocol's name
        self, requests: AsyncIterator[Any], context: Any
    ) -> AsyncIterator[Any]:
        """Answer the first request of a stream with the script."""
        self.headers = dict(context.invocation_metadata())
        try:
            async for request in requests:
                if request.inputs[0].name == "cancel":
                    self.ends.append(request.raw_input_contents[0][4:].decode())
                    if not self.mute:
                        yield _answer(Event("4711.25", "cancelled"))
                    continue
                self.requests.append(request)
                if self.check_results:
                    if len(self.requests) == len(self.check_results):
                        asked = zip(self.requests, self.check_results, strict=True)
                        for question, (reason, text) in reversed(list(asked)):
                            yield _answer(Event(text, reason), question.id)
                    continue
                for step in self.script:
                    yield await self._play(step, context)
            self.ended += 1
        except asyncio.CancelledError:
            self.cancelled += 1
            raise

    async def _play(self, step: Step, context: Any) -> Any:
        if isinstance(step, tuple):
            await context.abort(*step)
        if isinstance(step, Event):
            return _answer(step)
        if step:
            return service_pb2.ModelStreamInferResponse(error_message=step)
        await asyncio.Event().wait()
        return None


def _answer(event: Event, request_id: str = "") -> Any:
    return service_pb2.ModelStreamInferResponse(infer_response=_response(event, request_id))


def _response(event: Event, request_id: str) -> Any:
    response = service_pb2.ModelInferResponse(model_name="dllm", id=request_id)
    for name, text in (("text_output", event.text), ("finish_reason", event.finish_reason)):
        response.outputs.add(name=name, datatype="BYTES", shape=[1, 1])
        content = text.encode()
        response.raw_output_contents.append(len(content).to_bytes(4, "little") + content)
    return response


@pytest.fixture
def triton() -> ScriptedTriton:
    """The server's script."""
    return ScriptedTriton()


@asynccontextmanager
async def grpc_server(triton: ScriptedTriton) -> AsyncIterator[int]:
    """A server that plays the script; its port."""
    server = grpc.aio.server()
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(triton, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield port
    await server.stop(None)


@pytest.fixture
async def engine(triton: ScriptedTriton) -> AsyncIterator[TritonEngine]:
    """Its client."""
    async with grpc_server(triton) as port:
        client = TritonEngine(f"127.0.0.1:{port}", "dllm", **PATIENCE)
        yield client
        await client.close()


class Proxy:
    """Stands between a client and a server, and can swallow what is sent on its connections."""

    def __init__(self, target: int) -> None:
        self._target = target
        self._silent: set[int] = set()
        self._pumps: set[asyncio.Task[None]] = set()
        self.connections = 0

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port: int = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for pump in self._pumps:
            pump.cancel()

    def swallow(self) -> None:
        """Let nothing through any more on the connections that there are."""
        self._silent = set(range(self.connections))

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        number = self.connections
        self.connections += 1
        there, back = await asyncio.open_connection("127.0.0.1", self._target)
        for source, sink in ((reader, back), (there, writer)):
            pump = asyncio.create_task(self._pump(number, source, sink))
            self._pumps.add(pump)
            pump.add_done_callback(self._pumps.discard)

    async def _pump(
        self, number: int, source: asyncio.StreamReader, sink: asyncio.StreamWriter
    ) -> None:
        while content := await source.read(65536):
            if number not in self._silent:
                sink.write(content)
                await sink.drain()


async def events(engine: TritonEngine) -> list[Event]:
    stream = engine.generate({"text_input": "hi", "seed": 3}, request_id="7")
    return [event async for event in stream]


async def test_request_carries_inputs_and_asks_for_signs_of_life(
    engine: TritonEngine, triton: ScriptedTriton
) -> None:
    """The job's inputs go out under its id, with streaming on; no header that crashes Triton."""
    triton.script = [Event("a"), Event("ab", "length")]

    assert await events(engine) == triton.script
    (request,) = triton.requests
    assert (request.id, request.model_name) == ("7", "dllm")
    shapes = {tensor.name: (tensor.datatype, list(tensor.shape)) for tensor in request.inputs}
    assert shapes == {
        "text_input": ("BYTES", [1, 1]),
        "seed": ("INT64", [1, 1]),
        "stream": ("BOOL", [1, 1]),
        "stream_interval": ("FP32", [1, 1]),
        "priority": ("INT64", [1, 1]),
    }
    assert "triton_grpc_error" not in triton.headers


@pytest.mark.parametrize(
    ("detail", "interval", "canvas"),
    [
        (StreamDetail.RESULT, 0.5, False),
        (StreamDetail.TEXT, 0.0, False),
        (StreamDetail.CANVAS, 0.0, True),
    ],
)
async def test_only_what_is_wanted_is_asked_for(
    engine: TritonEngine,
    triton: ScriptedTriton,
    detail: StreamDetail,
    interval: float,
    canvas: bool,
) -> None:
    """Results need signs of life, texts an event for each step, and only watchers the canvas."""
    triton.script = [Event("ab", "length")]
    async for _ in engine.generate({"text_input": "a"}, request_id="7", detail=detail):
        pass

    (request,) = triton.requests
    names = [tensor.name for tensor in request.inputs]
    sent = request.raw_input_contents[names.index("stream_interval")]
    assert struct.unpack("<f", sent) == (interval,)
    assert ("token_texts" in {output.name for output in request.outputs}) == canvas


async def test_finished_stream_is_let_end(engine: TritonEngine, triton: ScriptedTriton) -> None:
    """A stream that has brought its result is not cancelled."""
    triton.script = [Event("ab", "length")]
    async with aclosing(engine.generate({"text_input": "a"}, request_id="7")) as stream:
        assert await anext(stream) == Event("ab", "length")

    await until(lambda: triton.ended == 1)
    assert (triton.cancelled, triton.ends) == (0, [])


async def test_closing_the_iterator_cancels(engine: TritonEngine, triton: ScriptedTriton) -> None:
    """Closing the iterator cancels the stream at the server and at the engine."""
    triton.script = [Event("a"), ""]
    async with aclosing(engine.generate({"text_input": "a"}, request_id="7")) as stream:
        await anext(stream)

    await until(lambda: triton.cancelled == 1)
    await until(lambda: triton.ends == ["7"])


@pytest.mark.parametrize(
    ("step", "kind"),
    [
        ("seed: too odd", InvalidRequest),
        ("Stub process 'dllm_0_0' is not healthy.", EngineDead),
        ("Request for unknown model: 'dllm' is not found", Unavailable),
        ("Exceeds maximum queue size", Overloaded),
        ("the server is stopping", EngineDraining),
        ("the engine takes no more requests: device error: lost", EngineDraining),
        ((grpc.StatusCode.UNAVAILABLE, "not ready"), Unavailable),
        ("an error without a code", EngineFailure),
    ],
)
async def test_errors_are_raised_as_ours(
    engine: TritonEngine, triton: ScriptedTriton, step: Step, kind: type[Exception]
) -> None:
    """A stream's error becomes one of our tree, with the server's words."""
    triton.script = [Event("a"), step]

    with pytest.raises(kind, match=step if isinstance(step, str) else step[1]):
        await events(engine)


async def test_server_that_is_away_is_unavailable() -> None:
    """A refused connection says that Triton is away, at once."""
    engine = TritonEngine("127.0.0.1:9", "dllm", **PATIENCE)
    async with asyncio.timeout(5):
        with pytest.raises(Unavailable):
            await engine.probe()
    await engine.close()


async def test_a_connection_that_died_without_a_word_is_replaced(triton: ScriptedTriton) -> None:
    """A connection without answers fails within the idle timeout; the next gets a new one."""
    async with grpc_server(triton) as port, Proxy(port) as proxy:
        engine = TritonEngine(f"127.0.0.1:{proxy.port}", "dllm", **PATIENCE | {"idle_timeout": 2})
        await engine.probe()
        proxy.swallow()
        async with asyncio.timeout(20):
            with pytest.raises(EngineError):
                await engine.probe()
            await engine.probe()
        assert proxy.connections == 2
        await engine.close()


@pytest.mark.parametrize("variable", ["http_proxy", "grpc_proxy"])
@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
async def test_a_proxy_is_not_asked_for_this_machine(
    triton: ScriptedTriton, monkeypatch: pytest.MonkeyPatch, variable: str, host: str
) -> None:
    """A proxy of the environment, here one that is away, does not stand before loopback."""
    monkeypatch.setenv(variable, "http://127.0.0.1:9")
    for exception in ("no_proxy", "NO_PROXY", "no_grpc_proxy"):
        monkeypatch.delenv(exception, raising=False)
    async with grpc_server(triton) as port:
        engine = TritonEngine(f"{host}:{port}", "dllm", **PATIENCE)
        await engine.probe()
        await engine.close()


async def test_checks_share_a_stream(engine: TritonEngine, triton: ScriptedTriton) -> None:
    """Each result has its request's id; nothing runs, and only its outputs are requested."""
    triton.check_results = [("valid", "17"), ("invalid", "steps: too few"), ("valid", "0")]
    check_results = await engine.check([{"text_input": text} for text in "abc"])

    assert check_results == [CheckResult(headroom=17), CheckResult("steps: too few"), CheckResult()]
    for request in triton.requests:
        assert {tensor.name for tensor in request.inputs} == {"text_input", "check"}
        assert {output.name for output in request.outputs} == {"finish_reason", "text_output"}
    await until(lambda: triton.ended == 1)
    assert (triton.cancelled, triton.ends) == (0, [])


@pytest.mark.parametrize("step", ["Stub process 'dllm_0_0' is not healthy.", "no reason"])
async def test_check_fails_as_streams_do(
    engine: TritonEngine, triton: ScriptedTriton, step: str
) -> None:
    """An error is the engine's, never a check's result."""
    triton.script = [step]
    with pytest.raises(EngineError):
        await engine.check([{"text_input": "a"}])


async def test_the_model_is_described(engine: TritonEngine, triton: ScriptedTriton) -> None:
    """What the engine tells is taken by name; what it leaves out or adds does no harm."""
    triton.script = [Event('{"family": "llada", "max_model_len": 512, "new": 1}', "described")]
    assert await engine.describe() == ModelInfo(family="llada", max_model_len=512)
    (request,) = triton.requests
    assert [tensor.name for tensor in request.inputs] == ["describe"]


async def test_probe_needs_no_place(engine: TritonEngine, triton: ScriptedTriton) -> None:
    """A probe ends a request that does not exist, which the engine answers however full it is."""
    await engine.probe()

    assert (triton.requests, triton.ends) == ([], ["probe"])


async def test_probe_wants_an_answer(engine: TritonEngine, triton: ScriptedTriton) -> None:
    """A stream that ends without one is no sign of life."""
    triton.mute = True
    with pytest.raises(StreamInterrupted):
        await engine.probe()
