"""Requests to the Triton model and its responses, as tensors."""

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from tritonclient.grpc.service_pb2 import ModelInferRequest, ModelInferResponse

from adapter.types import Canvas, Event, Inputs, TokenDetail, Usage

#: Data type of every input (`model_repository/dllm/config.pbtxt`).
INPUT_TYPES: Mapping[str, str] = {
    "text_input": "BYTES",
    "messages": "BYTES",
    "tools": "BYTES",
    "input_ids": "INT64",
    "suffix": "BYTES",
    "canvas_ids": "INT64",
    # Sampling fields, from the engine. make fields: begin
    "temperature": "FP32",
    "gen_length": "INT64",
    "steps": "INT64",
    "block_length": "INT64",
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
    "top_k": "INT64",
    "seed": "INT64",
    "logits_eos_inf": "BOOL",
    "confidence_eos_eot_inf": "BOOL",
    "stop": "BYTES",
    "structured_outputs": "BYTES",
    "ignore_eos": "BOOL",
    "logprobs": "INT64",
    "reveal_steps": "BOOL",
    "cache": "BYTES",
    "retention_ratio": "FP32",
    "pool_kernel": "INT64",
    "delay_steps": "INT64",
    "refresh_interval": "INT64",
    # make fields: end
    "priority": "INT64",
    "cache_salt": "BYTES",
    "exclusive": "BOOL",
    "decide": "BYTES",
    "score": "BYTES",
    "stream": "BOOL",
    "stream_interval": "FP32",
    "check": "BOOL",
    "cancel": "BYTES",
    "describe": "BOOL",
}
#: Format characters of `struct` for the types of numbers.
FORMATS: Mapping[str, str] = {"INT32": "i", "INT64": "q", "FP32": "f", "BOOL": "?"}
OUTPUTS = ("text_output", "finish_reason", "usage", "seed")
#: An engine of a later release may have more.
USAGE_VALUES = len(fields(Usage))
CANVAS_OUTPUTS = ("token_ids", "token_texts", "confidence", "block")
#: The output of each token's log-probability and step, and the inputs that ask for it.
DETAILS_OUTPUT, DETAILS_INPUTS = "token_details", ("logprobs", "reveal_steps")


def make_request(
    model_name: str, inputs: Inputs, *, request_id: str, outputs: Sequence[str]
) -> ModelInferRequest:
    """The inputs as a batch of one. Raises KeyError for a name that the model does not have.

    The protobuf message is built here: tritonclient's inputs and outputs take NumPy arrays, which
    cost more than the rest of a small request.
    """
    request = ModelInferRequest(model_name=model_name, id=request_id)
    for name, value in inputs.items():
        datatype = INPUT_TYPES[name]
        values = value if isinstance(value, list) else [value]
        request.inputs.add(name=name, datatype=datatype, shape=(1, len(values)))
        request.raw_input_contents.append(_content(datatype, values))
    for name in outputs:
        request.outputs.add(name=name)
    return request


def read_event(response: ModelInferResponse) -> Event:
    """Read a response of the model. An output that is missing keeps its default."""
    contents = {
        output.name: content
        for output, content in zip(response.outputs, response.raw_output_contents, strict=True)
    }
    usage = contents.get("usage")
    seed = contents.get("seed")
    return Event(
        text=_text(contents.get("text_output")),
        finish_reason=_text(contents.get("finish_reason")),
        usage=None if usage is None else Usage(*_numbers("INT32", usage)[:USAGE_VALUES]),
        seed=None if seed is None else _numbers("INT64", seed)[0],
        canvas=_canvas(contents),
        details=_details(contents.get(DETAILS_OUTPUT)),
    )


def _details(content: bytes | None) -> list[TokenDetail | None] | None:
    if not content:
        return None
    entries = json.loads(_strings(content)[0])
    return [None if entry is None else TokenDetail.of(entry) for entry in entries]


def _canvas(contents: Mapping[str, bytes]) -> Canvas | None:
    """The canvas, if the response has one."""
    texts = contents.get("token_texts")
    if texts is None:
        return None
    index, start, end = _numbers("INT32", contents["block"])
    return Canvas(
        token_ids=_numbers("INT32", contents["token_ids"]),
        token_texts=[text.decode() for text in _strings(texts)],
        confidence=_numbers("FP32", contents["confidence"]),
        block=(index, start, end),
    )


def _content(datatype: str, values: Sequence[Any]) -> bytes:
    if datatype == "BYTES":
        encoded = [str(value).encode() for value in values]
        return b"".join(len(text).to_bytes(4, "little") + text for text in encoded)
    return struct.pack(f"<{len(values)}{FORMATS[datatype]}", *values)


def _numbers(datatype: str, content: bytes) -> list[Any]:
    kind = FORMATS[datatype]
    return list(struct.unpack(f"<{len(content) // struct.calcsize(f'<{kind}')}{kind}", content))


def _strings(content: bytes) -> list[bytes]:
    """Split a BYTES tensor, in which the length stands before each string."""
    strings, start = [], 0
    while start < len(content):
        end = start + 4 + int.from_bytes(content[start : start + 4], "little")
        strings.append(content[start + 4 : end])
        start = end
    return strings


def _text(content: bytes | None) -> str:
    if not content:
        return ""
    # PostgreSQL cannot keep a NUL.
    return _strings(content)[0].decode(errors="replace").replace("\x00", "\ufffd")
