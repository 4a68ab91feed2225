"""Server-sent events of a denoising: bytes in, steps and the answer out."""

import codecs
import json
from collections.abc import Iterator, Mapping
from typing import Any

from dllm_client._errors import StreamError, UnexpectedResponseError
from dllm_client._operations import Call
from dllm_client._types import (
    Answer,
    Block,
    Committed,
    Params,
    Prompt,
    Step,
    TokenDetail,
    Usage,
    prompt_field,
    read_tokens,
)


def open_stream(prompt: Prompt, params: Params) -> Call:
    """The call that a stream answers."""
    return Call("POST", "/v1/generate/stream", json={**prompt_field(prompt), **params})


class StreamReader:
    """Reads one stream, chunk by chunk, wherever the chunks are cut."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._unread = ""

    def feed(self, chunk: bytes) -> Iterator[Step | Answer]:
        """The events that this chunk completes. Raises StreamError for the server's error event."""
        # Lines end at "\n" alone: a text may hold other characters that Python splits lines at.
        *blocks, self._unread = (self._unread + self._decoder.decode(chunk)).split("\n\n")
        for block in blocks:
            fields = dict(
                line.split(": ", 1) for line in block.split("\n") if not line.startswith(":")
            )
            if "data" in fields:
                yield _event(fields.get("event", ""), fields["data"])

    def end(self) -> StreamError:
        """The error for a stream that ends without an answer."""
        return StreamError("the stream ended without an answer")


def _event(name: str, data: str) -> Step | Answer:
    try:
        body = json.loads(data)
        match name:
            case "step":
                return _step(body)
            case "done":
                return Answer(
                    text=str(body["text"]),
                    finish_reason=str(body["finish_reason"]),
                    usage=Usage.of(body["usage"]),
                    seed=int(body["seed"]),
                    tokens=read_tokens(body.get("tokens")),
                )
            case "error":
                message = str(body["error"])
            case _:
                raise UnexpectedResponseError(f"not an event of a denoising: {name!r}")
    except (KeyError, TypeError, ValueError) as error:
        raise UnexpectedResponseError(f"not a {name} event: {data!r}") from error
    raise StreamError(message)


def _step(body: Mapping[str, Any]) -> Step:
    return Step(
        step=int(body["step"]),
        block=Block(**body["block"]),
        canvas=list(body["canvas"]),
        committed=[_committed(one) for one in body["committed"]],
        final_text=str(body["final_text"]),
        seed=body.get("seed"),
    )


def _committed(fields: Mapping[str, Any]) -> Committed:
    detail = fields.get("detail")
    return Committed(**{**fields, "detail": None if detail is None else TokenDetail.of(detail)})
