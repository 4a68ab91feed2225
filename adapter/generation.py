"""The seam between jobs and an engine: what is asked, what comes back, and who answers."""

from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass
from typing import Protocol

InputValue = str | int | float | bool | list[int] | list[str]

#: Inputs of the Triton model by name (`config.pbtxt`); what is absent takes the model's default.
Inputs = Mapping[str, InputValue]


@dataclass(frozen=True, slots=True)
class Usage:
    """What a request cost."""

    prompt_tokens: int
    completion_tokens: int
    steps: int
    forward_passes: int


@dataclass(frozen=True, slots=True)
class Event:
    """One response of the engine; the last one of a request carries a `finish_reason`."""

    text: str
    finish_reason: str = ""
    usage: Usage | None = None
    seed: int | None = None


class Engine(Protocol):
    """Whoever turns requests into text: Triton, or a script in the tests."""

    def generate(self, inputs: Inputs, *, request_id: str) -> AsyncGenerator[Event, None]:
        """Stream the events of one request; closing the iterator cancels it.

        Raises `InvalidRequest` or a subclass of `EngineError`.
        """
        ...

    async def probe(self) -> None:
        """Run the smallest real request. Raises `InvalidRequest` or an `EngineError`."""
        ...

    async def reload(self) -> None:
        """Replace the engine's process. Raises an `EngineError` when that fails."""
        ...

    async def close(self) -> None:
        """Let go of every connection."""
        ...
