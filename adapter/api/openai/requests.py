"""Bodies of the OpenAI calls, and their translation to requests of the REST API.

A parameter that cannot be honoured is an error that names it, unless its value means "off".
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    Tag,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError
from pydantic_core.core_schema import no_info_after_validator_function

from adapter.api.schemas import (
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

#: OpenAI's default for `max_tokens` of completions.
COMPLETION_MAX_TOKENS = 16


class Off:
    """A parameter that is not supported: only null or a value that means "off" is accepted."""

    def __init__(self, *values: object) -> None:
        self._values = (None, *values)

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        """Check the value before any conversion."""
        return no_info_after_validator_function(self._check, handler(source))

    def __get_pydantic_json_schema__(
        self, _core: CoreSchema, _handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        """List the accepted values."""
        return {"enum": list(self._values)}

    def _check(self, value: object) -> None:
        for off in self._values:
            if value == off and isinstance(value, bool) == isinstance(off, bool):
                return
        shown = " or ".join("null" if off is None else repr(off) for off in self._values)
        raise PydanticCustomError(
            "not_supported", "This is not supported; leave it out or send {off}", {"off": shown}
        )


def _as_parts(value: object) -> object:
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


def _form_of(value: object) -> str | None:
    """The form of a prompt, or None if it is none of the four."""
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
    """What a stream contains besides the text."""

    include_usage: bool | None = Field(None, description="a last chunk with the usage")
    include_obfuscation: Annotated[Any, Off(False)] = None


class Call(Denoising, Queueing):
    """Fields of both kinds of completions.

    The diffusion parameters, `timeout` and `priority` are those of /v1/generate; OpenAI's clients
    send them by `extra_body`.
    """

    model_config = ConfigDict(
        json_schema_extra={
            "anyOf": [
                {"properties": {"stream_options": {"type": "null"}}},
                {"required": ["stream"], "properties": {"stream": {"const": True}}},
            ]
        }
    )

    model: Annotated[PlainText, Field(min_length=1, max_length=256)]
    temperature: float | None = Field(None, ge=0, description="at most DLLM_MAX_TEMPERATURE")
    stream: bool | None = None
    stream_options: StreamOptions | None = Field(None, description="with stream only")
    user: Label | None = Field(None, description="has no effect")
    n: Annotated[Any, Off(1)] = None
    frequency_penalty: Annotated[Any, Off(0)] = None
    presence_penalty: Annotated[Any, Off(0)] = None
    logit_bias: Annotated[Any, Off({})] = None

    @model_validator(mode="after")
    def _options_of_a_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise PydanticCustomError(
                "stream_options_without_stream", "stream_options should be given with stream only"
            )
        return self

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with a chunk that contains the usage."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def _request(self, max_tokens: int, **prompt: Any) -> GenerateRequest:
        given = self.model_dump(
            include={*Denoising.model_fields, *Queueing.model_fields}, exclude_none=True
        )
        temperature = 0.0 if self.temperature is None else self.temperature
        return GenerateRequest(gen_length=max_tokens, temperature=temperature, **given, **prompt)


class CompletionCall(Call):
    """Body of /v1/completions: prompts without a chat template."""

    prompt: Prompts
    suffix: Prompt | None = Field(None, description="text behind the gap that is filled")
    max_tokens: Count | None = Field(
        None, description=f"the canvas; default {COMPLETION_MAX_TOKENS}"
    )
    best_of: Annotated[Any, Off(1)] = None
    echo: Annotated[Any, Off(False)] = None
    logprobs: Annotated[Any, Off()] = None

    def requests(self) -> list[GenerateRequest]:
        """A request of the REST API for each prompt."""
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
    """A part of a message. The models take text only."""

    type: Literal["text"]
    text: PlainText


class ChatMessage(Body):
    """One message. Fields of an answer that clients send back are accepted if they are empty."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[
        list[TextPart],
        Field(min_length=1),
        BeforeValidator(_as_parts, json_schema_input_type=PlainText | list[TextPart]),
    ]
    name: Annotated[Any, Off()] = None
    refusal: Annotated[Any, Off()] = None
    audio: Annotated[Any, Off()] = None
    annotations: Annotated[Any, Off([])] = None
    function_call: Annotated[Any, Off()] = None
    tool_calls: Annotated[Any, Off([])] = None

    def message(self) -> Message:
        """The message for the checkpoint's chat template, with `developer` as `system`."""
        role = "system" if self.role == "developer" else self.role
        return Message(role=role, content="\n".join(part.text for part in self.content))


class ChatCall(Call):
    """Body of /v1/chat/completions: messages, rendered by the checkpoint's chat template."""

    messages: list[ChatMessage] = Field(min_length=1)
    max_tokens: Count | None = Field(None, description="older name of max_completion_tokens")
    max_completion_tokens: Count | None = Field(
        None,
        description="the canvas; default DLLM_CHAT_MAX_TOKENS; as max_tokens, if both are given",
    )
    safety_identifier: Label | None = Field(None, description="has no effect")
    prompt_cache_key: Label | None = Field(None, description="has no effect")
    logprobs: Annotated[Any, Off(False)] = None
    top_logprobs: Annotated[Any, Off(0)] = None
    tools: Annotated[Any, Off([])] = None
    tool_choice: Annotated[Any, Off("none", "auto")] = None
    parallel_tool_calls: Annotated[Any, Off(True, False)] = None
    functions: Annotated[Any, Off([])] = None
    function_call: Annotated[Any, Off("none", "auto")] = None
    response_format: Annotated[Any, Off({"type": "text"})] = None
    modalities: Annotated[Any, Off(["text"])] = None
    audio: Annotated[Any, Off()] = None
    prediction: Annotated[Any, Off()] = None
    web_search_options: Annotated[Any, Off()] = None
    reasoning_effort: Annotated[Any, Off("none")] = None
    verbosity: Annotated[Any, Off()] = None
    store: Annotated[Any, Off(False)] = None
    metadata: Annotated[Any, Off({})] = None
    service_tier: Annotated[Any, Off("auto", "default")] = None

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        both = (self.max_tokens, self.max_completion_tokens)
        if None not in both and both[0] != both[1]:
            raise PydanticCustomError(
                "two_lengths", "max_tokens and max_completion_tokens should not differ"
            )
        return self

    @property
    def length_name(self) -> str:
        """The name of the length that the call used, for errors."""
        return "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"

    def request(self, default_max_tokens: int) -> GenerateRequest:
        """The call as a request of the REST API."""
        max_tokens = self.max_completion_tokens or self.max_tokens or default_max_tokens
        messages = [message.message() for message in self.messages]
        return self._request(max_tokens, messages=messages)
