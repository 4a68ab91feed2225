"""Bodies of the OpenAI calls' answers, whole and in chunks."""

import secrets
import time
from collections.abc import Sequence
from typing import Literal, Self

from pydantic import BaseModel, model_serializer

from adapter.types import Event


class TokenUsage(BaseModel):
    """Tokens read and written, over all prompts of a call."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int

    @classmethod
    def of(cls, results: Sequence[Event]) -> Self:
        """What these results cost together."""
        counts = [result.usage for result in results if result.usage is not None]
        read = sum(count.prompt_tokens for count in counts)
        written = sum(count.completion_tokens for count in counts)
        return cls(prompt_tokens=read, completion_tokens=written, total_tokens=read + written)


class TextChoice(BaseModel):
    """The answer to one prompt, or a piece of it. `seed`: what repeats it."""

    index: int
    text: str
    logprobs: None = None
    finish_reason: str | None
    seed: int | None = None


class AssistantMessage(BaseModel):
    """What the assistant says."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(BaseModel):
    """The answer. `seed`: what repeats it."""

    index: int
    message: AssistantMessage
    logprobs: None = None
    finish_reason: str
    seed: int | None


class Delta(BaseModel):
    """What is new in a piece of an answer."""

    role: Literal["assistant"] | None = None
    content: str | None = None

    @model_serializer
    def _given(self) -> dict[str, str]:
        return {name: value for name, value in self if value is not None}


class ChatChunkChoice(BaseModel):
    """A piece of an answer."""

    index: int
    delta: Delta
    logprobs: None = None
    finish_reason: str | None
    seed: int | None = None


class Head(BaseModel):
    """What every answer, and every chunk of one answer, begins with."""

    id: str
    created: int
    model: str

    @classmethod
    def new(cls, kind: str, model: str) -> Self:
        """That of a new answer."""
        name = f"{kind}-{secrets.token_hex(12)}"
        return cls(id=name, created=int(time.time()), model=model)


class Completion(Head):
    """Answer of /v1/completions; a chunk of it looks the same."""

    object: Literal["text_completion"] = "text_completion"
    choices: list[TextChoice]
    usage: TokenUsage | None = None


class ChatCompletion(Head):
    """Answer of /v1/chat/completions."""

    object: Literal["chat.completion"] = "chat.completion"
    choices: list[ChatChoice]
    usage: TokenUsage


class ChatChunk(Head):
    """A chunk of an answer of /v1/chat/completions."""

    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    choices: list[ChatChunkChoice]
    usage: TokenUsage | None = None


class Model(BaseModel):
    """A model that may be asked for."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "dllm-serve"


class ModelList(BaseModel):
    """All models that may be asked for."""

    object: Literal["list"] = "list"
    data: list[Model]


class ErrorInfo(BaseModel):
    """What went wrong, and with which parameter."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorAnswer(BaseModel):
    """Why there is no answer."""

    error: ErrorInfo
