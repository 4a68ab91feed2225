"""Translates Triton's tensors to engine requests and back, with the names of config.pbtxt."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import triton_python_backend_utils as pb_utils
from dllm_engine import (
    CanvasUpdate,
    Engine,
    FinishReason,
    InvalidRequest,
    ModelSummary,
    NotStarted,
    Prompt,
    Request,
    SamplingParams,
    Usage,
)
from dllm_engine.sampling_params import FIELDS, Field
from dllm_token_details import asks_details, token_details

Inputs = Mapping[str, Any]

PROMPT_INPUTS = ("text_input", "messages", "input_ids")
#: Levels of the input `priority`; 1 goes first.
DEFAULT_PRIORITY, LOWEST_PRIORITY = 2, 3
#: Longest id to cancel by: the message that tells it to other instances has a bound.
MAX_CANCEL_LENGTH = 4096


def inputs_of(request: Any) -> Inputs:
    """The inputs of a Triton request by name."""
    return {tensor.name(): tensor for tensor in request.inputs()}


def parse_cancel(inputs: Inputs) -> str | None:
    """The id of the requests that this one is to end; None if it asks for text.

    Raises:
        InvalidRequest: it is empty or too long, or asks for text besides.
    """
    if "cancel" not in inputs:
        return None
    if len(inputs) > 1:
        raise InvalidRequest("cancel", "cannot be combined with other inputs")
    name = str(_scalar(inputs, "cancel"))
    if not name:
        raise InvalidRequest("cancel", "must not be empty")
    if len(name) > MAX_CANCEL_LENGTH:
        raise InvalidRequest("cancel", f"must be at most {MAX_CANCEL_LENGTH} characters long")
    return name


def is_check(inputs: Inputs) -> bool:
    """Whether a request asks only if it would be accepted.

    Raises:
        InvalidRequest: that cannot be read.
    """
    return "check" in inputs and bool(_scalar(inputs, "check"))


def is_describe(inputs: Inputs) -> bool:
    """Whether a request asks only which model is served.

    Raises:
        InvalidRequest: it asks for something besides.
    """
    if "describe" not in inputs:
        return False
    if len(inputs) > 1:
        raise InvalidRequest("describe", "cannot be combined with other inputs")
    if not _scalar(inputs, "describe"):
        raise InvalidRequest("describe", "must be true")
    return True


def parse_request(engine: Engine, request: Any, inputs: Inputs) -> Request:
    """An engine request from a Triton request and its inputs.

    Raises:
        InvalidRequest: names the input and what is wrong with it.
    """
    prompt = Prompt(
        _prompt_ids(engine, inputs), _canvas_ids(engine, inputs), _suffix_ids(engine, inputs)
    )
    values = {name: _param(inputs, field) for name, field in FIELDS.items() if name in inputs}
    if prompt.canvas_ids:
        values.setdefault("gen_length", len(prompt.canvas_ids))
    params = SamplingParams(**values)
    return engine.make_request(prompt, params, **request_options(request, inputs))


def request_options(request: Any, inputs: Inputs) -> dict[str, Any]:
    """How to run a request, by the names of `Engine.make_request`.

    Raises:
        InvalidRequest: names the input and what is wrong with it.
    """
    _reject_unknown(request)
    stream = bool(_scalar(inputs, "stream")) if "stream" in inputs else False
    interval = _stream_interval(inputs)
    return {
        "stream_interval": interval if stream else None,
        "priority": _priority(inputs),
        "cache_salt": text_input(inputs, "cache_salt") if "cache_salt" in inputs else "",
        "exclusive": bool(_scalar(inputs, "exclusive")) if "exclusive" in inputs else False,
        "timeout": request.timeout() / 1e6 or None,  # microseconds; 0: none
        "name": request.request_id(),
    }


def text_input(inputs: Inputs, name: str) -> str:
    """The text of an input.

    Raises:
        InvalidRequest: it is not one text.
    """
    return str(_scalar(inputs, name))


def _reject_unknown(request: Any) -> None:
    # The generate endpoint turns JSON names that are no inputs into request parameters: a misspelt
    # input, or `timeout`, which Triton passes on from its other endpoints only. `id` becomes the
    # request's id, too.
    parameters = json.loads(request.parameters() or "{}")
    if parameters.get("id") == request.request_id():
        del parameters["id"]
    if parameters:
        raise InvalidRequest(min(parameters), "no such input")


def _prompt_ids(engine: Engine, inputs: Inputs) -> list[int]:
    given = [name for name in PROMPT_INPUTS if name in inputs]
    if len(given) != 1:
        rule = f"exactly one of {', '.join(PROMPT_INPUTS)} is needed"
        raise InvalidRequest("text_input", f"{rule}; got {', '.join(given) or 'none'}")
    field = given[0]
    if "tools" in inputs and field != "messages":
        raise InvalidRequest("tools", f"needs messages; got {field}")
    if field == "input_ids":
        return _ids(engine, inputs, field)
    if engine.tokenizer is None:
        raise InvalidRequest(field, "this checkpoint has no tokenizer; send input_ids")
    text = str(_scalar(inputs, field))
    if field == "text_input":
        return engine.tokenizer.encode_text(text)
    tools = str(_scalar(inputs, "tools")) if "tools" in inputs else None
    return engine.tokenizer.encode_messages(text, tools)


def _canvas_ids(engine: Engine, inputs: Inputs) -> list[int]:
    if "canvas_ids" not in inputs:
        return []
    ids = _ids(engine, inputs, "canvas_ids")
    if not ids:
        raise InvalidRequest("canvas_ids", "must not be empty")
    return ids


def _ids(engine: Engine, inputs: Inputs, name: str) -> list[int]:
    values, most = _values(inputs, name), engine.spec.max_model_len
    if values.size > most:  # before each becomes a Python object
        raise InvalidRequest(name, f"must be at most {most} ids; got {values.size}")
    ids: list[int] = values.tolist()
    return ids


def _suffix_ids(engine: Engine, inputs: Inputs) -> list[int]:
    if "suffix" not in inputs:
        return []
    if engine.tokenizer is None:
        raise InvalidRequest("suffix", "this checkpoint has no tokenizer; send canvas_ids")
    return engine.tokenizer.encode_suffix(str(_scalar(inputs, "suffix")))


def _param(inputs: Inputs, field: Field) -> Any:
    if field.is_list:
        return tuple(_text(field.name, value) for value in _values(inputs, field.name))
    value = _scalar(inputs, field.name)
    if field.type is dict:
        try:
            return json.loads(value)
        except (TypeError, ValueError, RecursionError) as error:
            raise InvalidRequest(field.name, f"must be JSON: {error}") from error
    return value


def _priority(inputs: Inputs) -> int:
    if "priority" not in inputs:
        return DEFAULT_PRIORITY
    level = int(_scalar(inputs, "priority"))
    if not 1 <= level <= LOWEST_PRIORITY:
        raise InvalidRequest("priority", f"must be 1 to {LOWEST_PRIORITY}; got {level}")
    return level


def _stream_interval(inputs: Inputs) -> float:
    if "stream_interval" not in inputs:
        return 0.0
    seconds = float(_scalar(inputs, "stream_interval"))
    if not 0 <= seconds <= 3600:
        raise InvalidRequest("stream_interval", f"must be 0 to 3600 seconds; got {seconds}")
    return seconds


def _values(inputs: Inputs, name: str) -> npt.NDArray[Any]:
    array = inputs[name].as_numpy()
    if array.shape[0] != 1:
        problem = f"one prompt per request: the first dimension must be 1; got {array.shape[0]}"
        raise InvalidRequest(name, problem)
    values: npt.NDArray[Any] = array.reshape(-1)
    return values


def _scalar(inputs: Inputs, name: str) -> Any:
    values = _values(inputs, name)
    if values.size != 1:
        raise InvalidRequest(name, f"must be a single value; got {values.size}")
    value = values[0]
    if isinstance(value, np.float32):
        # The decimal number that the client wrote: ⌊0.7 · 10⌋ is 7, but 6 with 0.7 in float32.
        return float(str(value))
    return _text(name, value) if isinstance(value, bytes) else value.item()


def _text(name: str, value: bytes) -> str:
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidRequest(name, f"must be UTF-8: {error}") from error


def to_response(
    engine: Engine, update: CanvasUpdate, params: SamplingParams, wanted: Collection[str]
) -> Any:
    """The response that carries an update; an error response if the request failed.

    Args:
        engine: the engine that made the update.
        update: the state of the canvas.
        params: the request's, resolved.
        wanted: names of the outputs that the caller asked for. No other is made: the stub process
            drops the rest when it sends the response, without holding Python's lock, and
            sooner or later that corrupts the interpreter's memory.
    """
    if update.error is not None:
        return failure_response(update.error)
    masked = update.token_ids == engine.spec.mask_token_id
    reason = update.finish_reason.value if update.finish_reason else ""
    outputs = {
        "text_output": _strings([_answer(engine, update, params.stop)]),
        "token_ids": update.token_ids[None],
        # A token that the request came with is certain; so -1 is left for what is masked.
        "confidence": np.where(masked, np.float32(-1), np.abs(update.confidence))[None],
        "finish_reason": _strings([reason]),
        "usage": np.array([dataclasses.astuple(update.usage)], dtype=np.int32),
        "seed": np.array([[update.seed]], dtype=np.int64),
        "block": np.array(
            [_active_block(masked, params, _lead(engine, update, params))], dtype=np.int32
        ),
    }
    if "token_texts" in wanted:  # the one output that costs anything to make
        tokenizer = engine.tokenizer
        shown = tokenizer.pieces(update.token_ids, ~masked) if tokenizer else [""] * masked.size
        outputs["token_texts"] = _strings(shown)
    if "token_details" in wanted and asks_details(params):
        outputs["token_details"] = _strings([token_details(engine.tokenizer, update, params)])
    return _response(outputs, wanted)


def _response(outputs: Mapping[str, npt.NDArray[Any]], wanted: Collection[str]) -> Any:
    tensors = [pb_utils.Tensor(name, outputs[name]) for name in outputs if name in wanted]
    return pb_utils.InferenceResponse(output_tensors=tensors)


def _answer(engine: Engine, update: CanvasUpdate, stop: tuple[str, ...]) -> str:
    """The finished text, or what is certain of it so far."""
    if engine.tokenizer is None:
        return ""
    ready = update.token_ids[: update.num_ready]
    return (engine.tokenizer.answer if update.finished else engine.tokenizer.prefix)(ready, stop)


def _lead(engine: Engine, update: CanvasUpdate, params: SamplingParams) -> int:
    """How many tokens of the prompt the answer's first block begins with."""
    blocks = engine.spec.blocks
    if blocks is None or blocks.origin == "prompt_end":
        return 0
    assert params.block_length is not None
    return update.usage.prompt_tokens % params.block_length


