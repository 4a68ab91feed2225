"""Requests to an engine, their events, and the protocol of an engine."""

from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Protocol, Self

InputValue = str | int | float | bool | list[int] | list[str]

#: Inputs of the Triton model by name (`config.pbtxt`); the model has defaults for absent ones.
Inputs = Mapping[str, InputValue]

#: The engine's levels are 1, first, to 3, last.
DEFAULT_PRIORITY = 2


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens, steps and forward passes of a request."""

    prompt_tokens: int
    completion_tokens: int
    steps: int
    forward_passes: int
    #: Tokens of the prompt that the engine's prefix cache had.
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Canvas:
    """The canvas after a step; every list has one item per position."""

    token_ids: list[int]
    #: The text of each position; "" for special tokens.
    token_texts: list[str]
    #: Probability of a token when it was committed; 1 for a given token, −1 for a mask.
    confidence: list[float]
    #: Index, start and end of the block that the next step decodes.
    block: tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class TopLogprob:
    """One of the most probable tokens at a position."""

    token_id: int
    #: Its text; a special token's name.
    token: str
    #: The bytes that it adds to the text.
    bytes: list[int]
    logprob: float


@dataclass(frozen=True, slots=True)
class TokenDetail:
    """A token of the answer, with what the request asked for; the rest is None."""

    token_id: int
    #: Its text; a special token's name.
    token: str
    #: The bytes that it adds to the text.
    bytes: list[int]
    #: The step that committed it, from 1; 0 for a given token.
    step: int | None = None
    #: Log-softmax of the model's logits at that step; None for a given token.
    logprob: float | None = None
    top_logprobs: list[TopLogprob] | None = None

    @classmethod
    def of(cls, entry: Mapping[str, Any]) -> Self:
        """Read an entry of the output `token_details`."""
        top = entry["top_logprobs"]
        others = None if top is None else [TopLogprob(**other) for other in top]
        return cls(**{**entry, "top_logprobs": others})


@dataclass(frozen=True, slots=True)
class Event:
    """One response of the engine; the last one of a request carries a `finish_reason`."""

    #: The answer; before the last event, its final beginning.
    text: str
    finish_reason: str = ""
    usage: Usage | None = None
    seed: int | None = None
    canvas: Canvas | None = None
    #: One item per position of the canvas, None where masked; None unless the request asks.
    details: list[TokenDetail | None] | None = None

    @property
    def tokens(self) -> list[TokenDetail] | None:
        """Details of the answer's final tokens, with the one that ends it."""
        if self.details is None or self.usage is None:
            return None
        answer = self.details[: self.usage.completion_tokens]
        return [detail for detail in answer if detail is not None]

    @property
    def is_queued(self) -> bool:
        """Whether the request still waits for a slot in the engine."""
        return not self.finish_reason and self.usage is not None and self.usage.steps == 0


@dataclass(frozen=True, slots=True)
class CheckResult:
    """The result of checking a request without running it."""

    #: The input and what is wrong with it; "" for a valid request.
    refusal: str = ""
    #: How many tokens longer the prompt could be.
    headroom: int = 0


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """An engine's description of its model; a field that it leaves out is None."""

    #: The name of the checkpoint's directory.
    checkpoint: str | None = None
    family: str | None = None
    #: The class that the checkpoint's config names.
    architecture: str | None = None
    num_parameters: int | None = None
    #: Tokens of prompt and canvas together.
    max_model_len: int | None = None
    mask_token_id: int | None = None
    #: Tokens per block of a block-wise model.
    block_length: int | None = None


@dataclass(frozen=True, slots=True)
class Repository:
    """The models that a tritonserver lists."""

    #: Those that are engines of ours, by name.
    engines: tuple[str, ...] = ()
    #: Those that are not loaded and may be engines: why, by name.
    unready: Mapping[str, str] = field(default_factory=dict)
    #: Those that are no engines.
    others: frozenset[str] = frozenset()


class StreamDetail(Enum):
    """How much the events of a request carry, and how often they come."""

    #: Only the result; before it, a heartbeat now and then.
    RESULT = "result"
    #: An event per step, with the final text so far.
    TEXT = "text"
    #: The same, with the canvas.
    CANVAS = "canvas"


class Engine(Protocol):
    """Turns requests into text: Triton, or a script in the tests."""

    def generate(
        self,
        inputs: Inputs,
        *,
        request_id: str,
        detail: StreamDetail = StreamDetail.RESULT,
        priority: int = DEFAULT_PRIORITY,
    ) -> AsyncGenerator[Event, None]:
        """Stream the events of one request; closing the iterator cancels it.

        Raises `InvalidRequest` or a subclass of `EngineError`.
        """
        ...

    async def check(self, requests: Sequence[Inputs]) -> list[CheckResult]:
        """Check requests without running them. Raises an `EngineError`."""
        ...

    async def describe(self) -> ModelInfo:
        """Ask which model is served. Raises `InvalidRequest` or an `EngineError`."""
        ...

    async def repository(self, known: Repository | None) -> Repository:
        """Ask which models its server has; `known` is an earlier answer. Raises an `AdapterError`.

        An engine that is `known` stays one while it is listed, whether it is loaded or not.
        """
        ...

    def cancel(self, request_id: str) -> None:
        """Cancel the requests of this id, without waiting for the engine."""
        ...

    async def probe(self) -> None:
        """See whether it takes steps. Raises `InvalidRequest` or an `EngineError`."""
        ...

    async def close(self) -> None:
        """Let go of every connection."""
        ...
