"""Events of /v1/generate/stream: the canvas after each step, then the answer."""

from collections.abc import AsyncGenerator, Sequence
from typing import Self

from fastapi.sse import KEEPALIVE_COMMENT
from pydantic import BaseModel, Field

from adapter.api.sse import sse
from adapter.engine.streaming import StreamingRequest
from adapter.errors import AdapterError
from adapter.types import Canvas, Event, TokenDetail, Usage

CONFIDENCE_DIGITS = 6  # all that a 32-bit float holds


class Block(BaseModel):
    """A block of the canvas, from position `start` up to but not including `end`."""

    index: int
    start: int
    end: int


class Committed(BaseModel):
    """A position committed since the previous event; it will not change."""

    position: int
    token_id: int
    text: str = Field(description='the text it adds; "" for special tokens')
    confidence: float = Field(description="probability at which it was committed")
    detail: TokenDetail | None = Field(
        None, description="only with `logprobs` or `reveal_steps`", exclude_if=lambda d: d is None
    )


class Step(BaseModel):
    """Event `step`: the canvas after a denoising step.

    A slow reader gets fewer of these events; `committed` then covers all steps since the
    previous event.
    """

    step: int = Field(description="denoising steps run so far")
    block: Block = Field(description="the block that the next step decodes")
    canvas: list[str | None] = Field(
        description="text of each position, which may still change; null where masked"
    )
    committed: list[Committed]
    final_text: str = Field(description="the beginning of the answer, which will not change")
    seed: int = Field(description="what repeats the answer")


class Done(BaseModel):
    """Event `done`: the answer. It is the last event."""

    text: str
    finish_reason: str
    usage: Usage
    seed: int
    tokens: list[TokenDetail] | None = Field(
        None,
        description="the answer's tokens, only with `logprobs` or `reveal_steps`",
        exclude_if=lambda tokens: tokens is None,
    )

    @classmethod
    def of(cls, event: Event) -> Self:
        """Make it from the last event of the engine."""
        assert event.usage is not None
        assert event.seed is not None
        return cls(
            text=event.text,
            finish_reason=event.finish_reason,
            usage=event.usage,
            seed=event.seed,
            tokens=event.tokens,
        )


class Failed(BaseModel):
    """Event `error`: the request failed. It is the last event."""

    error: str


class CanvasView:
    """Turns events of the engine into `step` events, with what is new in each.

    Args:
        given: token ids of the requested canvas; empty if it was all masks.
    """

    def __init__(self, given: Sequence[int]) -> None:
        self._given = given
        self._shown: set[int] = set()

    def step(self, event: Event) -> Step:
        """The `step` event; each committed position appears in exactly one of them."""
        canvas, usage = event.canvas, event.usage
        assert canvas is not None
        assert usage is not None
        assert event.seed is not None
        index, start, end = canvas.block
        return Step(
            step=usage.steps,
            block=Block(index=index, start=start, end=end),
            canvas=[
                text if confidence >= 0 else None
                for text, confidence in zip(canvas.token_texts, canvas.confidence, strict=True)
            ],
            committed=self._committed(canvas, event.details),
            final_text=event.text,
            seed=event.seed,
        )

    def _committed(
        self, canvas: Canvas, details: Sequence[TokenDetail | None] | None
    ) -> list[Committed]:
        new = [
            position
            for position, confidence in enumerate(canvas.confidence)
            if confidence >= 0 and position not in self._shown
        ]
        self._shown.update(new)
        return [
            Committed(
                position=position,
                token_id=canvas.token_ids[position],
                text=canvas.token_texts[position],
                confidence=round(canvas.confidence[position], CONFIDENCE_DIGITS),
                detail=details[position] if details else None,
            )
            for position in new
            if not self._is_given(position, canvas.token_ids[position])
        ]

    def _is_given(self, position: int, token_id: int) -> bool:
        # Positions to decode hold the mask id, which is never committed.
        return bool(self._given) and self._given[position] == token_id


async def denoising_events(
    request: StreamingRequest, view: CanvasView, *, heartbeat: float
) -> AsyncGenerator[bytes, None]:
    """Stream a request as server-sent events: steps, then the answer or an error."""
    try:
        while True:
            event = await request.next_event(heartbeat)
            if event is None:
                yield KEEPALIVE_COMMENT
                continue
            yield sse(view.step(event), "step")
            if event.finish_reason:
                yield sse(Done.of(event), "done")
                return
    except AdapterError as error:
        yield sse(Failed(error=str(error)), "error")
