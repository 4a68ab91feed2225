"""Body of /v1/responses, and its translation to a chat."""

from typing import Annotated, Any, Literal, Self

from fastapi.exceptions import RequestValidationError
from pydantic import (
    Discriminator,
    Field,
    ModelWrapValidatorHandler,
    Tag,
    ValidationError,
    model_validator,
)
from pydantic_core import PydanticCustomError

from adapter.api.openai.fields import Extensions, NoEffect, OpenAIBody, Unsupported
from adapter.api.openai.requests import MAX_LOGPROBS, ChatCall
from adapter.api.schemas import (
    Count,
    Denoising,
    FewMessages,
    Items,
    PlainText,
    SchedulingParams,
)

#: What a call lists in `include` to get log-probabilities.
LOGPROBS = "message.output_text.logprobs"
#: Fields of the chat that a call becomes, and the call's own.
NAMES = {
    "messages": ("input",),
    "response_format": ("text", "format"),
    "max_completion_tokens": ("max_output_tokens",),
}


def _one_of(items: str) -> Discriminator:
    """Tells a text from a list of items."""

    def form(value: object) -> str | None:
        if isinstance(value, str):
            return "text"
        return items if isinstance(value, list) else None

    return Discriminator(
        form,
        custom_error_type="input_form",
        custom_error_message=f"Should be a string or a list of {items}",
    )


class InputPart(OpenAIBody):
    """A part of a message; only text is supported."""

    type: Literal["input_text", "output_text", "text"]
    text: PlainText
    annotations: NoEffect = None
    logprobs: NoEffect = None
    prompt_cache_breakpoint: NoEffect = None


class InputMessage(OpenAIBody):
    """A message; no other kind of item is supported."""

    type: Literal["message"] | None = None
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[
        Annotated[PlainText, Tag("text")] | Annotated[Items[InputPart], Tag("parts")],
        _one_of("parts"),
    ]
    id: NoEffect = None
    status: NoEffect = None
    phase: NoEffect = None

    @model_validator(mode="wrap")
    @classmethod
    def _is_message(cls, value: object, handler: ModelWrapValidatorHandler[Self]) -> Self:
        if isinstance(value, dict) and (kind := value.get("type", "message")) != "message":
            raise PydanticCustomError(
                "not_supported",
                "An item of type {kind} is not supported; only messages are",
                {"kind": repr(str(kind)[:64])},
            )
        return handler(value)

    def message(self) -> dict[str, Any]:
        """The message of a chat."""
        content = self.content
        if not isinstance(content, str):
            return {
                "role": self.role,
                "content": [{"type": "text", "text": part.text} for part in content],
            }
        return {"role": self.role, "content": content}


class TextFormat(OpenAIBody):
    """The form of the answer."""

    type: Literal["text", "json_object", "json_schema"]
    name: PlainText | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    description: NoEffect = None
    strict: NoEffect = None

    def response_format(self) -> dict[str, Any]:
        """The same as a chat has it."""
        if self.type != "json_schema":
            return {"type": self.type}
        schema = {"name": self.name, "schema": self.schema_, "strict": self.strict}
        return {"type": self.type, "json_schema": schema}


class TextOptions(OpenAIBody):
    """Options of the answer's text."""

    format: TextFormat | None = None
    verbosity: Annotated[Any, Unsupported("medium")] = None


class ResponseStreamOptions(OpenAIBody):
    """Options of a stream."""

    include_obfuscation: NoEffect = None


