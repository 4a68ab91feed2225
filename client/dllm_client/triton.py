"""Direct access to the Triton models, without the adapter: no jobs, no API keys, no retries.

`TritonClient.generate` asks the model `dllm_unary` over HTTP and waits for the answer;
`TritonClient.stream` asks the model `dllm` over gRPC and yields one event per denoising step.
With TLS both go over gRPC, since Triton's HTTP port has no TLS.
Needs `tritonclient[http,grpc]`; only this module imports it.
"""

import builtins
import json
import operator
import queue
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self, Unpack, get_type_hints

import numpy as np
import tritonclient.grpc as triton_grpc
import tritonclient.http as triton_http
from numpy.typing import NDArray
from tritonclient.utils import InferenceServerException

from dllm_client._client import is_loopback
from dllm_client._errors import (
    BadRequestError,
    DllmError,
    NotFoundError,
    RateLimitedError,
    ServerError,
    TimeoutError,
    UnavailableError,
    UnexpectedResponseError,
)
from dllm_client._types import Block, Prompt, Sampling, TokenDetail, Usage, prompt_field

_TRITON_TYPES: Mapping[object, str] = {
    str: "BYTES",
    list[str]: "BYTES",
    dict[str, Any]: "BYTES",
    int: "INT64",
    list[int]: "INT64",
    float: "FP32",
    bool: "BOOL",
}
#: Triton's type of each input that this module sends, from the annotations of `Sampling`.
INPUT_TYPES: Mapping[str, str] = {
    "text_input": "BYTES",
    "messages": "BYTES",
    "input_ids": "INT64",
    **{name: _TRITON_TYPES[kind] for name, kind in get_type_hints(Sampling).items()},
    "stream": "BOOL",
}
_NUMPY_TYPES: Mapping[str, type[np.generic]] = {
    "BYTES": np.object_,
    "INT64": np.int64,
    "FP32": np.float32,
    "BOOL": np.bool_,
}

