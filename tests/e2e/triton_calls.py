"""Ways to ask Triton, each as a client would."""

from __future__ import annotations

import json
import queue
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import ModuleType, TracebackType
from typing import Any, Self

import numpy as np
import requests
import tritonclient.grpc as triton_grpc

from launcher.tritonserver import TritonServer
from tests.support.servers import PATIENCE

#: Runs for seconds: long enough for anything that must happen meanwhile.
LONG = {"text_input": "a long one", "gen_length": 900, "ignore_eos": True}

NUMPY_TYPES: Mapping[str, type] = {
    "BYTES": np.object_,
    "INT32": np.int32,
    "INT64": np.int64,
    "FP32": np.float32,
    "BOOL": np.bool_,
}


@dataclass(frozen=True)
class Answer:
    """One response of the engine."""

    text: str
    token_ids: list[int]
    confidence: list[float]
    finish_reason: str
    #: Prompt tokens, completion tokens, steps, forward passes.
    usage: tuple[int, ...]
    seed: int

    @classmethod
    def from_json(cls, body: Mapping[str, Any]) -> Self:
        """From an answer of the generate endpoints, where a list of one is a scalar."""
        return cls(
            body["text_output"],
            np.atleast_1d(body["token_ids"]).tolist(),
            np.atleast_1d(body["confidence"]).tolist(),
            body["finish_reason"],
            tuple(body["usage"]),
            body["seed"],
        )

    @classmethod
    def from_result(cls, result: Any) -> Self:
        """From an InferResult of tritonclient."""
        names = ("text_output", "token_ids", "confidence", "finish_reason", "usage", "seed")
        text, tokens, confidence, reason, usage, seed = (
            result.as_numpy(name).reshape(-1).tolist() for name in names
        )
        return cls(text[0].decode(), tokens, confidence, reason[0].decode(), tuple(usage), seed[0])


def post(
    server: TritonServer, fields: Mapping[str, object], *, model: str = "dllm"
) -> requests.Response:
    """POST to the generate endpoint, over a connection of its own."""
    url = f"http://{server.http_url}/v2/models/{model}/generate"
    return requests.post(url, json=fields, timeout=PATIENCE)


def generate(server: TritonServer, *, model: str = "dllm", **fields: object) -> Answer:
    """The answer of the generate endpoint."""
    response = post(server, fields, model=model)
    assert response.status_code == 200, response.text
    return Answer.from_json(response.json())


def open_http_stream(server: TritonServer, fields: Mapping[str, object]) -> requests.Response:
    """POST to generate_stream; the body is not read yet."""
    url = f"http://{server.http_url}/v2/models/dllm/generate_stream"
    return requests.post(url, json={**fields, "stream": True}, stream=True, timeout=PATIENCE)


def events(response: requests.Response) -> Iterator[Answer]:
    """The server-sent events of a stream."""
    for line in response.iter_lines():
        if line:
            yield Answer.from_json(json.loads(line.removeprefix(b"data: ")))


def tensor(protocol: ModuleType, name: str, datatype: str, array: object) -> Any:
    """An input of tritonclient.http or tritonclient.grpc with just this content."""
    values = np.array(array, dtype=NUMPY_TYPES[datatype])
    made = protocol.InferInput(name, list(values.shape), datatype)
    made.set_data_from_numpy(values)
    return made


def tensors(server: TritonServer, protocol: ModuleType, fields: Mapping[str, object]) -> list[Any]:
    """Inputs from plain values, typed as the model's metadata says."""
    metadata = requests.get(f"http://{server.http_url}/v2/models/dllm", timeout=30).json()
    datatypes = {entry["name"]: entry["datatype"] for entry in metadata["inputs"]}
    made = []
    for name, value in fields.items():
        values = value if isinstance(value, list) else [value]
        encoded = [item.encode() if isinstance(item, str) else item for item in values]
        made.append(tensor(protocol, name, datatypes[name], [encoded]))
    return made


class GrpcStream:
    """One request on a gRPC stream of its own; iterate for its answers.

    Leaving it cancels what has not finished. Iterating raises InferenceServerException.
    """

    def __init__(
        self,
        server: TritonServer,
        fields: Mapping[str, object],
        *,
        model: str = "dllm",
        timeout: int | None = None,
        request_id: str = "",
    ) -> None:
        self._client = triton_grpc.InferenceServerClient(server.grpc_url)
        self._replies: queue.SimpleQueue[tuple[Any, Exception | None]] = queue.SimpleQueue()
        self._client.start_stream(lambda result, error: self._replies.put((result, error)))
        inputs = tensors(server, triton_grpc, fields)
        self._client.async_stream_infer(model, inputs, timeout=timeout, request_id=request_id)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._client.stop_stream(cancel_requests=True)
        self._client.close()

    @property
    def unanswered(self) -> bool:
        """Nothing has come that was not fetched."""
        return self._replies.empty()

    def __iter__(self) -> Iterator[Answer]:
        while True:
            result, error = self._replies.get(timeout=PATIENCE)
            if error is not None:
                raise error
            answer = Answer.from_result(result)
            yield answer
            if answer.finish_reason:
                return
