"""Events of a streamed response, in OpenAI's order, each with its number."""

import asyncio
import itertools
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from fastapi.sse import KEEPALIVE_COMMENT

from adapter.api.openai.errors import status_and_body
from adapter.api.openai.logprobs import text_tokens
from adapter.api.openai.response_objects import (
    OutputMessage,
    OutputText,
    Response,
    ResponseEvent,
    logprobs_of,
    new_message_id,
)
from adapter.api.sse import sse
from adapter.engine.streaming import StreamingRequest
from adapter.errors import AdapterError
from adapter.types import Event

#: Types of events, in the order in which a stream has them; the last three are ends.
RESPONSE_EVENTS = (
    "response.created",
    "response.in_progress",
    "response.output_item.added",
    "response.content_part.added",
    "response.output_text.delta",
    "response.output_text.done",
    "response.content_part.done",
    "response.output_item.done",
    "response.completed",
    "response.incomplete",
    "response.failed",
)


async def response_events(
    running: StreamingRequest, response: Response, *, heartbeat: float, length: str
) -> AsyncGenerator[bytes, None]:
    """Stream one request: its opening, the text piece by piece, and the whole response."""
    events = _Events(response)
    now = asyncio.get_running_loop().time
    try:
        for event in events.opening():
            yield event
        spoke = now()
        while True:
            update = await running.next_event(heartbeat)
            if update is not None and (delta := events.delta(update)):
                yield delta
                spoke = now()
            elif now() - spoke >= heartbeat:
                yield KEEPALIVE_COMMENT
                spoke = now()
            if update is not None and update.finish_reason:
                break
        for event in events.ending(update):
            yield event
    except AdapterError as error:
        message = status_and_body(error, length)[1]["error"]["message"]
        yield events.failed(str(message))


class _Events:
    """Numbers the events of one response, and knows what was sent of its text."""

    def __init__(self, response: Response) -> None:
        self._response = response
        self._numbers = itertools.count()
        self._message = OutputMessage(id=new_message_id(), status="in_progress", content=[])
        self._length = self._num_tokens = 0

    def opening(self) -> Sequence[bytes]:
        return [
            self._event("response.created", response=self._response),
            self._event("response.in_progress", response=self._response),
            self._event("response.output_item.added", output_index=0, item=self._message),
            self._of_part("response.content_part.added", part=OutputText(text="")),
        ]

    def delta(self, event: Event) -> bytes | None:
        """Return the event for new text; None if there is none."""
        new = event.text[self._length :]
        if not new:
            return None
        tokens = text_tokens(event) or []
        logprobs = logprobs_of(tokens[self._num_tokens :])
        self._length, self._num_tokens = len(event.text), len(tokens)
        return self._of_part("response.output_text.delta", delta=new, logprobs=logprobs)

    def ending(self, result: Event) -> Sequence[bytes]:
        response = self._response.ended(result, self._message.id)
        (message,) = response.output
        (part,) = message.content
        text = {"text": part.text, "logprobs": part.logprobs}
        return [
            self._of_part("response.output_text.done", **text),
            self._of_part("response.content_part.done", part=part),
            self._event("response.output_item.done", output_index=0, item=message),
            self._event(f"response.{response.status}", response=response),
        ]

    def failed(self, message: str) -> bytes:
        return self._event("response.failed", response=self._response.failed(message))

    def _of_part(self, kind: str, **fields: Any) -> bytes:
        place = {"item_id": self._message.id, "output_index": 0, "content_index": 0}
        return self._event(kind, **place, **fields)

    def _event(self, kind: str, **fields: Any) -> bytes:
        number = next(self._numbers)
        return sse(ResponseEvent(type=kind, sequence_number=number, **fields), kind)
