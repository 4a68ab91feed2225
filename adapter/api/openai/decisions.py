"""`POST /v1/decisions` as the `openai` package has it, and `POST /v1/score`."""

import json
import secrets
from collections.abc import Sequence
from contextlib import AsyncExitStack
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel, BeforeValidator, Field
from pydantic_core import PydanticCustomError

from adapter.api.deps import count_prompts, request_context, services
from adapter.api.openai.fields import NoEffect, OpenAIBody
from adapter.api.openai.responses import ErrorAnswer
from adapter.api.schemas import Items, ModelName, PlainText, error_responses
from adapter.api.sse import cancel_on_disconnect
from adapter.api.validation import BatchLimit, check_batch_size
from adapter.errors import InvalidRequest
from adapter.types import Event, StreamDetail

router = APIRouter(prefix="/v1", tags=["openai"])

#: Most containers inside each other in a part with JSON, as in OpenAI's API; and bytes of it.
MAX_JSON_DEPTH, MAX_JSON_BYTES = 32, 256 * 1024
#: Items and parts of OpenAI's API that this model cannot read.
UNSUPPORTED = (
    "input_image",
    "input_file",
    "function_call",
    "function_call_output",
    "custom_tool_call",
    "custom_tool_call_output",
)


def _supported(value: object) -> object:
    """Refuse what cannot be read by its name."""
    if isinstance(value, dict) and value.get("type") in UNSUPPORTED:
        problem = "{type} is not supported; the model reads text and JSON in messages"
        raise PydanticCustomError("not_supported", problem, {"type": value["type"]})
    return value


class Part(OpenAIBody):
    """A part of a content: text, an earlier answer, or JSON. Images are refused."""

    type: Literal["input_text", "output_text", "refusal", "input_json"]
    text: PlainText | None = None
    refusal: PlainText | None = None
    data: dict[str, Any] | list[dict[str, Any]] | None = Field(None, description="rendered as JSON")
    prompt_cache_breakpoint: NoEffect = None

    def rendered(self) -> str:
        """The part as text. Raises `InvalidRequest` if its text or data is missing."""
        if self.type == "input_json":
            if self.data is None:
                raise InvalidRequest("data: a part of type input_json needs data")
            text = json.dumps(self.data, ensure_ascii=False)
            if len(text.encode()) > MAX_JSON_BYTES or _depth(self.data) > MAX_JSON_DEPTH:
                limit = f"{MAX_JSON_BYTES} bytes of JSON, {MAX_JSON_DEPTH} containers deep"
                raise InvalidRequest(f"data: may have {limit}")
            return text
        text_of_it = self.refusal if self.type == "refusal" else self.text
        if text_of_it is None:
            name = "refusal" if self.type == "refusal" else "text"
            raise InvalidRequest(f"{name}: a part of type {self.type} needs {name}")
        return text_of_it


def _as_parts(value: object) -> object:
    return [{"type": "input_text", "text": value}] if isinstance(value, str) else value


def _as_messages(value: object) -> object:
    return [{"role": "user", "content": value}] if isinstance(value, str) else value


Content = Annotated[
    Items[Annotated[Part, BeforeValidator(_supported)]],
    BeforeValidator(_as_parts, json_schema_input_type=PlainText | list[Part]),
]


class InputMessage(OpenAIBody):
    """A message. Function calls and other items are refused."""

    role: Literal["user", "developer", "system", "assistant"]
    content: Content
    type: Literal["message"] = "message"
    phase: NoEffect = None

    def message(self) -> dict[str, str]:
        """The message for the chat template, where `developer` becomes `system`."""
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": _text(self.content)}


class Choice(OpenAIBody):
    """An option: text and boolean values with the same words are different."""

    value: PlainText | bool
    description: PlainText | None = None


class Level(OpenAIBody):
    """A level of a score, in ascending order."""

    label: PlainText
    description: PlainText | None = None


class Question(OpenAIBody):
    """A typed question about the input; the engine checks that its parts belong to its type."""

    type: Literal["predicate", "choice", "score"]
    instructions: Content
    name: PlainText | None = None
    choices: Items[Choice] | None = None
    levels: Items[Level] | None = None

    def asked(self) -> dict[str, Any]:
        """The question as the engine takes it."""
        fields = self.model_dump(exclude_none=True)
        for key, kind in (("choices", "choice"), ("levels", "score")):
            if key in fields and self.type != kind:
                raise InvalidRequest(f"{key}: a question of type {self.type} has none")
        return fields | {"instructions": _text(self.instructions)}


