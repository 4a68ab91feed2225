"""A response of /v1/responses, and the events of its stream, in OpenAI's format."""

import secrets
import time
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field

from adapter.api.openai.logprobs import (
    ChatLogprobs,
    ChatTokenLogprob,
    TextToken,
    reveal_steps_of,
    text_tokens,
)
from adapter.api.openai.response_calls import ResponseCall
from adapter.api.openai.responses import RevealSteps
from adapter.types import Event

Status = Literal["in_progress", "completed", "incomplete", "failed"]


class OutputText(BaseModel):
    """The text of the answer."""

    type: Literal["output_text"] = "output_text"
    text: str
    annotations: list[Any] = []
    logprobs: list[ChatTokenLogprob] = []

    @classmethod
    def of(cls, text: str, tokens: Sequence[TextToken] | None) -> Self:
        """The text with the log-probabilities of its tokens, if they are known."""
        return cls(text=text, logprobs=logprobs_of(tokens))


def logprobs_of(tokens: Sequence[TextToken] | None) -> list[ChatTokenLogprob]:
    """The log-probabilities of tokens; none if the call asks for none."""
    found = ChatLogprobs.of(tokens)
    return [] if found is None else found.content


class OutputMessage(BaseModel):
    """The answer: the one item of the output."""

    id: str
    type: Literal["message"] = "message"
    status: Status
    role: Literal["assistant"] = "assistant"
    content: list[OutputText]


class IncompleteDetails(BaseModel):
    """Why the answer is cut."""

    reason: Literal["max_output_tokens"] = "max_output_tokens"


class ResponseFailure(BaseModel):
    """The error that ended a response."""

    code: str = "server_error"
    message: str


class InputTokensDetails(BaseModel):
    """How many tokens of the input the prefix cache had."""

    cached_tokens: int
    cache_write_tokens: int = 0


class OutputTokensDetails(BaseModel):
    """How many tokens of the answer are hidden reasoning: none."""

    reasoning_tokens: int = 0


class ResponseUsage(BaseModel):
    """Tokens of the call."""

    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails = OutputTokensDetails()
    total_tokens: int


class Response(BaseModel):
    """A response; whole, or as it stands in an event of a stream."""

    id: str
    object: Literal["response"] = "response"
    created_at: int
    completed_at: int | None = None
    status: Status
    background: bool = False
    error: ResponseFailure | None = None
    incomplete_details: IncompleteDetails | None = None
    instructions: str | None
    max_output_tokens: int | None
    max_tool_calls: None = None
    metadata: dict[str, Any]
    model: str
    output: list[OutputMessage] = []
    parallel_tool_calls: bool = True
    previous_response_id: None = None
    reasoning: dict[str, None] = {"effort": None, "summary": None}
    service_tier: str = "default"
    store: Annotated[bool, Field(description="nothing is stored")] = False
    temperature: float
    text: dict[str, Any]
    tool_choice: str = "auto"
    tools: list[Any] = []
    top_logprobs: int
    top_p: float
    truncation: str = "disabled"
    usage: ResponseUsage | None = None
    user: None = None
    seed: Annotated[int | None, Field(description="what repeats the answer")] = None
    reveal_steps: RevealSteps = None

    @classmethod
    def begun(cls, call: ResponseCall, model: str) -> Self:
        """The response to a call before anything is known of the answer."""
        form = None if call.text is None else call.text.format
        shown = (
            {"type": "text"} if form is None else form.model_dump(by_alias=True, exclude_none=True)
        )
        return cls(
            id=f"resp_{secrets.token_hex(16)}",
            created_at=int(time.time()),
            status="in_progress",
            instructions=call.instructions,
            max_output_tokens=call.max_output_tokens,
            metadata=call.metadata or {},
            model=model,
            temperature=call.temperature or 0.0,
            text={"format": shown, "verbosity": "medium"},
            tool_choice=call.tool_choice or "auto",
            top_logprobs=call.top_logprobs or 0,
            top_p=1.0 if call.top_p is None else call.top_p,
        )

    def ended(self, result: Event, message_id: str) -> Self:
        """The same with the answer."""
        tokens, usage = text_tokens(result), result.usage
        assert usage is not None
        is_cut = result.finish_reason == "length"
        status: Status = "incomplete" if is_cut else "completed"
        message = OutputMessage(
            id=message_id, status=status, content=[OutputText.of(result.text, tokens)]
        )
        return self.model_copy(
            update={
                "status": status,
                "completed_at": None if is_cut else int(time.time()),
                "incomplete_details": IncompleteDetails() if is_cut else None,
                "output": [message],
                "usage": ResponseUsage(
                    input_tokens=usage.prompt_tokens,
                    input_tokens_details=InputTokensDetails(cached_tokens=usage.cached_tokens),
                    output_tokens=usage.completion_tokens,
                    total_tokens=usage.prompt_tokens + usage.completion_tokens,
                ),
                "seed": result.seed,
                "reveal_steps": reveal_steps_of(tokens),
            }
        )

    def failed(self, message: str) -> Self:
        """The same with what ended it."""
        return self.model_copy(
            update={"status": "failed", "error": ResponseFailure(message=message)}
        )


class ResponseEvent(BaseModel):
    """Data of an event of a stream; its type says which further fields it has."""

    model_config = ConfigDict(extra="allow")

    type: str
    sequence_number: int


def new_message_id() -> str:
    """An id for the answer's message."""
    return f"msg_{secrets.token_hex(16)}"
