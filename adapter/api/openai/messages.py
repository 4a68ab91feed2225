"""Messages of OpenAI's chat calls, and their translation to messages for the chat template."""

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, ValidationInfo, model_validator
from pydantic_core import PydanticCustomError

from adapter.api.openai.fields import NoEffect, OpenAIBody, Unsupported
from adapter.api.schemas import MAX_TOOLS, Items, Message, MessageCall, Name, PlainText, ToolName


class TextPart(OpenAIBody):
    """A part of a message; only text is supported."""

    type: Literal["text"]
    text: PlainText
    cache_control: NoEffect = None
    prompt_cache_breakpoint: NoEffect = None


def _as_parts(value: object, info: ValidationInfo) -> object:
    """The parts of a message; an assistant's may be missing."""
    if value is None and info.data.get("role", "assistant") == "assistant":
        return []
    if value is None:
        raise PydanticCustomError("missing", "Field required")
    if isinstance(value, str):
        return [{"type": "text", "text": value}] if value else []
    if isinstance(value, list):
        return value
    raise PydanticCustomError("content_form", "Should be a string or a list of text parts")


class CalledFunction(OpenAIBody):
    """The function of a call, and its arguments as JSON."""

    name: ToolName
    arguments: PlainText


class PastCall(OpenAIBody):
    """A call of a tool, as an answer had it."""

    id: Name | None = None
    type: Literal["function"] = "function"
    index: NoEffect = None
    function: CalledFunction


class ChatMessage(OpenAIBody):
    """One message. Fields that clients copy from a response are accepted if they are empty."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[
        Items[TextPart],
        Field(default_factory=lambda: None, validate_default=True),
        BeforeValidator(_as_parts, json_schema_input_type=PlainText | list[TextPart] | None),
    ]
    name: NoEffect = None
    type: Literal["text", "message"] | None = Field(None, description="has no effect")
    refusal: PlainText | None = Field(None, description="the text of an answer without content")
    annotations: NoEffect = None
    reasoning: NoEffect = None
    reasoning_content: NoEffect = None
    prefix: Annotated[Any, Unsupported(False)] = None
    audio: Annotated[Any, Unsupported()] = None
    function_call: Annotated[Any, Unsupported()] = None
    tool_calls: Annotated[Items[PastCall] | None, Field(max_length=MAX_TOOLS)] = None
    tool_call_id: Name | None = Field(None, description="of a result: its call")

    @model_validator(mode="after")
    def _fits_its_role(self) -> Self:
        for name, role in (("tool_calls", "assistant"), ("tool_call_id", "tool")):
            if getattr(self, name) and self.role != role:
                raise PydanticCustomError(
                    "wrong_role",
                    "{name} should be given in a message of the {role} only",
                    {"name": name, "role": role},
                )
        return self

    def message(self) -> Message:
        """The message for the chat template, where `developer` becomes `system`."""
        role = "system" if self.role == "developer" else self.role
        text = "\n".join(part.text for part in self.content)
        calls = [
            MessageCall.model_validate(call.model_dump(exclude={"index"}))
            for call in self.tool_calls or ()
        ]
        return Message(
            role=role,
            content=text or self.refusal or "",
            tool_calls=calls or None,
            tool_call_id=self.tool_call_id,
        )