#: Errors on a stream have no code; these are Triton's own words, in small letters.
_ERROR_TEXTS: Mapping[str, str] = {
    "unknown model": "NOT_FOUND",
    "is not ready": "UNAVAILABLE",
    "is not healthy": "UNAVAILABLE",
    "exceeds maximum queue size": "RESOURCE_EXHAUSTED",
    "request timeout expired": "DEADLINE_EXCEEDED",
}
_ANY_LENGTH = (("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1))
_REQUEST_ID = re.compile(r"^\[request id: [^\]]*\] ")


@dataclass(frozen=True, slots=True)
class Event:
    """One response of the engine: the state of the canvas, or, at the end, the answer."""

    text: str
    token_ids: NDArray[np.int32]
    confidence: NDArray[np.float32]  #: -1 where a position is still masked
    finish_reason: str  #: empty while the request runs
    usage: Usage
    seed: int
    token_texts: list[str] | None = None  #: what each position shows; in a stream
    block: Block | None = None  #: the one that the next step decodes; in a stream
    #: one per position, None where masked; with `logprobs` or `reveal_steps`
    details: list[TokenDetail | None] | None = None

    @property
    def done(self) -> bool:
        return bool(self.finish_reason)


@dataclass(frozen=True, slots=True)
class Tls:
    """PEM files for Triton's gRPC port."""

    ca_file: str  #: CAs that Triton's certificate may be from
    cert_file: str | None = None  #: this client's certificate, if Triton asks for one
    key_file: str | None = None  #: its private key
    name: str | None = None  #: name in Triton's certificate, if it is not the host of `grpc_url`


class TritonClient:
    """A client of Triton over HTTP and gRPC; `http_url` and `grpc_url` are `host:port`.

    `timeout` is the time in seconds for one answer. Methods raise the errors of `dllm_client`.
    `model` is one of the server's, which also has MODEL_unary.
    Triton's HTTP client is bound to the thread that made it: use one TritonClient per thread.

    With `tls`, all calls go to `grpc_url`. `protocol_key` is `KEY=VALUE`, as in Triton's options
    `--grpc-restricted-protocol` and `--http-restricted-api`.
    """

    def __init__(
        self,
        http_url: str = "localhost:8010",
        grpc_url: str = "localhost:8011",
        *,
        timeout: float = 300.0,
        tls: Tls | None = None,
        protocol_key: str | None = None,
        model: str = "dllm",
    ) -> None:
        self._model = model
        self._grpc_url = grpc_url
        self._timeout = timeout
        self._tls = tls
        key, _, value = (protocol_key or "").partition("=")
        self._grpc_headers = {f"triton-grpc-protocol-{key}": value} if key else {}
        if tls is None:
            self._unary = triton_http.InferenceServerClient(
                http_url, connection_timeout=timeout, network_timeout=timeout
            )
            self._unary_protocol = triton_http
            self._unary_options: dict[str, Any] = {"headers": {key: value} if key else {}}
        else:
            self._unary = self._grpc_client()
            self._unary_protocol = triton_grpc
            self._unary_options = {"headers": self._grpc_headers, "client_timeout": timeout}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._unary.close()

    def ready(self) -> bool:
        """Whether the engine is loaded. Raises UnavailableError when no server answers."""
        with _mapped_errors():
            return bool(self._unary.is_model_ready(self._model, **self._unary_options))

    def generate(self, prompt: Prompt, **sampling: Unpack[Sampling]) -> Event:
        """The finished answer, by one `infer` call."""
        fields = {**_prompt_field(prompt), **sampling}
        inputs = [_tensor(self._unary_protocol, name, value) for name, value in fields.items()]
        with _mapped_errors():
            return _event(self._unary.infer(f"{self._model}_unary", inputs, **self._unary_options))

    def stream(self, prompt: Prompt, **sampling: Unpack[Sampling]) -> Iterator[Event]:
        """One event per denoising step; the last one is `done`. Closing the iterator cancels."""
        fields = {**_prompt_field(prompt), **sampling, "stream": True}
        inputs = [_tensor(triton_grpc, name, value) for name, value in fields.items()]
        replies: queue.SimpleQueue[tuple[Any, Exception | None]] = queue.SimpleQueue()
        # A client of tritonclient carries one stream at a time, so each call has its own.
        with self._grpc_client() as client:
            # Not with the header `triton_grpc_error`, which would keep the codes of errors: a few
            # refused requests in a row then crash this generation of the server.
            client.start_stream(
                lambda result, error: replies.put((result, error)), headers=self._grpc_headers
            )
            try:
                # It refuses when the stream is dead already; the callback has been told why.
                with suppress(InferenceServerException):
                    client.async_stream_infer(self._model, inputs)
                with _mapped_errors():
                    yield from self._events(replies)
            finally:
                client.stop_stream(cancel_requests=True)

    def _grpc_client(self) -> Any:
        options: list[tuple[str, Any]] = [*_ANY_LENGTH]
        if is_loopback(self._grpc_url.rpartition(":")[0].strip("[]")):
            # gRPC would send even this to a proxy of the environment.
            options.append(("grpc.enable_http_proxy", 0))
        if self._tls is None:
            return triton_grpc.InferenceServerClient(self._grpc_url, channel_args=options)
        if self._tls.name is not None:
            options.append(("grpc.ssl_target_name_override", self._tls.name))
        return triton_grpc.InferenceServerClient(
            self._grpc_url,
            ssl=True,
            root_certificates=self._tls.ca_file,
            certificate_chain=self._tls.cert_file,
            private_key=self._tls.key_file,
            channel_args=options,
        )

    def _events(
        self, replies: "queue.SimpleQueue[tuple[Any, Exception | None]]"
    ) -> Iterator[Event]:
        while True:
            try:
                # A killed model process sends nothing, not even an error.
                result, error = replies.get(timeout=self._timeout)
            except queue.Empty:
                message = f"no event within {self._timeout:g} s"
                raise TimeoutError(message) from None
            if error is not None:
                raise error
            event = _event(result)
            yield event
            if event.done:
                return


def _prompt_field(prompt: Prompt) -> dict[str, Any]:
    """The prompt as an input of the models, to which a text goes without a chat template."""
    match prompt_field(prompt):
        case {"prompt": text}:
            return {"text_input": text}
        case {"messages": messages}:
            return {"messages": json.dumps([dict(one) for one in messages], ensure_ascii=False)}
        case token_ids:
            return token_ids


def _tensor(protocol: Any, name: str, value: Any) -> Any:
    """A tensor of shape [1, n]; raises BadRequestError for a field that no model has."""
    if name not in INPUT_TYPES:
        raise BadRequestError(f"{name}: the models have no such input", 400, name)
    datatype = INPUT_TYPES[name]
    if isinstance(value, Mapping):
        value = json.dumps(value)
    values = list(value) if isinstance(value, list | tuple) else [value]
    try:
        array = np.array([_exact(values, datatype)], dtype=_NUMPY_TYPES[datatype])
    except (TypeError, ValueError) as error:
        raise BadRequestError(f"{name}: {value!r} is no {datatype}: {error}", 400, name) from error
    tensor = protocol.InferInput(name, list(array.shape), datatype)
    tensor.set_data_from_numpy(array)
    return tensor


def _exact(values: list[Any], datatype: str) -> list[Any]:
    """Check integers, since numpy cuts off fractions and wraps large ones."""
    if not datatype.startswith("INT"):
        return values
    integers = [operator.index(value) for value in values]
    bits = int(datatype.removeprefix("INT"))
    if any(not -(2 ** (bits - 1)) <= value < 2 ** (bits - 1) for value in integers):
        raise ValueError("out of range")
    return integers


def _event(result: Any) -> Event:
    def output(name: str) -> NDArray[Any]:
        values = result.as_numpy(name)
        if values is None:
            raise UnexpectedResponseError(f"the model sent no output {name!r}")
        flat: NDArray[Any] = values.reshape(-1)
        return flat

    return Event(
        text=output("text_output")[0].decode(),
        token_ids=output("token_ids"),
        confidence=output("confidence"),
        finish_reason=output("finish_reason")[0].decode(),
        usage=Usage(*output("usage").tolist()),
        seed=int(output("seed")[0]),
        **_canvas(result),
        details=_details(result.as_numpy("token_details")),
    )


def _details(output: NDArray[Any] | None) -> list[TokenDetail | None] | None:
    if output is None:
        return None
    entries = json.loads(output.reshape(-1)[0])
    return [None if entry is None else TokenDetail.of(entry) for entry in entries]


def _canvas(result: Any) -> dict[str, Any]:
    """The outputs that only `dllm` has."""
    texts, block = result.as_numpy("token_texts"), result.as_numpy("block")
    if texts is None or block is None:
        return {}
    return {
        "token_texts": [text.decode() for text in texts.reshape(-1)],
        "block": Block(*block.reshape(-1).tolist()),
    }


@contextmanager
def _mapped_errors() -> Iterator[None]:
    try:
        yield
    except InferenceServerException as error:
        raise _mapped(error) from error
    except builtins.TimeoutError as error:
        raise TimeoutError(f"Triton did not answer in time: {error}") from error
    except OSError as error:
        raise UnavailableError(f"cannot reach Triton: {error}") from error


def _mapped(error: InferenceServerException) -> DllmError:
    """Our error for one of tritonclient's, by its code, or by its text on a stream."""
    message = _REQUEST_ID.sub("", str(error.message()))
    field, _, _ = message.partition(":")
    if field in INPUT_TYPES:
        return BadRequestError(message, 400, field)
    code = str(error.status()).removeprefix("StatusCode.")
    if error.status() is None:
        words = message.lower()
        code = next((code for text, code in _ERROR_TEXTS.items() if text in words), "")
    match code:
        case "INVALID_ARGUMENT" | "400":
            return BadRequestError(message, 400)
        case "NOT_FOUND" | "404":
            return NotFoundError(message, 404)
        case "RESOURCE_EXHAUSTED" | "429":
            return RateLimitedError(message, 429)
        case "UNAVAILABLE" | "503":
            return UnavailableError(message)
        case "DEADLINE_EXCEEDED" | "504" | "499":
            return TimeoutError(message)
        case _:
            return ServerError(message, 500)