class ResponseCall(Denoising, SchedulingParams, Extensions):
    """Body of /v1/responses. Nothing is stored, so each call has the whole conversation.

    The diffusion parameters, `timeout` and `priority` are those of /v1/generate; OpenAI's clients
    send them in `extra_body`.
    """

    model: Annotated[PlainText, Field(min_length=1, max_length=256)]
    input: Annotated[
        Annotated[PlainText, Field(min_length=1), Tag("text")]
        | Annotated[Items[InputMessage], FewMessages, Field(min_length=1), Tag("items")],
        _one_of("items"),
    ]
    instructions: PlainText | None = Field(None, description="a system message before the input")
    max_output_tokens: Count | None = Field(
        None, description="longest answer; default DLLM_CHAT_MAX_TOKENS"
    )
    temperature: float | None = Field(None, ge=0, description="at most DLLM_MAX_TEMPERATURE")
    stream: bool | None = None
    stream_options: ResponseStreamOptions | None = None
    text: TextOptions | None = None
    include: list[
        Literal[
            "message.output_text.logprobs",
            "reasoning.encrypted_content",
            "message.input_image.image_url",
            "file_search_call.results",
            "web_search_call.results",
            "web_search_call.action.sources",
            "code_interpreter_call.outputs",
            "computer_call_output.output.image_url",
        ]
    ] = Field([], description=f"{LOGPROBS} has an effect")
    top_logprobs: int | None = Field(
        None, ge=0, le=MAX_LOGPROBS, description=f"needs {LOGPROBS} in include"
    )
    tools: Any = Field(None, description="only with tool_choice none; may be empty without")
    tool_choice: Literal["none", "auto"] | None = None
    logprobs: Annotated[Any, Unsupported()] = None
    previous_response_id: Annotated[Any, Unsupported()] = None
    conversation: Annotated[Any, Unsupported()] = None
    prompt: Annotated[Any, Unsupported()] = None
    background: Annotated[Any, Unsupported(False)] = None
    truncation: Annotated[Any, Unsupported("disabled")] = None
    moderation: Annotated[Any, Unsupported()] = None
    context_management: Annotated[Any, Unsupported([])] = None
    reasoning: Annotated[
        Any, Unsupported({}, {"effort": None}, {"effort": "none"}, {"effort": "medium"})
    ] = None
    metadata: dict[str, Any] | None = Field(None, description="returned as it is")
    store: NoEffect = None
    user: NoEffect = None
    safety_identifier: NoEffect = None
    prompt_cache_key: NoEffect = None
    prompt_cache_options: NoEffect = None
    prompt_cache_retention: NoEffect = None
    service_tier: NoEffect = None
    parallel_tool_calls: NoEffect = None
    max_tool_calls: NoEffect = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.top_logprobs and LOGPROBS not in self.include:
            raise PydanticCustomError("top_logprobs", f"top_logprobs needs include [{LOGPROBS!r}]")
        if self.tools and self.tool_choice != "none":
            raise PydanticCustomError(
                "not_supported", "tools is not supported; leave it out, or send tool_choice 'none'"
            )
        return self

    def chat(self) -> ChatCall:
        """The same as a chat. Raises `RequestValidationError`, which names the call's fields."""
        messages = [{"role": "system", "content": self.instructions}] if self.instructions else []
        if isinstance(self.input, str):
            messages.append({"role": "user", "content": self.input})
        else:
            messages += [item.message() for item in self.input]
        fields = {*Denoising.model_fields, *SchedulingParams.model_fields} - {"logprobs"}
        given = self.model_dump(include=fields, exclude_none=True, by_alias=True)
        form = None if self.text is None else self.text.format
        wants_logprobs = LOGPROBS in self.include
        try:
            return ChatCall.model_validate(
                given
                | {
                    "model": self.model,
                    "messages": messages,
                    "temperature": self.temperature,
                    "max_completion_tokens": self.max_output_tokens,
                    "response_format": None if form is None else form.response_format(),
                    "logprobs": wants_logprobs,
                    "top_logprobs": self.top_logprobs if wants_logprobs else None,
                }
            )
        except ValidationError as error:
            problems = error.errors(include_url=False, include_context=False)
            raise RequestValidationError(
                [_renamed(dict(problem)) for problem in problems]
            ) from None


def _renamed(problem: dict[str, Any]) -> dict[str, Any]:
    first, *rest = problem["loc"] or ("",)
    return problem | {"loc": ("body", *NAMES.get(str(first), (first,)), *rest)}
