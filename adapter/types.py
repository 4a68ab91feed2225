"""The seam between jobs and an engine: what is asked, what comes back, and who answers."""

from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

InputValue = str | int | float | bool | list[int] | list[str]

#: Inputs of the Triton model by name (`config.pbtxt`); what is absent takes the model's default.
Inputs = Mapping[str, InputValue]

#: Of the levels that the engine knows: 1 is first, 3 last.
DEFAULT_PRIORITY = 2


@dataclass(frozen=True, slots=True)
class Usage:
    """What a request cost."""

    prompt_tokens: int
    completion_tokens: int
    steps: int
    forward_passes: int


@dataclass(frozen=True, slots=True)
class Canvas:
    """What every position of a canvas holds after a step; all lists have its length."""

    token_ids: list[int]
    #: What a position adds to the text; "" for special tokens.
    token_texts: list[str]
    #: Probability a token was committed with, 1 where it was given, −1 where the canvas is masked.
    confidence: list[float]
    #: Index, start and end of the block that the next step decodes.
    block: tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Event:
    """One response of the engine; the last one of a request carries a `finish_reason`."""

    #: The answer; before the last event, that beginning of it which is final.
    text: str
    finish_reason: str = ""
    usage: Usage | None = None
    seed: int | None = None
    canvas: Canvas | None = None

    @property
    def waits(self) -> bool:
        """A sign of life of a request that has no place in the engine yet."""
        return not self.finish_reason and self.usage is not None and self.usage.steps == 0


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the engine says of a request that it does not run."""

    #: The field and what is wrong with it; "": it would be taken.
    refusal: str = ""
    #: By how many tokens its prompt might be longer.
    room: int = 0


class Detail(Enum):
    """What the events of a request are wanted for."""

    #: The last one alone counts; others come now and then, as signs of life.
    RESULT = "result"
    #: One for each step, with the text that is final.
    TEXT = "text"
    #: The same with the canvas.
    CANVAS = "canvas"


class Engine(Protocol):
    """Whoever turns requests into text: Triton, or a script in the tests."""

    def generate(
        self,
        inputs: Inputs,
        *,
        request_id: str,
        detail: Detail = Detail.RESULT,
        priority: int = DEFAULT_PRIORITY,
    ) -> AsyncGenerator[Event, None]:
        """Stream the events of one request; closing the iterator cancels it.

        Raises `InvalidRequest` or a subclass of `EngineError`.
        """
        ...

    async def check(self, requests: Sequence[Inputs]) -> list[Verdict]:
        """Whether it would take each of these; nothing is run. Raises an `EngineError`."""
        ...

    def cancel(self, request_id: str) -> None:
        """Have the requests of this id ended, without waiting for it."""
        ...

    async def probe(self) -> None:
        """See whether it takes steps. Raises `InvalidRequest` or an `EngineError`."""
        ...

    async def close(self) -> None:
        """Let go of every connection."""
        ...
