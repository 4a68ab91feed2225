"""Bodies of the REST API. What the settings limit is checked by `check_limits`."""

import json
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from adapter.jobs.job import Job, JobState
from adapter.types import DEFAULT_PRIORITY, Inputs, InputValue

INT32_MAX = 2**31 - 1
MAX_RULE_PARAMETER = 1e6  # far beyond sense, well within 32-bit floats
MAX_STOP_STRINGS = 16
MAX_STOP_CHARS = 256


def _plain_text(value: str) -> str:
    if "\x00" in value:
        raise PydanticCustomError("string_nul", "String should not contain a NUL character")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise PydanticCustomError("string_unicode", "String should be valid unicode")
    return value


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


_Plain = AfterValidator(_plain_text)
PlainText = Annotated[str, _Plain]
Prompt = Annotated[str, Field(min_length=1), _Plain]
Name = Annotated[str, Field(min_length=1, max_length=64), _Plain]
Token = Annotated[int, Field(ge=0, le=INT32_MAX)]
Count = Annotated[int, Field(ge=1, le=INT32_MAX)]
StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS), _Plain]
StopStrings = Annotated[
    list[StopString],
    Field(max_length=MAX_STOP_STRINGS),
    BeforeValidator(_as_list, json_schema_input_type=StopString | list[StopString]),
]


class Body(BaseModel):
    """Unknown fields, NaN, and numbers as strings are errors."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Message(Body):
    """One chat message; the checkpoint's chat template judges the role."""

    role: Name
    content: PlainText


_ONE_RULE = (
    "one of confidence_threshold, factor, entropy_bound, anchor_threshold at most; not with alg"
)


class Denoising(Body):
    """How to denoise: inputs of the Triton model, by its names."""

    steps: Count | None = Field(None, description="denoising steps; default: gen_length")
    block_length: Count | None = Field(None, description="at most gen_length")
    cfg_scale: float | None = Field(None, ge=0, le=MAX_RULE_PARAMETER)
    remasking: Name | None = None
    confidence_threshold: float | None = Field(None, gt=0, le=1, description=_ONE_RULE)
    factor: float | None = Field(None, ge=0, le=MAX_RULE_PARAMETER, description=_ONE_RULE)
    entropy_bound: float | None = Field(None, ge=0, le=MAX_RULE_PARAMETER, description=_ONE_RULE)
    low_threshold: float | None = Field(None, gt=0, le=1, description="needs confidence_threshold")
    credit: bool | None = Field(None, description="needs confidence_threshold")
    anchor_threshold: float | None = Field(None, gt=0, le=1, description=_ONE_RULE)
    neighbor_threshold: float | None = Field(None, gt=0, le=1, description="needs anchor_threshold")
    alg: Name | None = None
    alg_temp: float | None = Field(
        None, ge=0, le=MAX_RULE_PARAMETER, description="above 0 needs alg"
    )
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: Count | None = None
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1)
    logits_eos_inf: bool | None = None
    confidence_eos_eot_inf: bool | None = None
    stop: StopStrings | None = None
    cache: Name | None = None
    retention_ratio: float | None = Field(None, gt=0, le=1)
    pool_kernel: int | None = Field(None, ge=1, le=2**31 - 1)
    delay_steps: int | None = Field(None, ge=0, le=2**31 - 1)
    refresh_interval: int | None = Field(None, ge=0, le=2**31 - 1)
    ignore_eos: bool | None = None


class Sampling(Denoising):
    """How to denoise, and how much."""

    temperature: float = Field(0.0, ge=0, description="at most DLLM_MAX_TEMPERATURE")
    gen_length: int = Field(32, ge=1, description="tokens; at most DLLM_MAX_GEN_LENGTH")

    @property
    def canvas_length(self) -> int:
        """How many tokens are decided on."""
        return self.gen_length

    def sampling_inputs(self) -> dict[str, InputValue]:
        """What was given, by the names of the Triton model."""
        given = self.model_dump(include=set(Sampling.model_fields), exclude_none=True)
        return {name: value for name, value in given.items() if value != []}


class Queueing(Body):
    """How long a request may take, and what it may overtake."""

    timeout: float | None = Field(
        None, gt=0, description="seconds until it must be done; at most DLLM_MAX_TIMEOUT"
    )
    priority: int = Field(DEFAULT_PRIORITY, ge=1, le=3, description="1 is served first, 3 last")


