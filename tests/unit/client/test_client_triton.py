"""Requests and responses of the direct Triton client, without a server."""

import re
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
    RateLimitedError,
    ServerError,
    UnavailableError,
    UnexpectedResponseError,
    triton,
)
from dllm_client import TimeoutError as DllmTimeoutError
from tritonclient.utils import InferenceServerException

REPOSITORY = Path(__file__).parents[3] / "model_repository"


class Response:
    """What tritonclient returns."""

    def __init__(self, **outputs: Any) -> None:
        self._outputs = outputs

    def as_numpy(self, name: str) -> Any:
        return self._outputs.get(name)


def test_input_types_are_those_of_the_model() -> None:
    """Each type that the annotations of `Sampling` give is the one in config.pbtxt."""
    config = (REPOSITORY / "dllm" / "config.pbtxt").read_text()
    inputs = config[config.index("input [") : config.index("output [")]
    declared = dict(re.findall(r'name: "(\w+)"\s+data_type: TYPE_(\w+)', inputs))
    types = {name: kind.replace("STRING", "BYTES") for name, kind in declared.items()}
    assert triton.INPUT_TYPES.items() <= types.items()


@pytest.mark.parametrize("protocol", [triton_http, triton_grpc])
def test_tensors_have_shape_one_by_n(protocol: Any) -> None:
    """A scalar becomes [1, 1] and a list [1, n], in the type of the model."""
    for name, value, shape, datatype in (
        ("text_input", "häh", [1, 1], "BYTES"),
        ("seed", 2**40, [1, 1], "INT64"),
        ("stop", ["a", "b"], [1, 2], "BYTES"),
        ("stream", True, [1, 1], "BOOL"),
        ("temperature", 1, [1, 1], "FP32"),
    ):
        tensor = triton._tensor(protocol, name, value)
        assert (tensor.name(), tensor.shape(), tensor.datatype()) == (name, shape, datatype)


@pytest.mark.parametrize(
    ("name", "value"), [("steps", 1.5), ("steps", "1"), ("temperature", "hot"), ("top_k", 2**31)]
)
def test_wrong_values_name_the_field(name: str, value: object) -> None:
    """What the tensor cannot hold exactly is refused before anything is sent."""
    with pytest.raises(BadRequestError, match=f"^{name}: ") as caught:
        triton._tensor(triton_http, name, value)
    assert caught.value.field == name


def test_unknown_parameter_is_refused() -> None:
    """A misspelt parameter is an error, since Triton itself would not say so."""
    with pytest.raises(BadRequestError, match="gen_lenght"):
        triton._tensor(triton_http, "gen_lenght", 1)


def test_prompt_is_a_text_messages_or_token_ids() -> None:
    """A text goes as it is, as do token ids; messages go as JSON for the chat template."""
    assert triton._prompt_field([5, 6]) == {"input_ids": [5, 6]}
    assert triton._prompt_field("hi") == {"text_input": "hi"}
    messages = [{"role": "user", "content": "hé"}]
    assert triton._prompt_field(messages) == {
        "messages": '[{"role": "user", "content": "hé"}]',
    }


def test_event_is_read_from_tensors() -> None:
    """Outputs of shape [1, n] become plain values and flat arrays."""
    response = Response(
        text_output=np.array([["té".encode()]], dtype=object),
        token_ids=np.array([[5, 6]], dtype=np.int32),
        confidence=np.array([[0.5, -1]], dtype=np.float32),
        finish_reason=np.array([[b"stop"]], dtype=object),
        usage=np.array([[3, 2, 2, 4]], dtype=np.int32),
        seed=np.array([[9]], dtype=np.int64),
    )
    event = triton._event(response)
    assert (event.text, event.finish_reason, event.seed, event.done) == ("té", "stop", 9, True)
    assert event.usage == triton.Usage(3, 2, 2, 4)
    assert event.token_ids.tolist() == [5, 6]
    with pytest.raises(UnexpectedResponseError, match="text_output"):
        triton._event(Response(usage=np.zeros((1, 4), np.int32)))


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
def test_codes_of_triton_are_mapped(status: str, expected: type[DllmError]) -> None:
    """Each code has the same error as its HTTP status in the REST client."""
    with pytest.raises(expected, match="why"), triton._mapped_errors():
        raise InferenceServerException("why", status=status)


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
def test_words_of_triton_are_mapped(message: str, expected: type[DllmError]) -> None:
    """On a stream an error has no code, and what it says decides."""
    with pytest.raises(expected) as caught, triton._mapped_errors():
        raise InferenceServerException(message)
    field = "gen_length" if expected is BadRequestError else None
    assert getattr(caught.value, "field", None) == field


def test_absent_server_is_unavailable() -> None:
    """A refused connection is an UnavailableError on both ways."""
    with triton.TritonClient("127.0.0.1:9", "127.0.0.1:9") as client:
        with pytest.raises(UnavailableError):
            client.ready()
        with pytest.raises(UnavailableError):
            client.generate("hi")
        with pytest.raises(UnavailableError):
            next(client.stream("hi"))
