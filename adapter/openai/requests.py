"""Bodies of the OpenAI calls, and what they are as requests of our own.

A parameter that cannot be honoured is an error that names it, unless its value means "off".
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Discriminator,
    Field,
    Tag,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import PydanticCustomError

from adapter.schemas import (
    Body,
    Count,
    Denoising,
    GenerateRequest,
    Message,
    PlainText,
    Prompt,
    Queueing,
    Token,
)

#: What OpenAI's completions have always had for a `max_tokens` that is not given.
COMPLETION_MAX_TOKENS = 16


def _off(*values: object) -> Any:
    """Type of a parameter that is not honoured: null, or a value that asks for nothing."""

    def check(value: object) -> object:
        for off in values:
            if value == off and isinstance(value, bool) == isinstance(off, bool):
                return None
        if value is None:
            return None
        raise PydanticCustomError(
            "not_supported", "This is not supported; leave it out or send {off}", {"off": _shown}
        )

    _shown = " or ".join("null" if off is None else repr(off) for off in (None, *values))
    schema = WithJsonSchema({"enum": [None, *values]})
    return Annotated[Any, AfterValidator(check), schema]


def _as_parts(value: object) -> object:
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


def _form_of(value: object) -> str | None:
    """Which form of a prompt this is."""
    if isinstance(value, str):
        return "text"
    first = value[0] if isinstance(value, list) and value else None
    forms = {str: "texts", int: "tokens", list: "token lists"}
    return forms.get(type(first))


Label = Annotated[PlainText, Field(max_length=512)]
Tokens = Annotated[list[Token], Field(min_length=1)]
Prompts = Annotated[
    Annotated[Prompt, Tag("text")]
    | Annotated[list[Prompt], Field(min_length=1), Tag("texts")]
    | Annotated[Tokens, Tag("tokens")]
    | Annotated[list[Tokens], Field(min_length=1), Tag("token lists")],
    Discriminator(
        _form_of,
        custom_error_type="prompt_form",
        custom_error_message="Should be a string, a list of strings, a list of token ids, or a "
        "list of such lists; none of them empty",
    ),
]


class StreamOptions(Body):
    """What a stream tells besides the text."""

    include_usage: bool | None = Field(None, description="a last chunk with the usage")
    include_obfuscation: _off(False) = None  # type: ignore[valid-type]


class Call(Denoising, Queueing):
    """What both kinds of completions have in common.

    The diffusion parameters, `timeout` and `priority` are those of /v1/generate; OpenAI's clients
    send them by `extra_body`.
    """

    model: Annotated[PlainText, Field(min_length=1, max_length=256)]
    temperature: float | None = Field(None, ge=0, description="at most DLLM_MAX_TEMPERATURE")
    stream: bool | None = None
    stream_options: StreamOptions | None = Field(None, description="with stream only")
    user: Label | None = Field(None, description="has no effect")
    n: _off(1) = None  # type: ignore[valid-type]
    frequency_penalty: _off(0) = None  # type: ignore[valid-type]
    presence_penalty: _off(0) = None  # type: ignore[valid-type]
    logit_bias: _off({}) = None  # type: ignore[valid-type]

    @model_validator(mode="after")
    def _options_of_a_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise PydanticCustomError(
                "stream_options_without_stream", "stream_options should be given with stream only"
            )
        return self

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with a chunk that tells the usage."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def _request(self, max_tokens: int, **prompt: Any) -> GenerateRequest:
        given = self.model_dump(
            include={*Denoising.model_fields, *Queueing.model_fields}, exclude_none=True
        )
        temperature = 0.0 if self.temperature is None else self.temperature
        return GenerateRequest(gen_length=max_tokens, temperature=temperature, **given, **prompt)


class CompletionCall(Call):
    """Body of /v1/completions: prompts, which the model sees as they are."""

    prompt: Prompts
    suffix: Prompt | None = Field(None, description="text behind the gap that is filled")
    max_tokens: Count | None = Field(
        None, description=f"the canvas; default {COMPLETION_MAX_TOKENS}"
    )
    best_of: _off(1) = None  # type: ignore[valid-type]
    echo: _off(False) = None  # type: ignore[valid-type]
    logprobs: _off() = None  # type: ignore[valid-type]

    def requests(self) -> list[GenerateRequest]:
        """One request of ours for each prompt."""
        max_tokens = self.max_tokens or COMPLETION_MAX_TOKENS
        suffix = {} if self.suffix is None else {"suffix": self.suffix}
        return [self._request(max_tokens, **prompt, **suffix) for prompt in self._prompts()]

    def _prompts(self) -> list[Mapping[str, Any]]:
        several = _form_of(self.prompt) in ("texts", "token lists")
        prompts = self.prompt if several else [self.prompt]
        return [
            {"prompt": prompt, "raw": True} if isinstance(prompt, str) else {"input_ids": prompt}
            for prompt in prompts
        ]


class TextPart(Body):
    """A piece of a message; text is all that these models read."""

    type: Literal["text"]
    text: PlainText


class ChatMessage(Body):
    """One message. What clients send back of an answer is accepted where it says nothing."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[
        list[TextPart],
        Field(min_length=1),
        BeforeValidator(_as_parts, json_schema_input_type=PlainText | list[TextPart]),
    ]
    name: _off() = None  # type: ignore[valid-type]
    refusal: _off() = None  # type: ignore[valid-type]
    audio: _off() = None  # type: ignore[valid-type]
    annotations: _off([]) = None  # type: ignore[valid-type]
    function_call: _off() = None  # type: ignore[valid-type]
    tool_calls: _off([]) = None  # type: ignore[valid-type]

    def message(self) -> Message:
        """The message for the checkpoint's chat template, which knows no developers."""
        role = "system" if self.role == "developer" else self.role
        return Message(role=role, content="\n".join(part.text for part in self.content))


