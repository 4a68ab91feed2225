"""What the engine refuses, and how the refusal reaches the client.

Streams are opened without the header `triton_grpc_error`: with it, errors crash tritonserver
24.10 every so often. The gRPC code is therefore checked on `dllm_unary`.
"""

from __future__ import annotations

import json
import re
from itertools import islice
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as triton_grpc
from tritonclient.utils import InferenceServerException

from launcher.tritonserver import TritonServer
from tests.e2e.triton_calls import GrpcStream, generate, post, tensor, tensors
from tests.support.servers import settled_counters

HELLO = {"text_input": "hello"}

#: Field at fault, the request, and what the message says about the limit.
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("text_input", {"text_input": ""}, "empty"),
    ("text_input", {"gen_length": 4}, "exactly one of text_input, messages, input_ids"),
    ("text_input", HELLO | {"input_ids": [1]}, "exactly one of"),
    ("text_input", HELLO | {"messages": "[]"}, "exactly one of"),
    ("messages", {"messages": "[]"}, "list"),
    ("messages", {"messages": "hello"}, "JSON list"),
    ("messages", {"messages": '[{"role": "user"}]'}, "content"),
    ("input_ids", {"input_ids": [512]}, "0..511"),
    ("input_ids", {"input_ids": [-1]}, "0..511"),
    ("temperature", HELLO | {"temperature": -0.5}, "0 to 1000000"),
    ("gen_length", HELLO | {"gen_length": 0}, "at least 1"),
    ("gen_length", HELLO | {"gen_length": 1025}, "at most 1024"),
    ("gen_length", {"text_input": "x" * 1000, "gen_length": 32}, "at most 1024"),
    ("steps", HELLO | {"steps": 0}, "at least 1"),
    ("steps", HELLO | {"gen_length": 64, "block_length": 16, "steps": 3}, "at least .*4"),
    ("block_length", HELLO | {"block_length": 0}, "at least 1"),
    ("block_length", HELLO | {"gen_length": 8, "block_length": 9}, "1 to .*8"),
    ("cfg_scale", HELLO | {"cfg_scale": -1.0}, "0 to 1000;"),
    ("remasking", HELLO | {"remasking": "best"}, "low_confidence"),
    ("confidence_threshold", HELLO | {"confidence_threshold": 0.0}, "above 0"),
    ("confidence_threshold", HELLO | {"confidence_threshold": 1.5}, "at most 1"),
    ("top_p", HELLO | {"top_p": 0.0}, "above 0"),
    ("top_p", HELLO | {"top_p": 1.5}, "at most 1"),
    ("top_k", HELLO | {"top_k": 0}, "at least 1"),
    ("stop", HELLO | {"stop": [""]}, "1 to 256"),
    ("stop", HELLO | {"stop": ["x" * 257]}, "1 to 256"),
    ("stop", HELLO | {"stop": ["x"] * 17}, "at most 16"),
    ("cache", HELLO | {"cache": "huge"}, "none"),
    ("retention_ratio", HELLO | {"cache": "sparse", "retention_ratio": 7.0}, "at most 1"),
    (
        "retention_ratio",
        HELLO | {"cache": "dual", "retention_ratio": 0.5},
        "sparse; got cache dual",
    ),
    ("priority", HELLO | {"priority": 4}, "1 to 3"),
    ("pool_kernel", HELLO | {"cache": "sparse", "pool_kernel": 2}, "odd"),
    ("delay_steps", HELLO | {"cache": "dual", "delay_steps": -1}, "at least 0"),
    ("refresh_interval", HELLO | {"refresh_interval": 2}, "got cache none"),
    # Their low 32 bits are valid.
    ("input_ids", {"input_ids": [2**32 + 8]}, "0..511"),
    ("gen_length", HELLO | {"gen_length": 2**32 + 8}, "at most 1024"),
    ("steps", HELLO | {"steps": 2**32 + 8}, "at most 2147483647"),
    ("block_length", HELLO | {"block_length": 2**32 + 8}, "at most 2147483647"),
    ("top_k", HELLO | {"top_k": 2**32 + 8}, "at most 2147483647"),
    ("pool_kernel", HELLO | {"cache": "sparse", "pool_kernel": 2**32 + 3}, "1 to 63"),
    ("delay_steps", HELLO | {"cache": "dual", "delay_steps": 2**32}, "at most 2147483647"),
    ("refresh_interval", HELLO | {"cache": "dual", "refresh_interval": 2**32}, "at most 21474"),
    ("priority", HELLO | {"priority": 2**32 + 2}, "1 to 3"),
]


@pytest.mark.parametrize(("field", "request_", "limit"), REFUSED)
def test_refusal_names_field_and_limit(
    triton: TritonServer, field: str, request_: dict[str, Any], limit: str
) -> None:
    """Over every protocol a refusal is the client's fault, and names the field and its limit."""
    messages = []
    for model in ("dllm", "dllm_unary"):
        response = post(triton, request_, model=model)
        assert response.status_code == 400, response.text
        messages.append(response.json()["error"])
    code, message = refusal(triton, tensors(triton, triton_grpc, request_))
    assert code == "StatusCode.INVALID_ARGUMENT"
    messages.append(message)
    with GrpcStream(triton, request_) as stream, pytest.raises(InferenceServerException) as error:
        list(stream)
    messages.append(error.value.message())
    for message in messages:
        assert re.search(rf"^{field}: .*{limit}", message)