def _active_block(
    masked: npt.NDArray[np.bool_], params: SamplingParams, lead: int
) -> tuple[int, int, int]:
    """Index, start and end of the block that the next step decodes; the last when none is left.

    Of the first block, `lead` positions are before the canvas.
    """
    assert params.block_length is not None
    first_masked = int(masked.argmax()) if masked.any() else masked.size - 1
    index = (first_masked + lead) // params.block_length
    start = index * params.block_length - lead
    return index, max(0, start), min(start + params.block_length, masked.size)


def _strings(values: Sequence[str]) -> npt.NDArray[np.object_]:
    return np.array([[value.encode() for value in values]], dtype=np.object_)


def cancel_response(wanted: Collection[str], started: float) -> Any:
    """The answer to a request that ends others.

    Args:
        wanted: as for `to_response`.
        started: when this engine was started (seconds, monotonic), for its text.
    """
    outputs = {
        "finish_reason": _strings([FinishReason.CANCELLED.value]),
        "text_output": _strings([repr(started)]),
    }
    return _response(outputs, wanted)


def check_response(engine: Engine, request: Any, inputs: Inputs, wanted: Collection[str]) -> Any:
    """The answer to a request that asks only if it would be accepted; `wanted` as above."""
    tokens = 0
    try:
        parsed = parse_request(engine, request, inputs)
    except InvalidRequest as error:
        verdict, text = "invalid", str(error)
    else:
        verdict, text = "valid", str(engine.headroom(parsed))
        tokens = parsed.prompt.num_tokens
    outputs = {
        "finish_reason": _strings([verdict]),
        "text_output": _strings([text]),
        "usage": np.array([dataclasses.astuple(Usage(tokens, 0, 0, 0))], dtype=np.int32),
    }
    return _response(outputs, wanted)


def reading_response(
    text: str, reason: FinishReason, usage: npt.NDArray[np.int32], wanted: Collection[str]
) -> Any:
    """The answer to a request for decisions or scores; `wanted` as above."""
    outputs = {
        "finish_reason": _strings([reason.value]),
        "text_output": _strings([text]),
        "usage": usage,
    }
    return _response(outputs, wanted)


def failure_response(error: Exception) -> Any:
    """The response to a request that failed in the engine."""
    again = isinstance(error, NotStarted)
    code = pb_utils.TritonError.UNAVAILABLE if again else pb_utils.TritonError.INTERNAL
    return error_response(str(error), code)


def describe_response(engine: Engine, wanted: Collection[str]) -> Any:
    """The answer to a request that asks which model is served; `wanted` as above."""
    summary = ModelSummary.of(engine.config.model_path, engine.spec)
    outputs = {
        "finish_reason": _strings(["described"]),
        "text_output": _strings([json.dumps(dataclasses.asdict(summary))]),
    }
    return _response(outputs, wanted)


def error_response(message: str, code: int) -> Any:
    """A response that holds nothing but an error."""
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(message, code))
