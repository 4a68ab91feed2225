"""What is sent and what comes back."""

from dataclasses import dataclass
from enum import StrEnum
from typing import TypedDict


class Sampling(TypedDict, total=False):
    """How to generate; what is absent takes the server's default."""

    suffix: str  #: text behind the gap
    canvas_ids: list[int]
    temperature: float
    gen_length: int
    steps: int
    block_length: int
    cfg_scale: float
    remasking: str
    confidence_threshold: float
    factor: float
    entropy_bound: float
    low_threshold: float
    credit: bool
    anchor_threshold: float
    neighbor_threshold: float
    alg: str
    alg_temp: float
    top_p: float
    top_k: int
    seed: int
    logits_eos_inf: bool
    confidence_eos_eot_inf: bool
    stop: list[str]
    ignore_eos: bool
    cache: str
    retention_ratio: float
    pool_kernel: int
    delay_steps: int
    refresh_interval: int


class Params(Sampling, total=False):
    """The optional fields of a REST request."""

    timeout: float  #: seconds after which the server gives it up
    priority: int  #: 1 is served first, 3 last
    raw: bool  #: do not wrap the prompt in the checkpoint's chat template


class Status(StrEnum):
    """The states of a job."""

    RUNNING = "running"  #: waiting or at work
    FINISHED = "finished"  #: `text` is there
    FAILED = "failed"  #: `error` says why
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True)
class Result:
    """A job as the server saw it at one moment."""

    request_id: int
    status: Status
    text: str | None = None
    error: str | None = None

    @property
    def done(self) -> bool:
        """Will this job change no more?"""
        return self.status is not Status.RUNNING


@dataclass(frozen=True, slots=True)
class Block:
    """A block of the canvas; `end` is the position behind its last one."""

    index: int
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Committed:
    """A position that was decoded, for good."""

    position: int
    token_id: int
    text: str  #: what it adds to the text
    confidence: float


@dataclass(frozen=True, slots=True)
class Step:
    """The canvas after a denoising step."""

    step: int  #: steps run so far
    block: Block  #: the one that the next step decodes
    canvas: list[str | None]  #: what each position shows now, None where it is masked
    committed: list[Committed]  #: what is new since the step seen before
    final_text: str  #: the beginning of the answer; it will not change


@dataclass(frozen=True, slots=True)
class Usage:
    """What a request cost."""

    prompt_tokens: int
    completion_tokens: int
    steps: int
    forward_passes: int


@dataclass(frozen=True, slots=True)
class Answer:
    """The last event of a stream."""

    text: str
    finish_reason: str  #: `stop` or `length`
    usage: Usage
    seed: int  #: what repeats it
