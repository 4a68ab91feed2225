"""Bodies of OpenAI's calls, and their translation to the adapter's own requests."""

from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BeforeValidator,
    Discriminator,
    Field,
    ModelWrapValidatorHandler,
    Tag,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from adapter.api.openai.fields import Extensions, NoEffect, OpenAIBody, Unsupported
from adapter.api.openai.messages import ChatMessage
from adapter.api.openai.tools import NamedChoice, Offer, ToolChoice, required_form
from adapter.api.schemas import (
    INT32_MAX,
    Count,
    Denoising,
    FewMessages,
    GenerateRequest,
    Items,
    PlainText,
    Prompt,
    SchedulingParams,
    StructuredOutputs,
    Token,
    Tools,
)

#: OpenAI's default for `max_tokens` of a completion.
COMPLETION_MAX_TOKENS = 16
#: Most tokens that a call may list for each position; the engine's limit of `logprobs`.
MAX_LOGPROBS = 20
#: Tools, and the parameter that says which of them the model may use.
CHOICES: Mapping[str, str] = {"tools": "tool_choice", "functions": "function_call"}
#: The older ones of these, which are not supported.
OLD = "functions"


class StreamedUsage(Enum):
    """Which chunks of a stream have the usage."""

    NONE = "none"
    #: One more chunk at the end.
    LAST = "last"
    #: That one, and each chunk of text, with the usage of its choice so far.
    EACH = "each"


def _form_of(value: object) -> str | None:
    """The form of the prompt, or None if it is none of them."""
    if isinstance(value, str):
        return "text"
    first = value[0] if isinstance(value, list) and value else None
    forms = {str: "texts", int: "tokens", list: "token lists"}
    return forms.get(type(first))


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


class StreamOptions(OpenAIBody):
    """Options of a stream."""

    include_usage: bool | None = Field(None, description="send a last chunk with the usage")
    continuous_usage_stats: bool | None = Field(
        None, description="with include_usage: send the usage so far in each chunk of text"
    )
    include_obfuscation: NoEffect = None


class SchemaFormat(OpenAIBody):
    """A JSON schema that the answer must be valid under."""

    name: Annotated[PlainText, Field(min_length=1, max_length=64)]
    description: NoEffect = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: NoEffect = None