class ChatCall(Call):
    """Body of /v1/chat/completions: messages, rendered by the checkpoint's chat template."""

    messages: list[ChatMessage] = Field(min_length=1)
    max_tokens: Count | None = Field(None, description="older name of max_completion_tokens")
    max_completion_tokens: Count | None = Field(
        None, description="the canvas; default DLLM_CHAT_MAX_TOKENS"
    )
    safety_identifier: Label | None = Field(None, description="has no effect")
    prompt_cache_key: Label | None = Field(None, description="has no effect")
    logprobs: _off(False) = None  # type: ignore[valid-type]
    top_logprobs: _off(0) = None  # type: ignore[valid-type]
    tools: _off([]) = None  # type: ignore[valid-type]
    tool_choice: _off("none", "auto") = None  # type: ignore[valid-type]
    parallel_tool_calls: _off(True, False) = None  # type: ignore[valid-type]
    functions: _off([]) = None  # type: ignore[valid-type]
    function_call: _off("none", "auto") = None  # type: ignore[valid-type]
    response_format: _off({"type": "text"}) = None  # type: ignore[valid-type]
    modalities: _off(["text"]) = None  # type: ignore[valid-type]
    audio: _off() = None  # type: ignore[valid-type]
    prediction: _off() = None  # type: ignore[valid-type]
    web_search_options: _off() = None  # type: ignore[valid-type]
    reasoning_effort: _off("none") = None  # type: ignore[valid-type]
    verbosity: _off() = None  # type: ignore[valid-type]
    store: _off(False) = None  # type: ignore[valid-type]
    metadata: _off({}) = None  # type: ignore[valid-type]
    service_tier: _off("auto", "default") = None  # type: ignore[valid-type]

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        both = (self.max_tokens, self.max_completion_tokens)
        if None not in both and both[0] != both[1]:
            raise PydanticCustomError(
                "two_lengths", "max_tokens and max_completion_tokens should not differ"
            )
        return self

    def request(self, default_max_tokens: int) -> GenerateRequest:
        """The request of ours."""
        max_tokens = self.max_completion_tokens or self.max_tokens or default_max_tokens
        messages = [message.message() for message in self.messages]
        return self._request(max_tokens, messages=messages)
