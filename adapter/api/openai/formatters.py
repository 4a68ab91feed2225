"""Formats results as completions and chat completions, whole or as chunks."""

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
    ResponseHeader,
    TextChoice,
    TokenUsage,
)
from adapter.types import Event


class ResponseFormatter(Protocol):
    """Makes the chunks of one streamed response; `index` is the number of the prompt."""

    def opening(self, index: int, seed: int | None) -> BaseModel | None:
        """The chunk before any text, if there is one, with the seed if it is known by then."""
        ...

    def piece(self, index: int, text: str, seed: int | None, so_far: Event | None) -> BaseModel:
        """A chunk of text, with the usage of `so_far` if given."""
        ...

    def ending(self, index: int, result: Event) -> BaseModel:
        """The last chunk of a prompt, with its finish reason."""
        ...

    def usage(self, results: Sequence[Event]) -> BaseModel:
        """The chunk with the usage of all prompts."""
        ...


def _usage_of(so_far: Event | None) -> TokenUsage | None:
    return None if so_far is None else TokenUsage.of([so_far])


class CompletionFormatter:
    """Formats responses of /v1/completions."""

    def __init__(self, model: str) -> None:
        self.head = ResponseHeader.new("cmpl", model)

    def whole(self, results: Sequence[Event]) -> Completion:
        """The whole response."""
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

    def opening(self, index: int, seed: int | None) -> None:
        """Completions have no opening chunk."""

    def piece(self, index: int, text: str, seed: int | None, so_far: Event | None) -> Completion:
        """A choice with text."""
        choice = TextChoice(index=index, text=text, finish_reason=None, seed=seed)
        return self._completion([choice], _usage_of(so_far))

    def ending(self, index: int, result: Event) -> Completion:
        """A choice with a finish reason."""
        reason = result.finish_reason
        choice = TextChoice(index=index, text="", finish_reason=reason, seed=result.seed)
        return self._completion([choice])

    def usage(self, results: Sequence[Event]) -> Completion:
        """Usage without choices."""
        return self._completion([], TokenUsage.of(results))

    def _completion(self, choices: list[TextChoice], usage: TokenUsage | None = None) -> Completion:
        return Completion(**self.head.model_dump(), choices=choices, usage=usage)


class ChatFormatter:
    """Formats responses of /v1/chat/completions."""

    def __init__(self, model: str) -> None:
        self.head = ResponseHeader.new("chatcmpl", model)

    def whole(self, results: Sequence[Event]) -> ChatCompletion:
        """The whole response."""
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

    def opening(self, index: int, seed: int | None) -> ChatChunk:
        """A delta with the role."""
        return self._chunk(index, Delta(role="assistant", content=""), seed=seed)

    def piece(self, index: int, text: str, seed: int | None, so_far: Event | None) -> ChatChunk:
        """A delta with text."""
        chunk = self._chunk(index, Delta(content=text), seed=seed)
        chunk.usage = _usage_of(so_far)
        return chunk

    def ending(self, index: int, result: Event) -> ChatChunk:
        """An empty delta with a finish reason."""
        return self._chunk(index, Delta(), result.finish_reason, result.seed)

    def usage(self, results: Sequence[Event]) -> ChatChunk:
        """Usage without choices."""
        return ChatChunk(**self.head.model_dump(), choices=[], usage=TokenUsage.of(results))

    def _chunk(
        self, index: int, delta: Delta, reason: str | None = None, seed: int | None = None
    ) -> ChatChunk:
        choice = ChatChunkChoice(index=index, delta=delta, finish_reason=reason, seed=seed)
        return ChatChunk(**self.head.model_dump(), choices=[choice])