class DecisionCall(OpenAIBody):
    """The body of `POST /v1/decisions`."""

    model: ModelName
    input: Annotated[
        Items[Annotated[InputMessage, BeforeValidator(_supported)]],
        Field(min_length=1),
        BeforeValidator(_as_messages, json_schema_input_type=PlainText | list[InputMessage]),
    ]
    questions: Items[Question] = Field(min_length=1, max_length=400)
    prompt_cache_key: NoEffect = None
    prompt_cache_options: NoEffect = None
    safety_identifier: NoEffect = None

    def asked(self) -> str:
        """The input `decide` of the Triton model."""
        messages = [message.message() for message in self.input]
        return json.dumps({"input": messages, "questions": [q.asked() for q in self.questions]})


class ScoreCall(OpenAIBody):
    """The body of `POST /v1/score`."""

    model: ModelName
    pairs: Items[Annotated[Items[PlainText], Field(min_length=2, max_length=2)]] = Field(
        min_length=1, max_length=1000, description="context and continuation of each"
    )
    mc_num: int | None = Field(
        None, ge=1, le=1024, description="draws of the estimate (128); not for block-wise models"
    )
    seed: int = Field(0, ge=0, le=2**63 - 1, description="of the draws")

    def asked(self) -> str:
        """The input `score` of the Triton model."""
        return self.model_dump_json(exclude={"model"}, exclude_none=True)


class InputDetails(BaseModel):
    """How many of the read tokens came from a cache."""

    cached_tokens: int
    cache_write_tokens: int = 0


class OutputDetails(BaseModel):
    """A decision writes nothing."""

    reasoning_tokens: int = 0


class DecisionUsage(BaseModel):
    """Tokens of all questions together: each has the input once."""

    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int = 0
    output_tokens_details: OutputDetails = OutputDetails()
    total_tokens: int

    @classmethod
    def of(cls, event: Event) -> "DecisionUsage":
        """Usage of a finished request."""
        assert event.usage is not None
        tokens, cached = event.usage.prompt_tokens, event.usage.cached_tokens
        details = InputDetails(cached_tokens=cached)
        return cls(input_tokens=tokens, input_tokens_details=details, total_tokens=tokens)


class Decision(BaseModel):
    """Answers in the order of the questions."""

    model: str
    answers: list[dict[str, Any]]
    usage: DecisionUsage


class ScoreItem(BaseModel):
    """The likelihood of one continuation."""

    logprob: float
    """log p(continuation | context) in nats."""
    num_tokens: int
    method: Literal["left_to_right", "monte_carlo"]


class ScoreList(BaseModel):
    """Scores in the order of the pairs."""

    model: str
    scores: list[ScoreItem]
    usage: DecisionUsage


_FAULTS = error_responses(ErrorAnswer)


@router.post("/decisions", responses=_FAULTS)
async def decisions(call: Request, body: DecisionCall) -> Decision:
    """Answer typed questions about an input by probabilities; no text is written."""
    await _count(call, "questions", body.questions)
    event = await _run(call, body.model, {"decide": body.asked()})
    answers = json.loads(event.text)["answers"]
    return Decision(model=body.model, answers=answers, usage=DecisionUsage.of(event))


@router.post("/score", responses=_FAULTS)
async def score(call: Request, body: ScoreCall) -> ScoreList:
    """Score how likely each continuation is after its context."""
    await _count(call, "pairs", body.pairs)
    event = await _run(call, body.model, {"score": body.asked()})
    scores = json.loads(event.text)["scores"]
    return ScoreList(model=body.model, scores=scores, usage=DecisionUsage.of(event))


async def _count(call: Request, field: str, items: Sequence[object]) -> None:
    """Count each item as a prompt. Raises `RequestValidationError` for more than ever may be."""
    if (limiter := services(call).rate_limiter) is not None:
        check_batch_size(field, items, BatchLimit(limiter.most_at_once, "DLLM_RATE_LIMIT"))
    await count_prompts(call, len(items))


async def _run(call: Request, model: str, inputs: dict[str, str]) -> Event:
    """Run one request of the engine; a disconnect cancels it."""
    context = request_context(call)
    pool = services(call).fleet.find(model)
    async with AsyncExitStack() as stack:
        running = services(call).live.start(
            inputs,
            request_id=context.request_id or secrets.token_hex(8),
            detail=StreamDetail.RESULT,
            api_key=context.api_key,
            pool=pool,
        )
        stack.push_async_callback(running.close)
        return await cancel_on_disconnect(call, running.result())


def _text(content: list[Part]) -> str:
    return "\n".join(part.rendered() for part in content)


def _depth(value: Any) -> int:
    """Containers inside each other, as far as the limit."""
    depth, level = 0, [value]
    while level and depth <= MAX_JSON_DEPTH:
        inner = [item for item in level if isinstance(item, dict | list)]
        depth += bool(inner)
        level = [x for item in inner for x in (item.values() if isinstance(item, dict) else item)]
    return depth
