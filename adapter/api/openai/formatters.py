"""Formats results as completions and chat completions, whole or as chunks."""

import secrets
from collections import Counter
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
    CalledFunction,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    Completion,
    Delta,
    FunctionDelta,
    ResponseHeader,
    TextChoice,
    TokenUsage,
    ToolCall,
    ToolCallDelta,
)
from adapter.api.openai.tool_calls import Reply, read_reply
from adapter.api.openai.tools import CLOSE, Offer
from adapter.types import Event

#: Tokens with their details; None: the call asks for none.
Tokens = Sequence[TextToken] | None


class ResponseFormatter(Protocol):
    """Makes the chunks of one streamed response; `index` is the number of the prompt."""

    def opening(self, index: int, seed: int | None) -> BaseModel | None:
        """The chunk before any text, if there is one, with the seed if it is known by then."""
        ...

    def content(self, event: Event) -> str:
        """The part of an event's text that is the answer's content."""
        ...

    def calls(self, index: int, event: Event, /) -> Sequence[BaseModel]:
        """Chunks with the calls of tools that have not been sent yet."""
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

    def content(self, event: Event) -> str:
        """All of the text."""
        return event.text

    def calls(self, _index: int, _event: Event) -> Sequence[BaseModel]:
        """Completions call no tools."""
        return ()

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
    """Formats responses of /v1/chat/completions.

    Args:
        model: its name in the responses.
        offer: the tools that answers may call; None: the text is the content.
    """

    def __init__(self, model: str, offer: Offer | None = None) -> None:
        self.head = ResponseHeader.new("chatcmpl", model)
        self._offer = offer
        self._num_sent: Counter[int] = Counter()

    def whole(self, results: Sequence[Event]) -> ChatCompletion:
        """The whole response."""
        choices = [
            ChatChoice(
                index=index,
                message=self._message(result),
                logprobs=ChatLogprobs.of(tokens := text_tokens(result)),
                finish_reason=self._reason(result),
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

    def content(self, event: Event) -> str:
        """The text outside of calls."""
        return self._reply(event).content

    def calls(self, index: int, event: Event) -> Sequence[BaseModel]:
        """Two deltas for each call: its name, then its arguments. A call is sent when it is
        whole, since what is no valid call is text."""
        chunks = []
        calls = self._reply(event).calls
        for number in range(self._num_sent[index], len(calls)):
            call = calls[number]
            name = FunctionDelta(name=call.name, arguments="")
            for delta in (
                ToolCallDelta(index=number, id=_call_id(), type="function", function=name),
                ToolCallDelta(index=number, function=FunctionDelta(arguments=call.arguments)),
            ):
                chunks.append(self._chunk(index, Delta(tool_calls=[delta]), seed=event.seed))
        self._num_sent[index] = len(calls)
        return chunks

    def piece(
        self, index: int, text: str, event: Event, tokens: Tokens, *, has_usage: bool
    ) -> ChatChunk:
        """A delta with text."""
        chunk = self._chunk(index, Delta(content=text), seed=event.seed, tokens=tokens)
        chunk.usage = _usage_of(event, has_usage)
        return chunk

    def ending(self, index: int, result: Event, tokens: Tokens) -> ChatChunk:
        """An empty delta with a finish reason."""
        return self._chunk(index, Delta(), self._reason(result), result.seed, tokens or None)

    def usage(self, results: Sequence[Event]) -> ChatChunk:
        """Usage without choices."""
        return ChatChunk(**self.head.model_dump(), choices=[], usage=TokenUsage.of(results))

    def _reply(self, event: Event) -> Reply:
        if self._offer is None:
            return Reply(event.text, ())
        reply = read_reply(event.text, self._offer.names, finished=bool(event.finish_reason))
        return reply if self._offer.parallel else Reply(reply.content, reply.calls[:1])

    def _message(self, result: Event) -> AssistantMessage:
        reply = self._reply(result)
        if not reply.calls:
            return AssistantMessage(content=reply.content)
        calls = [
            ToolCall(id=_call_id(), function=CalledFunction(name=c.name, arguments=c.arguments))
            for c in reply.calls
        ]
        return AssistantMessage(content=reply.content or None, tool_calls=calls)

    def _reason(self, result: Event) -> str:
        """`tool_calls`, unless the canvas ended before the text did."""
        reply = self._reply(result)
        whole = result.finish_reason == "stop" or result.text.rstrip().endswith(CLOSE)
        return "tool_calls" if reply.calls and whole else result.finish_reason

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


def _call_id() -> str:
    return f"call_{secrets.token_hex(12)}"
