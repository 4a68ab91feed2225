"""Requests and responses of the direct Triton client, without a server."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as triton_grpc
import tritonclient.http as triton_http
from dllm_client import (
    BadRequestError,
    DllmError,
    NotFoundError,
    Prompt,
    RateLimitedError,
    ServerError,
    UnavailableError,
    UnexpectedResponseError,
    Usage,
    triton,
)
from dllm_client import TimeoutError as DllmTimeoutError
from dllm_client.triton import Event, TritonClient
from tritonclient.utils import InferenceServerException

REPOSITORY = Path(__file__).parents[3] / "model_repository"


class Response:
    """A response of tritonclient."""

    def __init__(self, **outputs: Any) -> None:
        self._outputs = outputs

    def as_numpy(self, name: str) -> Any:
        return self._outputs.get(name)


ANSWER = Response(
    text_output=np.array([["té".encode()]], dtype=object),
    token_ids=np.array([[5, 6]], dtype=np.int32),
    confidence=np.array([[0.5, -1]], dtype=np.float32),
    finish_reason=np.array([[b"stop"]], dtype=object),
    usage=np.array([[3, 2, 2, 4]], dtype=np.int32),
    seed=np.array([[9]], dtype=np.int64),
)


class Tensor:
    """An input of tritonclient that shows what it was given."""

    def __init__(self, name: str, shape: list[int], datatype: str) -> None:
        self.name, self.shape, self.datatype = name, shape, datatype

    def set_data_from_numpy(self, array: np.ndarray) -> None:
        assert list(array.shape) == self.shape
        self.values = array.reshape(-1).tolist()


class Server:
    """Stands in for both of tritonclient's clients: keeps the inputs, gives one answer."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.inputs: dict[str, Any] = {}
        self.answer: Response | Exception = ANSWER
        for module in (triton_http, triton_grpc):
            monkeypatch.setattr(module, "InferenceServerClient", lambda *_, **__: self)
            monkeypatch.setattr(module, "InferInput", Tensor)

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """There is no connection."""

    def infer(self, model: str, inputs: list[Any], **_: Any) -> Response:
        assert model == "dllm_unary"
        self.inputs = {tensor.name: tensor for tensor in inputs}
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer

    def start_stream(self, callback: Callable[[Any, Exception | None], None], **_: Any) -> None:
        self._callback = callback

    def async_stream_infer(self, model: str, inputs: list[Any]) -> None:
        assert model == "dllm"
        self.inputs = {tensor.name: tensor for tensor in inputs}
        if isinstance(self.answer, Exception):
            self._callback(None, self.answer)
        else:
            self._callback(self.answer, None)

    def stop_stream(self, *, cancel_requests: bool) -> None:
        assert cancel_requests


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Server:
    return Server(monkeypatch)


def generate(client: TritonClient, prompt: Prompt, **sampling: Any) -> Event:
    return client.generate(prompt, **sampling)


def stream(client: TritonClient, prompt: Prompt, **sampling: Any) -> Event:
    return next(client.stream(prompt, **sampling))


BOTH_WAYS = pytest.mark.parametrize("ask", [generate, stream])
Ask = Callable[..., Event]


def test_input_types_are_those_of_the_model() -> None:
    """Each type that the annotations of `Sampling` give is the one in config.pbtxt."""
    config = (REPOSITORY / "dllm" / "config.pbtxt").read_text()
    inputs = config[config.index("input [") : config.index("output [")]
    declared = dict(re.findall(r'name: "(\w+)"\s+data_type: TYPE_(\w+)', inputs))
    types = {name: kind.replace("STRING", "BYTES") for name, kind in declared.items()}
    assert triton.INPUT_TYPES.items() <= types.items()


@BOTH_WAYS
def test_tensors_have_shape_one_by_n(server: Server, ask: Ask) -> None:
    """A scalar becomes [1, 1] and a list [1, n], in the type of the model."""
    ask(TritonClient(), "häh", seed=2**40, stop=["a", "b"], credit=True, temperature=1)
    for name, shape, datatype, values in (
        ("text_input", [1, 1], "BYTES", ["häh"]),
        ("seed", [1, 1], "INT64", [2**40]),
        ("stop", [1, 2], "BYTES", ["a", "b"]),
        ("credit", [1, 1], "BOOL", [True]),
        ("temperature", [1, 1], "FP32", [1.0]),
    ):
        tensor = server.inputs[name]
        assert (tensor.shape, tensor.datatype, tensor.values) == (shape, datatype, values)


