"""The model's tensors: what its inputs and outputs are called, made and read."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from tritonclient.grpc import InferInput

from adapter.generation import Canvas, Event, InputValue, Usage

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
    "check": "BOOL",
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
CANVAS_OUTPUTS = ("token_ids", "token_texts", "confidence", "block")


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


def _text(array: Any) -> str:
    if array is None or array.size == 0:
        return ""
    # PostgreSQL cannot keep a NUL.
    return str(array.reshape(-1)[0].decode(errors="replace")).replace("\x00", "\ufffd")