class ResponseFormat(OpenAIBody):
    """The form of the answer."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: SchemaFormat | None = Field(None, description="with type json_schema")

    @model_validator(mode="after")
    def _has_its_schema(self) -> Self:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise PydanticCustomError(
                "json_schema", "json_schema should be given with type json_schema, and only then"
            )
        return self

    @property
    def structured_outputs(self) -> StructuredOutputs | None:
        """The same as a field of /v1/generate; None: any text."""
        if self.type == "text":
            return None
        schema = self.json_schema
        form = {"json_object": True} if schema is None else {"json": schema.schema_}
        return StructuredOutputs.model_validate(form)


class Call(Denoising, SchedulingParams, Extensions):
    """Fields that both kinds of completions have.

    The diffusion parameters, `timeout` and `priority` are those of /v1/generate; OpenAI's clients
    send them in `extra_body`.
    """

    model: Annotated[PlainText, Field(min_length=1, max_length=256)]
    temperature: float | None = Field(None, ge=0, description="at most DLLM_MAX_TEMPERATURE")
    stream: bool | None = None
    stream_options: StreamOptions | None = Field(None, description="no effect without stream")
    user: NoEffect = None
    metadata: NoEffect = None
    store: NoEffect = None
    service_tier: NoEffect = None
    n: int | None = Field(
        None,
        ge=1,
        le=INT32_MAX,
        description="choices for each prompt, with a seed each; at most DLLM_MAX_CHOICES",
    )
    frequency_penalty: Annotated[Any, Unsupported(0)] = None
    presence_penalty: Annotated[Any, Unsupported(0)] = None
    logit_bias: Annotated[Any, Unsupported({})] = None
    response_format: ResponseFormat | None = None

    @field_validator("stop", mode="before")
    @classmethod
    def _stops(cls, value: object) -> object:
        return [item for item in value if item != ""] if isinstance(value, list) else value

    @model_validator(mode="after")
    def _one_form(self) -> Self:
        if self.structured_outputs is not None and self._format is not None:
            raise PydanticCustomError(
                "two_forms", "response_format should not be given beside structured_outputs"
            )
        return self

    @property
    def _format(self) -> StructuredOutputs | None:
        return None if self.response_format is None else self.response_format.structured_outputs

    @property
    def streamed_usage(self) -> StreamedUsage:
        """Which chunks of a stream have the usage."""
        options = self.stream_options
        if options is None or not options.include_usage:
            return StreamedUsage.NONE
        return StreamedUsage.EACH if options.continuous_usage_stats else StreamedUsage.LAST

    def _request(self, max_tokens: int, **prompt: Any) -> GenerateRequest:
        given = self.model_dump(
            include={*Denoising.model_fields, *SchedulingParams.model_fields} - {"logprobs"},
            exclude_none=True,
        )
        form = self.structured_outputs or self._format
        if form is not None:
            given["structured_outputs"] = form
        # A block that is longer than the canvas is the canvas.
        if self.block_length is not None:
            given["block_length"] = min(self.block_length, max_tokens)
        temperature = 0.0 if self.temperature is None else self.temperature
        given |= {"gen_length": max_tokens, "temperature": temperature, "n": self.n or 1}
        return GenerateRequest(**given, **prompt)


class CompletionCall(Call):
    """Body of /v1/completions: prompts, passed to the model without a chat template."""

    prompt: Prompts
    suffix: Prompt | None = Field(None, description="text after the gap to fill")
    max_tokens: Count | None = Field(
        None, description=f"length of the canvas; default {COMPLETION_MAX_TOKENS}"
    )
    best_of: Annotated[Any, Unsupported(1)] = None
    echo: Annotated[Any, Unsupported(False)] = None
    logprobs: Annotated[
        int | None,
        Field(
            ge=0,
            le=MAX_LOGPROBS,
            description="report log-probabilities, with this many of the most probable tokens",
        ),
        BeforeValidator(lambda value: None if value is False else value),
    ] = None

    def requests(self, longest: int) -> list[GenerateRequest]:
        """One request for each prompt, with a canvas of at most `longest` tokens."""
        max_tokens = min(self.max_tokens or COMPLETION_MAX_TOKENS, longest)
        suffix = {} if self.suffix is None else {"suffix": self.suffix}
        prompts = [
            {"prompt": prompt, "raw": True} if isinstance(prompt, str) else {"input_ids": prompt}
            for prompt in self.prompts
        ]
        others = {"logprobs": self.logprobs, **suffix}
        return [self._request(max_tokens, **prompt, **others) for prompt in prompts]

    @property
    def prompts(self) -> Sequence[Any]:
        """The prompts; a single one is a list of one."""
        several = _form_of(self.prompt) in ("texts", "token lists")
        return self.prompt if several else [self.prompt]


class ChatCall(Call):
    """Body of /v1/chat/completions: messages for the checkpoint's chat template."""

    messages: Annotated[Items[ChatMessage], FewMessages] = Field(min_length=1)
    max_tokens: Count | None = Field(None, description="older name of max_completion_tokens")
    max_completion_tokens: Count | None = Field(
        None,
        description="longest answer; the canvas is no longer than this, DLLM_MAX_GEN_LENGTH and "
        "what the context has left; default DLLM_CHAT_MAX_TOKENS",
    )
    safety_identifier: NoEffect = None
    prompt_cache_key: NoEffect = None
    prompt_cache_options: NoEffect = None
    prompt_cache_retention: NoEffect = None
    prediction: NoEffect = None
    parallel_tool_calls: bool | None = Field(None, description="false: only the first call counts")
    echo: Annotated[Any, Unsupported(False)] = None
    logprobs: Any = Field(
        None,
        description="report each token's log-probability",
        json_schema_extra={"type": "boolean"},
    )
    top_logprobs: int | None = Field(
        None, ge=0, le=MAX_LOGPROBS, description="list this many of the most probable tokens"
    )
    tools: Tools | None = Field(None, description="functions that the model may call")
    tool_choice: ToolChoice | None = Field(None, description="default: auto")
    functions: Any = Field(None, description="only with function_call none; may be empty without")
    function_call: Annotated[Any, Unsupported("none", "auto")] = None
    modalities: Annotated[Any, Unsupported(["text"])] = None
    audio: Annotated[Any, Unsupported()] = None
    moderation: Annotated[Any, Unsupported()] = None
    web_search_options: Annotated[Any, Unsupported()] = None
    reasoning_effort: Annotated[Any, Unsupported("none", "medium")] = None
    verbosity: Annotated[Any, Unsupported("medium")] = None

    @model_validator(mode="wrap")
    @classmethod
    def _no_tools(cls, value: object, handler: ModelWrapValidatorHandler[Self]) -> Self:
        """Drop the tools of a call that forbids the model to use them."""
        if isinstance(value, dict):
            unused = {tools for tools, choice in CHOICES.items() if value.get(choice) == "none"}
            value = {name: item for name, item in value.items() if name not in unused}
        return handler(value)

    @field_validator(OLD)
    @classmethod
    def _old_tools_are_empty(cls, value: object) -> None:
        if value != []:
            raise PydanticCustomError(
                "not_supported",
                "This is not supported; send tools, or {choice} 'none' with it",
                {"choice": CHOICES[OLD]},
            )

    @field_validator("tool_choice")
    @classmethod
    def _choice_is_offered(cls, value: object, info: ValidationInfo) -> object:
        if "tools" not in info.data:
            return value  # they are invalid, which is the error to tell
        names = [tool.function.name for tool in info.data["tools"] or ()]
        if value == "required" and not names:
            raise PydanticCustomError("no_tools", "required needs tools")
        if isinstance(value, NamedChoice) and value.function.name not in names:
            raise PydanticCustomError("no_such_tool", "This function is not among the tools")
        return value

    @field_validator("logprobs")
    @classmethod
    def _logprobs_is_a_switch(cls, value: object) -> object:
        if not isinstance(value, bool):
            raise PydanticCustomError("bool_type", "Should be true or false; see top_logprobs")
        return value

    @model_validator(mode="after")
    def _top_needs_logprobs(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise PydanticCustomError("top_logprobs", "top_logprobs needs logprobs true")
        return self

    @model_validator(mode="after")
    def _form_or_tools(self) -> Self:
        form = self.structured_outputs or self._format
        if self.tools and form is not None:
            raise PydanticCustomError(
                "form_and_tools",
                "tools cannot be combined with response_format or structured_outputs; send "
                "tool_choice 'none' with them",
            )
        return self

    @property
    def offer(self) -> Offer | None:
        """The tools that the answer may call; None: none."""
        if not self.tools:
            return None
        names = frozenset(tool.function.name for tool in self.tools)
        return Offer(names, parallel=self.parallel_tool_calls is not False)

    @property
    def length_name(self) -> str:
        """The name of the length that errors use."""
        return "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"

    def request(self, *, default: int, longest: int) -> GenerateRequest:
        """The adapter's own request, with a canvas of at most `longest` tokens.

        `default` is the limit where the call gives none; 0: `longest` alone.
        """
        given = [n for n in (self.max_tokens, self.max_completion_tokens) if n is not None]
        messages = [message.message() for message in self.messages]
        num_top = (self.top_logprobs or 0) if self.logprobs else None
        most = min(*(given or [default or longest]), longest)
        request = self._request(most, messages=messages, logprobs=num_top)
        if not self.tools:
            return request
        form = self._required_form or request.structured_outputs
        return request.model_copy(update={"tools": self.tools, "structured_outputs": form})

    @property
    def _required_form(self) -> StructuredOutputs | None:
        """The form of a call that the answer must be; None: it may be a text."""
        if self.tool_choice in (None, "auto"):
            return None
        functions = [tool.function.model_dump(exclude_none=True) for tool in self.tools or ()]
        if isinstance(self.tool_choice, NamedChoice):
            name = self.tool_choice.function.name
            functions = [function for function in functions if function["name"] == name]
        return StructuredOutputs.model_validate(required_form(functions))
