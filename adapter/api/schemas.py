"""Bodies of requests and responses. `check_limits` checks the limits that settings put on them."""

import dataclasses
import json
import re
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    model_validator,
)
from pydantic_core import PydanticCustomError

from adapter.jobs.job import Job, JobState
from adapter.types import DEFAULT_PRIORITY, Inputs, InputValue, TokenDetail, Usage

INT32_MAX = 2**31 - 1
MAX_STOP_STRINGS = 16
MAX_STOP_CHARS = 256
#: Most fields of an object; no call has half as many.
MAX_FIELDS = 100
#: Most tools of a request, and characters of their description as JSON.
MAX_TOOLS = 128
MAX_TOOLS_CHARS = 2**18
#: Most messages of a chat, and parts of messages; a chat template takes a few tokens for each.
MAX_MESSAGES = 4096
SURROGATE = re.compile("[\ud800-\udfff]")

T = TypeVar("T")


def _plain_text(value: str) -> str:
    if "\x00" in value:
        raise PydanticCustomError("string_nul", "String should not contain a NUL character")
    if not value.isascii() and SURROGATE.search(value):
        raise PydanticCustomError("string_unicode", "String should be valid unicode")
    return value


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _few_messages(value: object) -> object:
    """Refuse too many messages before any is looked at; a part of a message counts as one."""
    if isinstance(value, list):
        contents = (item.get("content") for item in value if isinstance(item, dict))
        count = len(value) + sum(len(c) for c in contents if isinstance(c, list))
        if count > MAX_MESSAGES:
            raise PydanticCustomError(
                "too_many_messages",
                "There should be at most {most} messages and parts of messages, not {count}",
                {"most": MAX_MESSAGES, "count": count},
            )
    return value


#: A list of which the first invalid item is reported, however many there are.
Items = Annotated[list[T], Field(fail_fast=True)]
FewMessages = BeforeValidator(_few_messages)

_Plain = AfterValidator(_plain_text)
PlainText = Annotated[str, _Plain]
Prompt = Annotated[str, Field(min_length=1), _Plain]
Name = Annotated[str, Field(min_length=1, max_length=64), _Plain]
ModelName = Annotated[str, Field(min_length=1, max_length=255), _Plain]
Token = Annotated[int, Field(ge=0, le=INT32_MAX)]
Count = Annotated[int, Field(ge=1, le=INT32_MAX)]
StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS), _Plain]
ToolName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
StopStrings = Annotated[
    Items[StopString],
    Field(max_length=MAX_STOP_STRINGS),
    BeforeValidator(_as_list, json_schema_input_type=StopString | list[StopString]),
]


