"""How results look as completions and as chat completions, whole and chunk by chunk."""

from collections.abc import Sequence
from typing import Protocol

from pydantic import BaseModel

from adapter.api.openai.responses import (
    AssistantMessage,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    Completion,
    Delta,
    Head,
    TextChoice,
    TokenUsage,
)
from adapter.types import Event


class Shape(Protocol):
    """The chunks of one answer; `index` is the number of the prompt."""

    def opening(self, index: int) -> BaseModel | None:
        """What comes before any text, if anything does."""
        ...

    def piece(self, index: int, text: str) -> BaseModel:
        """Some text more."""
        ...

    def ending(self, index: int, result: Event) -> BaseModel:
        """There is no more text, and why."""
        ...

    def usage(self, results: Sequence[Event]) -> BaseModel:
        """What it all cost."""
        ...


class CompletionShape:
    """Answers of /v1/completions."""

    def __init__(self, model: str) -> None:
        self.head = Head.new("cmpl", model)

    def whole(self, results: Sequence[Event]) -> Completion:
        """All in one."""
        choices = [
            TextChoice(
                index=index,
                text=result.text,
                finish_reason=result.finish_reason,
                seed=result.seed,
            )
            for index, result in enumerate(results)
        ]
        return self._completion(choices, TokenUsage.of(results))

    def opening(self, index: int) -> None:
        """Nothing."""

    def piece(self, index: int, text: str) -> Completion:
        """A choice with text."""
        return self._completion([TextChoice(index=index, text=text, finish_reason=None)])

    def ending(self, index: int, result: Event) -> Completion:
        """A choice with a reason."""
        reason = result.finish_reason
        choice = TextChoice(index=index, text="", finish_reason=reason, seed=result.seed)
        return self._completion([choice])

    def usage(self, results: Sequence[Event]) -> Completion:
        """No choices."""
        return self._completion([], TokenUsage.of(results))

    def _completion(self, choices: list[TextChoice], usage: TokenUsage | None = None) -> Completion:
        return Completion(**self.head.model_dump(), choices=choices, usage=usage)


class ChatShape:
    """Answers of /v1/chat/completions."""

    def __init__(self, model: str) -> None:
        self.head = Head.new("chatcmpl", model)

    def whole(self, results: Sequence[Event]) -> ChatCompletion:
        """All in one."""
        choices = [
            ChatChoice(
                index=index,
                message=AssistantMessage(content=result.text),
                finish_reason=result.finish_reason,
                seed=result.seed,
            )
            for index, result in enumerate(results)
        ]
        return ChatCompletion(
            **self.head.model_dump(), choices=choices, usage=TokenUsage.of(results)
        )

    def opening(self, index: int) -> ChatChunk:
        """Who speaks."""
        return self._chunk(index, Delta(role="assistant", content=""))

    def piece(self, index: int, text: str) -> ChatChunk:
        """A delta with text."""
        return self._chunk(index, Delta(content=text))

    def ending(self, index: int, result: Event) -> ChatChunk:
        """An empty delta with a reason."""
        return self._chunk(index, Delta(), result.finish_reason, result.seed)

    def usage(self, results: Sequence[Event]) -> ChatChunk:
        """No choices."""
        return ChatChunk(**self.head.model_dump(), choices=[], usage=TokenUsage.of(results))

    def _chunk(
        self, index: int, delta: Delta, reason: str | None = None, seed: int | None = None
    ) -> ChatChunk:
        choice = ChatChunkChoice(index=index, delta=delta, finish_reason=reason, seed=seed)
        return ChatChunk(**self.head.model_dump(), choices=[choice])