def refusal(server: TritonServer, inputs: list[Any]) -> tuple[str, str]:
    """Code and message with which `dllm_unary` refuses these inputs over gRPC."""
    with (
        triton_grpc.InferenceServerClient(server.grpc_url) as client,
        pytest.raises(InferenceServerException) as error,
    ):
        client.infer("dllm_unary", inputs)
    return error.value.status(), error.value.message()


@pytest.mark.parametrize("name", ["gen_len", "max_tokens", "timeout"])
@pytest.mark.parametrize("model", ["dllm", "dllm_unary"])
def test_unknown_name_is_refused(triton: TritonServer, model: str, name: str) -> None:
    """The generate endpoint refuses every name that it would not honour."""
    response = post(triton, HELLO | {name: 1}, model=model)
    assert response.status_code == 400
    assert response.json()["error"].startswith(f"{name}: ")


@pytest.mark.parametrize(
    ("name", "datatype", "array", "message"),
    [
        ("text_input", "BYTES", [[b"\xff\xfe"]], "^text_input: must be UTF-8"),
        ("text_input", "BYTES", [[b"one"], [b"two"]], "^text_input: one prompt per request"),
        ("text_input", "BYTES", [[b"one", b"two"]], "'text_input'"),
        ("messages", "BYTES", [[b'[{"role": "user", "content": "\xff"}]']], "^messages: .*UTF-8"),
        ("input_ids", "INT64", [[1, 2], [3, 4]], "^input_ids: one prompt per request"),
        ("temperature", "FP32", [[np.nan]], "^temperature: .*0 to 1000000"),
        ("temperature", "FP32", [[np.inf]], "^temperature: .*0 to 1000000"),
        ("temperature", "FP32", [[0.1, 0.2]], "'temperature'"),
        ("temperature", "INT32", [[1]], "'temperature'"),
        ("gen_length", "INT32", [[8]], "'gen_length' data-type is 'INT32', but .* expects 'INT64'"),
        ("stop", "BYTES", [[b"fine", b"\xff"]], "^stop: must be UTF-8"),
        ("heat", "FP32", [[1.0]], "'heat'"),
    ],
)
def test_bad_tensor_is_refused(
    triton: TritonServer, name: str, datatype: str, array: object, message: str
) -> None:
    """A tensor of the wrong shape, type, name or encoding is refused, and the message names it."""
    inputs = [tensor(triton_grpc, name, datatype, array)]
    if name not in ("text_input", "messages", "input_ids"):
        inputs += tensors(triton, triton_grpc, HELLO)
    code, text = refusal(triton, inputs)
    assert code == "StatusCode.INVALID_ARGUMENT"
    assert re.search(message, text)


def test_refusals_harm_nobody_else(triton: TritonServer) -> None:
    """A request that runs while others are refused gets the answer it would have got alone."""
    fields = {"text_input": "steady", "gen_length": 128, "temperature": 0.9, "seed": 4}
    alone = generate(triton, **fields)
    with GrpcStream(triton, fields | {"stream": True}) as stream:
        list(islice(stream, 3))
        for _, request, _ in REFUSED[::4]:
            assert post(triton, request).status_code == 400
        *_, last = stream
    assert last == alone


def test_check_says_whether_it_would_be_refused(triton: TritonServer) -> None:
    """`check` answers in the words of the refusal, as an answer and not as an error."""
    for field, request, limit in REFUSED:
        response = post(triton, request | {"check": True})
        assert response.status_code == 200, response.text
        body = response.json()
        assert body["finish_reason"] == "invalid"
        assert re.search(rf"^{field}: .*{limit}", body["text_output"])


def test_check_runs_nothing(triton: TritonServer) -> None:
    """A check of an acceptable request returns its number of tokens and how many more would fit."""
    before = settled_counters(triton)
    body = post(triton, HELLO | {"gen_length": 100, "check": True}).json()
    assert body["finish_reason"] == "valid"
    tokens, room = body["usage"][0], int(body["text_output"])
    assert body["usage"][1:] == [0, 0, 0, 0]
    assert tokens + 100 + room == 1024
    ids = [1] * (tokens + room)
    for prompt, verdict in ((ids, "valid"), ([*ids, 1], "invalid")):
        fields = {"input_ids": prompt, "gen_length": 100, "check": True}
        assert post(triton, fields).json()["finish_reason"] == verdict
    assert settled_counters(triton) == before
    assert generate(triton, **HELLO, check=False, gen_length=4).usage[0] == tokens


def test_describe_tells_which_model_is_served(triton: TritonServer) -> None:
    """`describe` runs nothing and answers with family and sizes; it stands alone."""
    before = settled_counters(triton)
    body = post(triton, {"describe": True}).json()
    assert body["finish_reason"] == "described"
    told = json.loads(body["text_output"])
    assert (told["family"], told["max_model_len"]) == ("llada", 1024)
    assert told["num_parameters"] > 0
    assert settled_counters(triton) == before
    for fields in ({"describe": False}, {"describe": True} | HELLO):
        assert re.search("^describe: must|describe: cannot", post(triton, fields).json()["error"])
