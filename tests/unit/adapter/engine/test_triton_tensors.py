"""The border to Triton: tensors, events, errors."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tritonclient.grpc import InferInput
from tritonclient.grpc.service_pb2 import ModelInferResponse
from tritonclient.utils import np_to_triton_dtype, serialize_byte_tensor

from adapter.engine.tensors import CANVAS_OUTPUTS, INPUT_TYPES, OUTPUTS, make_request, read_event
from adapter.engine.triton import map_error
from adapter.errors import (
    AdapterError,
    ConnectionLost,
    EngineDead,
    EngineFailure,
    InvalidRequest,
    Overloaded,
    StreamInterrupted,
    Unavailable,
)
from adapter.types import Canvas, Event, InputValue, Usage

CONFIG = Path(__file__).parents[4] / "model_repository" / "dllm" / "config.pbtxt"


def answer(**outputs: Any) -> ModelInferResponse:
    """A response with these outputs, made as tritonclient makes tensors."""
    response = ModelInferResponse()
    for name, values in outputs.items():
        array = np.array([values])
        kind = np_to_triton_dtype(array.dtype)
        content = serialize_byte_tensor(array).item() if kind == "BYTES" else array.tobytes()
        response.outputs.add(name=name, datatype=kind, shape=array.shape)
        response.raw_output_contents.append(content)
    return response


def test_inputs_and_outputs_are_those_of_the_model() -> None:
    """Names and types agree with the model's own configuration."""
    text = CONFIG.read_text()
    given, made = text.split("output [", 1)
    inputs = re.findall(r'name: "(\w+)"\s+data_type: TYPE_(\w+)', given)

    assert {name: kind.replace("STRING", "BYTES") for name, kind in inputs} == INPUT_TYPES
    assert {*OUTPUTS, *CANVAS_OUTPUTS} <= set(re.findall(r'name: "(\w+)"', made))


@pytest.mark.parametrize(
    ("name", "value", "kind", "numpy_type"),
    [
        ("text_input", "hä", "BYTES", np.object_),
        ("stop", ["a", "", "bc"], "BYTES", np.object_),
        ("input_ids", [1, 2, 3], "INT64", np.int64),
        ("temperature", 1, "FP32", np.float32),
        ("cfg_scale", 0.3, "FP32", np.float32),
        ("seed", -(2**63), "INT64", np.int64),
        ("ignore_eos", True, "BOOL", np.bool_),
    ],
)
def test_tensor_is_a_batch_of_one(
    name: str, value: InputValue, kind: str, numpy_type: type[Any]
) -> None:
    """Every input goes out as tritonclient would send it, with a batch dimension."""
    values = value if isinstance(value, list) else [value]
    array = np.array([[v.encode() if isinstance(v, str) else v for v in values]], dtype=numpy_type)
    theirs = InferInput(name, list(array.shape), kind)
    theirs.set_data_from_numpy(array)

    request = make_request("dllm", {name: value}, request_id="7", outputs=("a", "b"))
    (tensor,) = request.inputs
    assert (request.model_name, request.id) == ("dllm", "7")
    assert [output.name for output in request.outputs] == ["a", "b"]
    assert tensor == theirs._get_tensor()
    assert list(request.raw_input_contents) == [theirs._get_content()]


def test_event_is_read_whole() -> None:
    """All outputs arrive; a NUL, which PostgreSQL cannot keep, is replaced."""
    response = answer(
        text_output=np.array(["a\0ü".encode()], dtype=np.object_),
        finish_reason=np.array([b"length"], dtype=np.object_),
        usage=np.array([1, 2, 3, 4], dtype=np.int32),
        seed=np.array([2**62], dtype=np.int64),
    )

    assert Event("a\ufffdü", "length", Usage(1, 2, 3, 4), 2**62) == read_event(response)


def test_canvas_is_read_whole() -> None:
    """Where the canvas was asked for, every position arrives with all that it holds."""
    response = answer(
        token_ids=np.array([7, 8], dtype=np.int32),
        token_texts=np.array(["é".encode(), b""], dtype=np.object_),
        confidence=np.array([0.5, -1], dtype=np.float32),
        block=np.array([1, 8, 10], dtype=np.int32),
    )

    assert read_event(response).canvas == Canvas([7, 8], ["é", ""], [0.5, -1.0], (1, 8, 10))


def test_missing_outputs_have_defaults() -> None:
    """A response that leaves outputs out is still an event."""
    assert Event("") == read_event(answer())


@pytest.mark.parametrize(
    ("code", "message", "kind"),
    [
        ("INVALID_ARGUMENT", "gen_length: must be at least 1", InvalidRequest),
        ("UNAVAILABLE", "failed to connect to all addresses", Unavailable),
        ("UNAVAILABLE", "Exceeds maximum queue size", Overloaded),
        ("UNAVAILABLE", "Request timeout expired", Overloaded),
        ("NOT_FOUND", "Request for unknown model: 'dllm' is not found", Unavailable),
        ("INTERNAL", "Stub process 'dllm_0_0' is not healthy.", EngineDead),
        (None, "Stub process 'dllm_0_0' is not healthy.", EngineDead),
        ("INTERNAL", "something broke", EngineFailure),
        (None, "something broke", EngineFailure),
        ("UNAVAILABLE", "Socket closed", ConnectionLost),
        ("UNAVAILABLE", "recvmsg:Connection reset by peer", ConnectionLost),
        ("CANCELLED", "Locally cancelled by application!", StreamInterrupted),
    ],
)
def test_grpc_errors_become_ours(code: str | None, message: str, kind: type[AdapterError]) -> None:
    """Code and message decide together; Triton's note of the request id is left out."""
    for text in (message, f"[request id: 7] {message}"):
        error = map_error(code, text)
        assert (kind, message) == (type(error), str(error))
