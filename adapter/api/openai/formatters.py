"""Formats results as completions and chat completions, whole or as chunks."""

from collections.abc import Sequence
from typing import Protocol

from pydantic import BaseModel

from adapter.api.openai.logprobs import (
    ChatLogprobs,
    TextLogprobs,
    TextToken,
    reveal_steps_of,
    text_tokens,
)
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

#: Tokens with their details; None: the call asks for none.
Tokens = Sequence[TextToken] | None


class ResponseFormatter(Protocol):
    """Makes the chunks of one streamed response; `index` is the number of the prompt."""

    def opening(self, index: int, seed: int | None) -> BaseModel | None:
        """The chunk before any text, if there is one, with the seed if it is known by then."""
        ...

    def piece(
        self, index: int, text: str, event: Event, tokens: Tokens, *, has_usage: bool
    ) -> BaseModel:
        """A chunk of text and its tokens, with the usage so far if asked."""
        ...

    def ending(self, index: int, result: Event, tokens: Tokens) -> BaseModel:
        """The last chunk of a prompt, with its finish reason and the tokens not sent yet."""
        ...

    def usage(self, results: Sequence[Event]) -> BaseModel:
        """The chunk with the usage of all prompts."""
        ...


def _usage_of(event: Event, has_usage: bool) -> TokenUsage | None:
    return TokenUsage.of([event]) if has_usage else None


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
                logprobs=TextLogprobs.of(tokens := text_tokens(result)),
                finish_reason=result.finish_reason,
                seed=result.seed,
                reveal_steps=reveal_steps_of(tokens),
            )
            for index, result in enumerate(results)
        ]
        return self._completion(choices, TokenUsage.of(results))

    def opening(self, index: int, seed: int | None) -> None:
        """Completions have no opening chunk."""

    def piece(
        self, index: int, text: str, event: Event, tokens: Tokens, *, has_usage: bool
    ) -> Completion:
        """A choice with text."""
        choice = self._choice(index, text, None, event.seed, tokens)
        return self._completion([choice], _usage_of(event, has_usage))

    def ending(self, index: int, result: Event, tokens: Tokens) -> Completion:
        """A choice with a finish reason."""
        choice = self._choice(index, "", result.finish_reason, result.seed, tokens or None)
        return self._completion([choice])

    def usage(self, results: Sequence[Event]) -> Completion:
        """Usage without choices."""
        return self._completion([], TokenUsage.of(results))

    def _choice(
        self, index: int, text: str, reason: str | None, seed: int | None, tokens: Tokens
    ) -> TextChoice:
        return TextChoice(
            index=index,
            text=text,
            logprobs=TextLogprobs.of(tokens),
            finish_reason=reason,
            seed=seed,
            reveal_steps=reveal_steps_of(tokens),
        )

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
                logprobs=ChatLogprobs.of(tokens := text_tokens(result)),
                finish_reason=result.finish_reason,
                seed=result.seed,
                reveal_steps=reveal_steps_of(tokens),
            )
            for index, result in enumerate(results)
        ]
        return ChatCompletion(
            **self.head.model_dump(), choices=choices, usage=TokenUsage.of(results)
        )

    def opening(self, index: int, seed: int | None) -> ChatChunk:
        """A delta with the role."""
        return self._chunk(index, Delta(role="assistant", content=""), seed=seed)

    def piece(
        self, index: int, text: str, event: Event, tokens: Tokens, *, has_usage: bool
    ) -> ChatChunk:
        """A delta with text."""
        chunk = self._chunk(index, Delta(content=text), seed=event.seed, tokens=tokens)
        chunk.usage = _usage_of(event, has_usage)
        return chunk

    def ending(self, index: int, result: Event, tokens: Tokens) -> ChatChunk:
        """An empty delta with a finish reason."""
        return self._chunk(index, Delta(), result.finish_reason, result.seed, tokens or None)

    def usage(self, results: Sequence[Event]) -> ChatChunk:
        """Usage without choices."""
        return ChatChunk(**self.head.model_dump(), choices=[], usage=TokenUsage.of(results))

    def _chunk(
        self,
        index: int,
        delta: Delta,
        reason: str | None = None,
        seed: int | None = None,
        tokens: Tokens = None,
    ) -> ChatChunk:
        choice = ChatChunkChoice(
            index=index,
            delta=delta,
            logprobs=ChatLogprobs.of(tokens),
            finish_reason=reason,
            seed=seed,
            reveal_steps=reveal_steps_of(tokens),
        )
        return ChatChunk(**self.head.model_dump(), choices=[choice])