class Body(BaseModel):
    """Unknown fields, NaN, and numbers as strings are errors.

    Each object has few errors, whatever it holds: a list reports one, and many fields are one.
    """

    model_config = ConfigDict(
        extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    @model_validator(mode="before")
    @classmethod
    def _few_fields(cls, value: object) -> object:
        if isinstance(value, dict) and len(value) > MAX_FIELDS:
            raise PydanticCustomError(
                "too_many_fields",
                "Object should have at most {most} fields, not {count}",
                {"most": MAX_FIELDS, "count": len(value)},
            )
        return value


def _plain_json(value: object) -> object:
    """Refuse what the engine's JSON cannot carry or a database not keep, and values too deep."""
    try:
        text = json.dumps(value, allow_nan=False, ensure_ascii=False)
    except (ValueError, RecursionError) as error:
        raise PydanticCustomError("not_json", "Should be plain JSON") from error
    _plain_text(text)
    if "\\u0000" in text:
        raise PydanticCustomError("string_nul", "String should not contain a NUL character")
    return value


PlainObject = Annotated[dict[str, Any], AfterValidator(_plain_json)]


class Function(Body):
    """A function that the model may call."""

    name: ToolName
    description: PlainText | None = None
    parameters: PlainObject | None = None
    """JSON schema of the arguments, an object"""
    strict: bool | None = None
    """has no effect: the arguments of a required call are always held under their schema"""


class Tool(Body):
    """A tool in OpenAI's format; only functions are known."""

    type: Literal["function"]
    function: Function


def _small_tools(tools: list[Tool]) -> list[Tool]:
    size = len(tools_input(tools))
    if size > MAX_TOOLS_CHARS:
        raise PydanticCustomError(
            "too_large",
            "All tools together should have at most {most} characters as JSON, not {size}",
            {"most": MAX_TOOLS_CHARS, "size": size},
        )
    names = [tool.function.name for tool in tools]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise PydanticCustomError("name_twice", "Function {name} is there twice", {"name": twice})
    return tools


def tools_input(tools: list[Tool]) -> str:
    """The tools as an input of the Triton model."""
    functions = [tool.function.model_dump(exclude_none=True) for tool in tools]
    return json.dumps([{"type": "function", "function": f} for f in functions])


Tools = Annotated[Items[Tool], Field(max_length=MAX_TOOLS), AfterValidator(_small_tools)]


class FunctionCall(Body):
    """A function and its arguments as JSON."""

    name: ToolName
    arguments: PlainText


class MessageCall(Body):
    """A call in a history."""

    id: Name | None = None
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(Body):
    """One chat message; the checkpoint's chat template judges the role."""

    role: Name
    content: PlainText
    tool_calls: Items[MessageCall] | None = Field(None, max_length=MAX_TOOLS)
    """of an assistant: calls of tools"""
    tool_call_id: Name | None = None
    """of a tool: the call that this is the result of"""


class StructuredOutputs(Body):
    """The form of a text; exactly one of json, regex, choice and json_object."""

    json_: dict[str, Any] | bool | str | None = Field(
        None, alias="json", description="a JSON schema, or one as text"
    )
    regex: Annotated[str, Field(min_length=1), _Plain] | None = None
    """what the whole text must match"""
    choice: Annotated[Items[Prompt], Field(min_length=1, max_length=4096)] | None = None
    """the texts to choose from"""
    json_object: bool | None = None
    """any JSON object, three levels deep"""
    prefix: PlainText | None = None
    """fixed text before it"""
    suffix: PlainText | None = None
    """fixed text behind it"""

    def text(self) -> str:
        """The form as the input of the Triton model."""
        return json.dumps(self.model_dump(by_alias=True, exclude_none=True))


class Denoising(Body):
    """How to denoise: inputs of the Triton model, under their names there."""

    # From the engine's table of sampling fields. make fields: begin
    steps: int | None = Field(None, ge=1, le=INT32_MAX)
    """denoising steps over the whole canvas; default: gen_length"""
    block_length: int | None = Field(None, ge=1, le=INT32_MAX)
    """tokens per block, at most gen_length; default: 32, with alg gen_length; a block-wise model's
    own"""
    cfg_scale: float | None = Field(None, ge=0, le=1000)
    """classifier-free guidance; 0 is off"""
    remasking: Name | None = Field(
        None,
        examples=[
            "low_confidence_dynamic",
            "low_confidence",
            "random",
            "entropy",
            "margin",
            "sequential",
            "speculative",
        ],
    )
    """which positions a step commits first; default: low_confidence, or a block-wise model's own
    rule: low_confidence_dynamic, low_confidence, random, entropy, margin, sequential,
    speculative"""
    confidence_threshold: float | None = Field(None, gt=0, le=1)
    """commit every position at least this confident, and the best; not with alg, factor,
    entropy_bound, anchor_threshold"""
    factor: float | None = Field(None, ge=0, le=1000000)
    """Fast-dLLM: commit the n most confident while c_n >= 1 - factor / (n + 1); not with alg,
    confidence_threshold, entropy_bound, anchor_threshold"""
    entropy_bound: float | None = Field(None, ge=0, le=1000000)
    """EB-sampler: commit the least uncertain while their entropies sum to at most this; not with
    alg, confidence_threshold, factor, anchor_threshold"""
    low_threshold: float | None = Field(None, gt=0, le=1)
    """dInfer: commit the best of each run of masks, too, if above this; needs
    confidence_threshold"""
    credit: bool | None = None
    """dInfer: trust tokens that stay ahead from step to step; needs confidence_threshold"""
    anchor_threshold: float | None = Field(None, gt=0, le=1)
    """LocalLeap: commit neighbors of positions at least this confident; not with alg,
    confidence_threshold, factor, entropy_bound"""
    neighbor_threshold: float | None = Field(None, gt=0, le=1)
    """LocalLeap: how confident a neighbor has to be; default: 0.75; needs anchor_threshold"""
    alg: Name | None = Field(None, examples=["origin", "maskgit_plus", "topk_margin", "entropy"])
    """Dream's rule, instead of remasking: origin, maskgit_plus, topk_margin, entropy"""
    alg_temp: float | None = Field(None, ge=0, le=1000000)
    """Dream: above 0, draw positions from softmax(score / alg_temp); needs alg"""
    top_p: float | None = Field(None, gt=0, le=1)
    """sample from the most probable tokens that reach this sum"""
    top_k: int | None = Field(None, ge=1, le=INT32_MAX)
    """sample from this many most probable tokens"""
    seed: int | None = Field(None, ge=-9223372036854775808, le=9223372036854775807)
    """repeats an answer; default: drawn at random and reported"""
    logits_eos_inf: bool | None = None
    """never choose the end-of-text token"""
    confidence_eos_eot_inf: bool | None = None
    """commit end-of-text and end-of-turn tokens after all others"""
    stop: StopStrings | None = None
    """end the text before the first of these strings"""
    structured_outputs: StructuredOutputs | None = None
    """the form of the text, held by construction: one of json (a schema), regex, choice (a list of
    strings), json_object (true); prefix and suffix put fixed text around it"""
    ignore_eos: bool | None = None
    """decode the whole canvas, even after an end-of-text token"""
    logprobs: int | None = Field(None, ge=0, le=20)
    """report each token's log-probability at the step that committed it, and this many of the most
    probable tokens there; default: off"""
    reveal_steps: bool | None = None
    """report the step that committed each token"""
    cache: Name | None = Field(
        None, examples=["none", "prefix", "dual", "sparse", "delayed", "block"]
    )
    """which keys and values are kept between steps; block-wise models: none, block: none, prefix,
    dual, sparse, delayed, block; default: the server's"""
    retention_ratio: float | None = Field(None, gt=0, le=1)
    """share of the positions outside the block that each KV head keeps; with cache sparse; default:
    the server's"""
    pool_kernel: int | None = Field(None, ge=1, le=63)
    """a position scores as the best of this many around it; odd; with cache sparse; default: the
    server's"""
    delay_steps: int | None = Field(None, ge=0, le=INT32_MAX)
    """steps of a block that run in full before one stores keys and values; with cache prefix, dual,
    sparse, delayed; default: the server's"""
    refresh_interval: int | None = Field(None, ge=0, le=INT32_MAX)
    """steps between Refreshes in a block; 0: only at its start; with cache prefix, dual, sparse,
    delayed; default: the server's"""
    # make fields: end


class Sampling(Denoising):
    """How to denoise, and how much."""

    # make fields: begin
    temperature: float = Field(0.0, ge=0, le=1000000)
    """0 picks the most probable tokens; above 0 samples; at most DLLM_MAX_TEMPERATURE"""
    gen_length: int = Field(32, ge=1, le=INT32_MAX)
    """length of the canvas in tokens; at most DLLM_MAX_GEN_LENGTH"""
    # make fields: end

    @property
    def canvas_length(self) -> int:
        """Length of the canvas in tokens."""
        return self.gen_length

    def sampling_inputs(self) -> dict[str, InputValue]:
        """The given values as inputs of the Triton model."""
        given = self.model_dump(include=set(Sampling.model_fields), exclude_none=True)
        if self.structured_outputs is not None:
            given["structured_outputs"] = self.structured_outputs.text()
        return {name: value for name, value in given.items() if value != []}


class SchedulingParams(Body):
    """Model, deadline and priority of a request."""

    model: ModelName | None = Field(
        None, description="one of /v1/models; default: the first of them"
    )
    timeout: float | None = Field(
        None, gt=0, description="seconds until it must be done; at most DLLM_MAX_TIMEOUT"
    )
    priority: int = Field(DEFAULT_PRIORITY, ge=1, le=3, description="1 is served first, 3 last")


def _one_of_three() -> dict[str, Any]:
    """JSON Schema for: exactly one form of the prompt, `raw` only with a string, and tools only in
    a chat."""
    forms = {"prompt": "string", "messages": "array", "input_ids": "array"}
    nothing = {name: {"type": "null"} for name in forms}
    cooked = {"raw": {"const": False}}
    no_tools: dict[str, Any] = {"properties": {"tools": {"enum": [None, []]}}}
    is_raw = {"properties": {"raw": {"const": True}}, "required": ["raw"]}
    has_ids = {"properties": {"input_ids": {"type": "array"}}, "required": ["input_ids"]}
    return {
        "if": {"anyOf": [is_raw, has_ids]},
        "then": no_tools,
        "oneOf": [
            {
                "required": [name],
                "properties": nothing
                | {name: {"type": kind}}
                | ({} if name == "prompt" else cooked),
            }
            for name, kind in forms.items()
        ],
    }


class GenerateRequest(Sampling, SchedulingParams):
    """One prompt, in exactly one of three forms."""

    model_config = ConfigDict(json_schema_extra=_one_of_three())

    prompt: Prompt | None = Field(None, description="at most DLLM_MAX_PROMPT_CHARS characters")
    messages: Annotated[Items[Message] | None, FewMessages] = Field(None, min_length=1)
    tools: Tools | None = None
    """functions that the model may call; with messages, or a prompt that is not raw"""
    input_ids: Items[Token] | None = Field(
        None, description="the prompt's tokens; [] stands for the checkpoint's start token"
    )
    raw: bool = Field(False, description="pass the prompt as it is, without the chat template")
    suffix: Prompt | None = Field(None, description="text behind the gap; limited as prompt")
    canvas_ids: Items[Token] | None = Field(
        None, min_length=1, description="the canvas, with the mask id where to decode"
    )

    n: Count = Field(
        1,
        description="jobs to submit, each with a seed that follows from `seed` and its place; at "
        "most DLLM_MAX_CHOICES; 1 in a stream",
    )

    @model_validator(mode="after")
    def _one_prompt(self) -> Self:
        forms = ("prompt", "messages", "input_ids")
        given = [name for name in forms if getattr(self, name) is not None]
        if len(given) != 1:
            raise PydanticCustomError(
                "exactly_one",
                "Exactly one of prompt, messages, input_ids should be given, not {given}",
                {"given": " and ".join(given) or "none"},
            )
        if self.raw and self.prompt is None:
            raise PydanticCustomError(
                "raw_without_prompt", "raw should be given together with prompt only"
            )
        if self.tools and (self.raw or self.input_ids is not None):
            raise PydanticCustomError(
                "tools_without_chat", "tools should be given with messages or a prompt, not raw"
            )
        return self

    @property
    def canvas_length(self) -> int:
        """`gen_length` if the request has it, else the length of `canvas_ids` if given."""
        if self.canvas_ids is None or "gen_length" in self.model_fields_set:
            return self.gen_length
        return len(self.canvas_ids)

    def inputs(self) -> Inputs:
        """Inputs of the Triton model for this request."""
        sampling = self.sampling_inputs() | self._gap_inputs()
        if self.tools:
            sampling["tools"] = tools_input(self.tools)
        if self.prompt is not None:
            return sampling | prompt_input(self.prompt, raw=self.raw)
        if self.input_ids is not None:
            return sampling | {"input_ids": self.input_ids}
        messages = [message.model_dump(exclude_none=True) for message in self.messages or ()]
        return sampling | {"messages": json.dumps(messages)}

    def _gap_inputs(self) -> dict[str, InputValue]:
        inputs: dict[str, InputValue] = {}
        if self.suffix is not None:
            inputs["suffix"] = self.suffix
        if self.canvas_ids is not None:
            inputs["canvas_ids"] = self.canvas_ids
            inputs["gen_length"] = self.canvas_length
        return inputs


class BatchRequest(Sampling, SchedulingParams):
    """Several prompts with the same parameters."""

    prompts: Items[Prompt] = Field(min_length=1, description="at most DLLM_MAX_BATCH_SIZE")
    raw: bool = Field(False, description="pass the prompts as they are")

    def inputs(self) -> list[Inputs]:
        """Inputs of the Triton model, for each prompt."""
        sampling = self.sampling_inputs()
        return [sampling | prompt_input(prompt, raw=self.raw) for prompt in self.prompts]


def prompt_input(prompt: str, *, raw: bool) -> dict[str, InputValue]:
    """The prompt as one user message for the chat template, or unchanged if `raw`."""
    if raw:
        return {"text_input": prompt}
    return {"messages": json.dumps([{"role": "user", "content": prompt}])}


class Submitted(BaseModel):
    """Ids with which to ask for the results."""

    request_ids: list[int]
    status: Literal["submitted"] = "submitted"


class Result(BaseModel):
    """A job as its owner sees it; a failed one has `error`.

    One that is done also has the optional fields that are known. Times are in Unix seconds.
    """

    request_id: int
    status: Literal["running", "finished", "failed", "cancelled"]
    text: str | None
    error: str | None = None
    created_at: float | None = Field(None, description="when the job was submitted")
    started_at: float | None = Field(None, description="when its last run began")
    finished_at: float | None = None
    finish_reason: str | None = Field(
        None, description="`stop`, or `length` if the canvas ended before the text"
    )
    usage: Usage | None = None
    seed: int | None = Field(None, description="what repeats the text")
    tokens: list[TokenDetail] | None = Field(
        None, description="the answer's tokens, with `logprobs` or `reveal_steps`"
    )

    @classmethod
    def of(cls, job: Job) -> Self:
        """The job's state; a queued job counts as running."""
        status = job.state if job.state.done else JobState.RUNNING
        fields: dict[str, Any] = {"request_id": job.id, "status": status.value, "text": job.text}
        if job.state is JobState.FAILED:
            fields["error"] = job.error
        if job.state.done:
            details = {
                f.name: getattr(job.details, f.name) for f in dataclasses.fields(job.details)
            }
            fields |= {name: value for name, value in details.items() if value is not None}
        return cls(**fields)


class Readiness(BaseModel):
    """Whether one kind of call can be taken; if not, the reason."""

    status: Literal["ok", "unavailable"]
    reason: str | None = None

    @classmethod
    def of(cls, reason: str | None) -> Self:
        """Unavailable if there is a reason."""
        return cls(status="ok" if reason is None else "unavailable", reason=reason)


class Health(Readiness):
    """Whether the service can take every kind of call; if not, the reasons."""

    jobs: Readiness = Field(description="submissions, polls and cancellations")
    live: Readiness = Field(description="streams and OpenAI calls")
    models: dict[str, Readiness] | None = Field(None, description="by name, if there are several")


class Liveness(BaseModel):
    """Whether the process can go on; if not, it has to be restarted."""

    status: Literal["ok", "stalled"]
    reason: str | None = None


class FieldProblem(BaseModel):
    """One invalid field, in FastAPI's format."""

    type: str
    loc: list[str | int]
    msg: str


class Problem(BaseModel):
    """Body of an error; a list where fields of the request are invalid."""

    detail: str | list[FieldProblem]


def error_responses(model: type[BaseModel] = Problem) -> dict[int | str, dict[str, Any]]:
    """Describe the body of every error status in the OpenAPI document."""
    return {codes: {"model": model} for codes in ("4XX", "5XX")}
