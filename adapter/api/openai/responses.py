"""Bodies of OpenAI's responses, whole and in chunks."""

import secrets
import time
from collections.abc import Sequence
from typing import Annotated, Literal, Self

from pydantic import BaseModel, Field, model_serializer

from adapter.api.openai.logprobs import ChatLogprobs, TextLogprobs
from adapter.types import Event

#: Only where a call asks for them.
RevealSteps = Annotated[
    list[int] | None,
    Field(
        description="the step that committed each token, with `reveal_steps`",
        exclude_if=lambda steps: steps is None,
    ),
]


class PromptTokensDetails(BaseModel):
    """How many tokens of the prompts the prefix cache had."""

    cached_tokens: int


class TokenUsage(BaseModel):
    """Tokens of all prompts of a call."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails

    @classmethod
    def of(cls, results: Sequence[Event]) -> Self:
        """The usage of these results together."""
        counts = [result.usage for result in results if result.usage is not None]
        read = sum(count.prompt_tokens for count in counts)
        written = sum(count.completion_tokens for count in counts)
        cached = sum(count.cached_tokens for count in counts)
        return cls(
            prompt_tokens=read,
            completion_tokens=written,
            total_tokens=read + written,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=cached),
        )


class TextChoice(BaseModel):
    """The answer to one prompt, or a chunk of it; the same `seed` repeats it."""

    index: int
    text: str
    logprobs: TextLogprobs | None = None
    finish_reason: str | None
    seed: int | None = None
    reveal_steps: RevealSteps = None


class CalledFunction(BaseModel):
    """The function of a call, and its arguments as JSON."""

    name: str
    arguments: str


class ToolCall(BaseModel):
    """A call of a tool."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class AssistantMessage(BaseModel):
    """The assistant's message; its content is null if it has nothing but calls."""

    role: Literal["assistant"] = "assistant"
    content: str | None
    refusal: None = None
    tool_calls: list[ToolCall] | None = Field(default=None, exclude_if=lambda calls: calls is None)


class FunctionDelta(BaseModel):
    """The name of a function, or a piece of its arguments."""

    name: str | None = Field(default=None, exclude_if=lambda name: name is None)
    arguments: str


class ToolCallDelta(BaseModel):
    """New parts of the call with this index; `id`, `type` and name come first, once."""

    index: int
    id: str | None = Field(default=None, exclude_if=lambda value: value is None)
    type: Literal["function"] | None = Field(default=None, exclude_if=lambda value: value is None)
    function: FunctionDelta


class ChatChoice(BaseModel):
    """The answer; the same `seed` repeats it."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: str
    seed: int | None
    reveal_steps: RevealSteps = None


class Delta(BaseModel):
    """New content of a chunk."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    tool_calls: list[ToolCallDelta] | None = None

    @model_serializer
    def _given(self) -> dict[str, str | list[ToolCallDelta]]:
        return {name: value for name, value in self if value is not None}


class ChatChunkChoice(BaseModel):
    """The choice in a chunk."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None
    seed: int | None = None
    reveal_steps: RevealSteps = None


class ResponseHeader(BaseModel):
    """Fields that a response and each of its chunks begin with."""

    id: str
    created: int
    model: str

    @classmethod
    def new(cls, kind: str, model: str) -> Self:
        """Make the header of a new response."""
        name = f"{kind}-{secrets.token_hex(12)}"
        return cls(id=name, created=int(time.time()), model=model)


class Completion(ResponseHeader):
    """Response of /v1/completions, whole or a chunk."""

    object: Literal["text_completion"] = "text_completion"
    choices: list[TextChoice]
    usage: TokenUsage | None = None


class ChatCompletion(ResponseHeader):
    """Response of /v1/chat/completions."""

    object: Literal["chat.completion"] = "chat.completion"
    choices: list[ChatChoice]
    usage: TokenUsage


class ChatChunk(ResponseHeader):
    """Chunk of a response of /v1/chat/completions."""

    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    choices: list[ChatChunkChoice]
    usage: TokenUsage | None = None


class Model(BaseModel):
    """A model that calls may name. What only an engine knows is left out while none answers."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "dllm-serve"
    checkpoint: str | None = Field(None, description="the name of the checkpoint's directory")
    family: str | None = Field(None, description="llada, dream, sdar, …")
    architecture: str | None = Field(None, description="the class that `config.json` names")
    num_parameters: int | None = None
    max_model_len: int | None = Field(None, description="tokens of prompt and canvas together")
    mask_token_id: int | None = Field(
        None, description="the token that `canvas_ids` has at positions to decode"
    )
    block_length: int | None = Field(None, description="tokens per block of a block-wise model")


class ModelList(BaseModel):
    """All models that calls may name."""

    object: Literal["list"] = "list"
    data: list[Model]


class ErrorInfo(BaseModel):
    """Message, kind and parameter of an error."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorAnswer(BaseModel):
    """Body of an error."""

    error: ErrorInfo