def _one_of_three() -> dict[str, Any]:
    """In the words of JSON Schema: one form of the prompt, and `raw` with a string only."""
    forms = {"prompt": "string", "messages": "array", "input_ids": "array"}
    nothing = {name: {"type": "null"} for name in forms}
    cooked = {"raw": {"const": False}}
    return {
        "oneOf": [
            {
                "required": [name],
                "properties": nothing
                | {name: {"type": kind}}
                | ({} if name == "prompt" else cooked),
            }
            for name, kind in forms.items()
        ]
    }


class GenerateRequest(Sampling, Queueing):
    """One prompt, in exactly one of three forms."""

    model_config = ConfigDict(json_schema_extra=_one_of_three())

    prompt: Prompt | None = Field(None, description="at most DLLM_MAX_PROMPT_CHARS characters")
    messages: list[Message] | None = Field(None, min_length=1)
    input_ids: list[Token] | None = Field(None, min_length=1)
    raw: bool = Field(False, description="pass the prompt as it is, without the chat template")
    suffix: Prompt | None = Field(None, description="text behind the gap; limited as prompt")
    canvas_ids: list[Token] | None = Field(
        None, min_length=1, description="the canvas, with the mask id where to decode"
    )

    @model_validator(mode="after")
    def _one_prompt(self) -> Self:
        given = [name for name in ("prompt", "messages", "input_ids") if self._has(name)]
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
        return self

    @property
    def canvas_length(self) -> int:
        """That of the canvas where there is one, unless the request says otherwise."""
        if self.canvas_ids is None or "gen_length" in self.model_fields_set:
            return self.gen_length
        return len(self.canvas_ids)

    def inputs(self) -> Inputs:
        """The request for the Triton model."""
        sampling = self.sampling_inputs() | self._gap_inputs()
        if self.prompt is not None:
            return sampling | prompt_input(self.prompt, raw=self.raw)
        if self.input_ids is not None:
            return sampling | {"input_ids": self.input_ids}
        messages = [message.model_dump() for message in self.messages or ()]
        return sampling | {"messages": json.dumps(messages)}

    def _gap_inputs(self) -> dict[str, InputValue]:
        inputs: dict[str, InputValue] = {}
        if self.suffix is not None:
            inputs["suffix"] = self.suffix
        if self.canvas_ids is not None:
            inputs["canvas_ids"] = self.canvas_ids
            inputs["gen_length"] = self.canvas_length
        return inputs

    def _has(self, name: str) -> bool:
        return getattr(self, name) is not None


class BatchRequest(Sampling, Queueing):
    """Several prompts, asked in the same way."""

    prompts: list[Prompt] = Field(min_length=1, description="at most DLLM_MAX_BATCH_SIZE")
    raw: bool = Field(False, description="pass the prompts as they are")

    def inputs(self) -> list[Inputs]:
        """The requests for the Triton model."""
        sampling = self.sampling_inputs()
        return [sampling | prompt_input(prompt, raw=self.raw) for prompt in self.prompts]


def prompt_input(prompt: str, *, raw: bool) -> dict[str, InputValue]:
    """A prompt as one user message, which the engine renders; or as it is."""
    if raw:
        return {"text_input": prompt}
    return {"messages": json.dumps([{"role": "user", "content": prompt}])}


class Submitted(BaseModel):
    """The ids under which results can be had."""

    request_ids: list[int]
    status: Literal["submitted"] = "submitted"


class Result(BaseModel):
    """A job as its owner sees it; `error` is there only when it failed."""

    request_id: int
    status: Literal["running", "finished", "failed", "cancelled"]
    text: str | None
    error: str | None = None

    @classmethod
    def of(cls, job: Job) -> Self:
        """Show the job; whether it waits or runs is nobody's business."""
        status = job.state if job.state.done else JobState.RUNNING
        fields: dict[str, Any] = {"request_id": job.id, "status": status.value, "text": job.text}
        if job.state is JobState.FAILED:
            fields["error"] = job.error
        return cls(**fields)


class Health(BaseModel):
    """Whether requests can be answered, and if not, why."""

    status: Literal["ok", "unavailable"]
    reason: str | None = None
