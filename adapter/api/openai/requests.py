"""Bodies of OpenAI's calls, and their translation to the adapter's own requests.

A parameter that is not supported is an error that names it, unless its value means "off".
"""

from collections.abc import Sequence
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
    FewMessages,
    GenerateRequest,
    Items,
    Message,
    PlainText,
    Prompt,
    SchedulingParams,
    Token,
)

#: OpenAI's default for `max_tokens` of a completion.
COMPLETION_MAX_TOKENS = 16


class Unsupported:
    """Marks an unsupported parameter: only null and the given values, which mean "off", pass."""

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
        """Describe the parameter by its permitted values."""
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
    """The form of the prompt, or None if it is none of them."""
    if isinstance(value, str):
        return "text"
    first = value[0] if isinstance(value, list) and value else None
    forms = {str: "texts", int: "tokens", list: "token lists"}
    return forms.get(type(first))


Label = Annotated[PlainText, Field(max_length=512)]
Tokens = Annotated[Items[Token], Field(min_length=1)]
Prompts = Annotated[
    Annotated[Prompt, Tag("text")]
    | Annotated[Items[Prompt], Field(min_length=1), Tag("texts")]
    | Annotated[Tokens, Tag("tokens")]
    | Annotated[Items[Tokens], Field(min_length=1), Tag("token lists")],
    Discriminator(
        _form_of,
        custom_error_type="prompt_form",
        custom_error_message="Should be a string, a list of strings, a list of token ids, or a "
        "list of such lists; none may be empty",
    ),
]


class StreamOptions(Body):
    """Options of a stream."""

    include_usage: bool | None = Field(None, description="send a last chunk with the usage")
    include_obfuscation: Annotated[Any, Unsupported(False)] = None


class Call(Denoising, SchedulingParams):
    """Fields that both kinds of completions have.

    The diffusion parameters, `timeout` and `priority` are those of /v1/generate; OpenAI's clients
    send them in `extra_body`.
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
    stream_options: StreamOptions | None = Field(None, description="only with stream")
    user: Label | None = Field(None, description="has no effect")
    n: Annotated[Any, Unsupported(1)] = None
    frequency_penalty: Annotated[Any, Unsupported(0)] = None
    presence_penalty: Annotated[Any, Unsupported(0)] = None
    logit_bias: Annotated[Any, Unsupported({})] = None

    @model_validator(mode="after")
    def _options_of_a_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise PydanticCustomError(
                "stream_options_without_stream", "stream_options may be given only with stream"
            )
        return self

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with a chunk that has the usage."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def _request(self, max_tokens: int, **prompt: Any) -> GenerateRequest:
        given = self.model_dump(
            include={*Denoising.model_fields, *SchedulingParams.model_fields}, exclude_none=True
        )
        temperature = 0.0 if self.temperature is None else self.temperature
        return GenerateRequest(gen_length=max_tokens, temperature=temperature, **given, **prompt)


class CompletionCall(Call):
    """Body of /v1/completions: prompts, passed to the model without a chat template."""

    prompt: Prompts
    suffix: Prompt | None = Field(None, description="text after the gap to fill")
    max_tokens: Count | None = Field(
        None, description=f"length of the canvas; default {COMPLETION_MAX_TOKENS}"
    )
    best_of: Annotated[Any, Unsupported(1)] = None
    echo: Annotated[Any, Unsupported(False)] = None
    logprobs: Annotated[Any, Unsupported()] = None

    def requests(self) -> list[GenerateRequest]:
        """One request for each prompt."""
        max_tokens = self.max_tokens or COMPLETION_MAX_TOKENS
        suffix = {} if self.suffix is None else {"suffix": self.suffix}
        prompts = [
            {"prompt": prompt, "raw": True} if isinstance(prompt, str) else {"input_ids": prompt}
            for prompt in self.prompts
        ]
        return [self._request(max_tokens, **prompt, **suffix) for prompt in prompts]

    @property
    def prompts(self) -> Sequence[Any]:
        """The prompts; a single one is a list of one."""
        several = _form_of(self.prompt) in ("texts", "token lists")
        return self.prompt if several else [self.prompt]


class TextPart(Body):
    """A part of a message; only text is supported."""

    type: Literal["text"]
    text: PlainText


class ChatMessage(Body):
    """One message. Fields that clients copy from a response are accepted if they are empty."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[
        Items[TextPart],
        Field(min_length=1),
        BeforeValidator(_as_parts, json_schema_input_type=PlainText | list[TextPart]),
    ]
    name: Annotated[Any, Unsupported()] = None
    refusal: Annotated[Any, Unsupported()] = None
    audio: Annotated[Any, Unsupported()] = None
    annotations: Annotated[Any, Unsupported([])] = None
    function_call: Annotated[Any, Unsupported()] = None
    tool_calls: Annotated[Any, Unsupported([])] = None

    def message(self) -> Message:
        """The message for the chat template, where `developer` becomes `system`."""
        role = "system" if self.role == "developer" else self.role
        return Message(role=role, content="\n".join(part.text for part in self.content))


class ChatCall(Call):
    """Body of /v1/chat/completions: messages for the checkpoint's chat template."""

    messages: Annotated[Items[ChatMessage], FewMessages] = Field(min_length=1)
    max_tokens: Count | None = Field(None, description="older name of max_completion_tokens")
    max_completion_tokens: Count | None = Field(
        None,
        description="length of the canvas; default DLLM_CHAT_MAX_TOKENS; must equal max_tokens "
        "if both are given",
    )
    safety_identifier: Label | None = Field(None, description="has no effect")
    prompt_cache_key: Label | None = Field(None, description="has no effect")
    logprobs: Annotated[Any, Unsupported(False)] = None
    top_logprobs: Annotated[Any, Unsupported(0)] = None
    tools: Annotated[Any, Unsupported([])] = None
    tool_choice: Annotated[Any, Unsupported("none", "auto")] = None
    parallel_tool_calls: Annotated[Any, Unsupported(True, False)] = None
    functions: Annotated[Any, Unsupported([])] = None
    function_call: Annotated[Any, Unsupported("none", "auto")] = None
    response_format: Annotated[Any, Unsupported({"type": "text"})] = None
    modalities: Annotated[Any, Unsupported(["text"])] = None
    audio: Annotated[Any, Unsupported()] = None
    prediction: Annotated[Any, Unsupported()] = None
    web_search_options: Annotated[Any, Unsupported()] = None
    reasoning_effort: Annotated[Any, Unsupported("none")] = None
    verbosity: Annotated[Any, Unsupported()] = None
    store: Annotated[Any, Unsupported(False)] = None
    metadata: Annotated[Any, Unsupported({})] = None
    service_tier: Annotated[Any, Unsupported("auto", "default")] = None

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        both = (self.max_tokens, self.max_completion_tokens)
        if None not in both and both[0] != both[1]:
            raise PydanticCustomError(
                "two_lengths",
                "max_tokens and max_completion_tokens must be equal if both are given",
            )
        return self

    @property
    def length_name(self) -> str:
        """The name of the length that errors use."""
        return "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"

    def request(self, default_max_tokens: int) -> GenerateRequest:
        """The adapter's own request."""
        max_tokens = self.max_completion_tokens or self.max_tokens or default_max_tokens
        messages = [message.message() for message in self.messages]
        return self._request(max_tokens, messages=messages)
