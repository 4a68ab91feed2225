"""Messages of OpenAI's chat calls, and their translation to messages for the chat template."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationInfo
from pydantic_core import PydanticCustomError

from adapter.api.openai.fields import NoEffect, OpenAIBody, Unsupported
from adapter.api.schemas import Items, Message, PlainText


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


class ChatMessage(OpenAIBody):
    """One message. Fields that clients copy from a response are accepted if they are empty."""

    role: Literal["system", "developer", "user", "assistant"]
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
    tool_calls: Annotated[Any, Unsupported([])] = None

    def message(self) -> Message:
        """The message for the chat template, where `developer` becomes `system`."""
        role = "system" if self.role == "developer" else self.role
        text = "\n".join(part.text for part in self.content)
        return Message(role=role, content=text or self.refusal or "")