@BOTH_WAYS
@pytest.mark.parametrize(
    ("name", "value"),
    [("steps", 1.5), ("steps", "1"), ("temperature", "hot"), ("top_k", 2**63), ("gen_lenght", 1)],
)
def test_wrong_values_name_the_field(server: Server, ask: Ask, name: str, value: object) -> None:
    """A value that the tensor cannot hold, or an unknown name, is refused before it is sent."""
    with pytest.raises(BadRequestError, match=f"^{name}: ") as caught:
        ask(TritonClient(), "hi", **{name: value})
    assert caught.value.field == name
    assert not server.inputs


@BOTH_WAYS
def test_prompt_is_a_text_messages_or_token_ids(server: Server, ask: Ask) -> None:
    """A text goes as it is, as do token ids; messages go as JSON for the chat template."""
    messages = [{"role": "user", "content": "hé"}]
    as_json = '[{"role": "user", "content": "hé"}]'
    for prompt, name, values in (
        ("hi", "text_input", ["hi"]),
        (messages, "messages", [as_json]),
        ([5, 6], "input_ids", [5, 6]),
    ):
        ask(TritonClient(), prompt)
        assert server.inputs.keys() - {"stream"} == {name}
        assert server.inputs[name].values == values


@BOTH_WAYS
def test_event_is_read_from_tensors(server: Server, ask: Ask) -> None:
    """Outputs of shape [1, n] become plain values and flat arrays."""
    event = ask(TritonClient(), "hi")
    assert (event.text, event.finish_reason, event.seed, event.done) == ("té", "stop", 9, True)
    assert event.usage == Usage(3, 2, 2, 4)
    assert event.token_ids.tolist() == [5, 6]
    server.answer = Response(usage=np.zeros((1, 4), np.int32))
    with pytest.raises(UnexpectedResponseError, match="text_output"):
        ask(TritonClient(), "hi")


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        ("StatusCode.INVALID_ARGUMENT", BadRequestError),
        ("400", BadRequestError),
        ("StatusCode.NOT_FOUND", NotFoundError),
        ("StatusCode.RESOURCE_EXHAUSTED", RateLimitedError),
        ("StatusCode.UNAVAILABLE", UnavailableError),
        ("503", UnavailableError),
        ("StatusCode.DEADLINE_EXCEEDED", DllmTimeoutError),
        ("500", ServerError),
    ],
)
def test_codes_of_triton_are_mapped(server: Server, status: str, expected: type[DllmError]) -> None:
    """Each code has the same error as its HTTP status in the REST client."""
    server.answer = InferenceServerException("why", status=status)
    with pytest.raises(expected, match="why"):
        TritonClient().generate("hi")


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("[request id: 7] gen_length: must be at least 1; got -1", BadRequestError),
        ("Request for unknown model: 'x' is not found", NotFoundError),
        ("Stub process 'dllm_0_0' is not healthy.", UnavailableError),
        ("Exceeds maximum queue size", RateLimitedError),
        ("Request timeout expired", DllmTimeoutError),
        ("Something: else", ServerError),
    ],
)
def test_texts_of_triton_are_mapped(
    server: Server, message: str, expected: type[DllmError]
) -> None:
    """On a stream an error has no code, so its text decides."""
    server.answer = InferenceServerException(message)
    with pytest.raises(expected) as caught:
        next(TritonClient().stream("hi"))
    field = "gen_length" if expected is BadRequestError else None
    assert getattr(caught.value, "field", None) == field


def test_absent_server_is_unavailable() -> None:
    """A refused connection is an UnavailableError over HTTP and gRPC."""
    with TritonClient("127.0.0.1:9", "127.0.0.1:9") as client:
        with pytest.raises(UnavailableError):
            client.ready()
        with pytest.raises(UnavailableError):
            client.generate("hi")
        with pytest.raises(UnavailableError):
            next(client.stream("hi"))
