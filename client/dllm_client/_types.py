"""Types of requests and responses. `dllm` shows the descriptions as help."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any, TypedDict

if TYPE_CHECKING:
    from dllm_client._errors import DllmError

#: A text, chat messages for the checkpoint's chat template (`role` and `content`), or token ids.
Prompt = str | Sequence[Mapping[str, str]] | Sequence[int]


class Sampling(TypedDict, total=False):
    """How to generate. For a field that is absent, the server's default applies."""

    suffix: Annotated[str, "text behind the gap that is filled"]
    canvas_ids: Annotated[list[int], "the canvas, with the mask id at each position to decode"]
    # From the engine's table of sampling fields. make fields: begin
    temperature: Annotated[float, "0 picks the most probable tokens; above 0 samples"]
    gen_length: Annotated[int, "length of the canvas in tokens"]
    steps: Annotated[int, "denoising steps over the whole canvas; default: gen_length"]
    block_length: Annotated[
        int,
        "tokens per block, at most gen_length; default: 32, with alg gen_length; a "
        "block-wise model's own",
    ]
    cfg_scale: Annotated[float, "classifier-free guidance; 0 is off"]
    remasking: Annotated[
        str,
        "which positions a step commits first; default: low_confidence, or a "
        "block-wise model's own rule: low_confidence_dynamic, low_confidence, "
        "random, entropy, margin, sequential, speculative",
    ]
    confidence_threshold: Annotated[
        float,
        "commit every position at least this confident, and the best; not with alg, "
        "factor, entropy_bound, anchor_threshold",
    ]
    factor: Annotated[
        float,
        "Fast-dLLM: commit the n most confident while c_n >= 1 - factor / (n + 1); "
        "not with alg, confidence_threshold, entropy_bound, anchor_threshold",
    ]
    entropy_bound: Annotated[
        float,
        "EB-sampler: commit the least uncertain while their entropies sum to at most "
        "this; not with alg, confidence_threshold, factor, anchor_threshold",
    ]
    low_threshold: Annotated[
        float,
        "dInfer: commit the best of each run of masks, too, if above this; needs "
        "confidence_threshold",
    ]
    credit: Annotated[
        bool, "dInfer: trust tokens that stay ahead from step to step; needs confidence_threshold"
    ]
    anchor_threshold: Annotated[
        float,
        "LocalLeap: commit neighbors of positions at least this confident; not with "
        "alg, confidence_threshold, factor, entropy_bound",
    ]
    neighbor_threshold: Annotated[
        float,
        "LocalLeap: how confident a neighbor has to be; default: 0.75; needs anchor_threshold",
    ]
    alg: Annotated[
        str, "Dream's rule, instead of remasking: origin, maskgit_plus, topk_margin, entropy"
    ]
    alg_temp: Annotated[
        float, "Dream: above 0, draw positions from softmax(score / alg_temp); needs alg"
    ]
    top_p: Annotated[float, "sample from the most probable tokens that reach this sum"]
    top_k: Annotated[int, "sample from this many most probable tokens"]
    seed: Annotated[int, "repeats an answer; default: drawn at random and reported"]
    logits_eos_inf: Annotated[bool, "never choose the end-of-text token"]
    confidence_eos_eot_inf: Annotated[
        bool, "commit end-of-text and end-of-turn tokens after all others"
    ]
    stop: Annotated[list[str], "end the text before the first of these strings"]
    structured_outputs: Annotated[
        dict[str, Any],
        "the form of the text, held by construction: one of json (a schema), regex, "
        "choice (a list of strings), json_object (true); prefix and suffix put fixed "
        "text around it",
    ]
    ignore_eos: Annotated[bool, "decode the whole canvas, even after an end-of-text token"]
    logprobs: Annotated[
        int,
        "report each token's log-probability at the step that committed it, and this "
        "many of the most probable tokens there; default: off",
    ]
    reveal_steps: Annotated[bool, "report the step that committed each token"]
    cache: Annotated[
        str,
        "which keys and values are kept between steps; block-wise models: none, "
        "block: none, prefix, dual, sparse, delayed, block; default: the server's",
    ]
    retention_ratio: Annotated[
        float,
        "share of the positions outside the block that each KV head keeps; with "
        "cache sparse; default: the server's",
    ]
    pool_kernel: Annotated[
        int,
        "a position scores as the best of this many around it; odd; with cache "
        "sparse; default: the server's",
    ]
    delay_steps: Annotated[
        int,
        "steps of a block that run in full before one stores keys and values; with "
        "cache prefix, dual, sparse, delayed; default: the server's",
    ]
    refresh_interval: Annotated[
        int,
        "steps between Refreshes in a block; 0: only at its start; with cache "
        "prefix, dual, sparse, delayed; default: the server's",
    ]
    # make fields: end


class Params(Sampling, total=False):
    """The optional fields of a REST request."""

    model: Annotated[str, "one of the service's models; default: the first of them"]
    timeout: Annotated[float, "seconds after which the server gives the request up"]
    priority: Annotated[int, "1 is served first, 3 last"]
    raw: Annotated[bool, "no chat template: the model sees the prompt as it is"]


def prompt_field(prompt: Prompt) -> dict[str, Any]:
    """The prompt under the name that the REST API has for its form."""
    if isinstance(prompt, str | bytes) or not isinstance(prompt, Sequence):
        return {"prompt": prompt}
    if not prompt or not isinstance(prompt[0], Mapping):  # no ids: a text from nothing
        return {"input_ids": list(prompt)}
    return {"messages": list(prompt)}


class Status(StrEnum):
    """The states of a job."""

    RUNNING = "running"  #: queued or running
    FINISHED = "finished"  #: `text` holds the answer
    FAILED = "failed"  #: `error` says why
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens and passes of a request."""

    prompt_tokens: int
    completion_tokens: int
    steps: int
    forward_passes: int
    cached_tokens: int = 0  #: tokens of the prompt that the server's prefix cache had

    @classmethod
    def of(cls, fields: Mapping[str, int]) -> Usage:
        """Read the fields of a response; those that this release does not know are ignored."""
        return cls(**{name: fields[name] for name in cls.__slots__ if name in fields})


@dataclass(frozen=True, slots=True)
class TopLogprob:
    """One of the most probable tokens at a position."""

    token_id: int
    token: str  #: its text; a special token's name
    bytes: list[int]  #: what it adds to the text
    logprob: float


@dataclass(frozen=True, slots=True)
class TokenDetail:
    """A token of an answer, with what the request asked for; the rest is None."""

    token_id: int
    token: str  #: its text; a special token's name
    bytes: list[int]  #: what it adds to the text
    step: int | None = None  #: the step that committed it, from 1; 0 for a given token
    logprob: float | None = None  #: at that step; None for a given token
    top_logprobs: list[TopLogprob] | None = None

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> TokenDetail:
        """Read the fields of a response."""
        top = fields.get("top_logprobs")
        others = None if top is None else [TopLogprob(**other) for other in top]
        return cls(**{**fields, "top_logprobs": others})


def read_tokens(entries: Sequence[Mapping[str, Any]] | None) -> list[TokenDetail] | None:
    """The tokens in a response; None if it has none."""
    return None if entries is None else [TokenDetail.of(entry) for entry in entries]


@dataclass(frozen=True, slots=True)
class Result:
    """A job as the server saw it at one moment."""

    request_id: int
    status: Status
    text: str | None = None
    error: str | None = None
    finish_reason: str | None = None  #: `stop`, or `length` if the canvas ended before the text
    usage: Usage | None = None
    seed: int | None = None  #: what repeats the text
    created_at: float | None = None  #: when the job was submitted, in Unix seconds
    started_at: float | None = None  #: when its last run began
    finished_at: float | None = None
    #: the answer's tokens, with `logprobs` or `reveal_steps`
    tokens: list[TokenDetail] | None = None

    @property
    def done(self) -> bool:
        """Whether the job has ended."""
        return self.status is not Status.RUNNING

    @property
    def problem(self) -> str | None:
        """Why an ended job has no text, in words; None for any other."""
        if self.status is Status.FAILED:
            reason = self.error or "the server gave no reason"
            return f"job {self.request_id} failed: {reason}"
        if self.status is Status.CANCELLED:
            return f"job {self.request_id} was cancelled"
        return None


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt with fields of its own, for `map`."""

    prompt: Prompt
    params: Params = field(default_factory=Params)


@dataclass(frozen=True, slots=True)
class Outcome:
    """The outcome of one item of `map`: a result, an error, or both if its job failed."""

    index: int  #: the item's place, from 0
    result: Result | None = None
    error: DllmError | None = None

    @property
    def text(self) -> str:
        """The text. Raises the item's error if there is none."""
        if self.error is not None:
            raise self.error
        assert self.result is not None
        return self.result.text or ""


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
    detail: TokenDetail | None = None  #: with `logprobs` or `reveal_steps`


@dataclass(frozen=True, slots=True)
class Step:
    """The canvas after a denoising step."""

    step: int  #: steps run so far
    block: Block  #: the one that the next step decodes
    canvas: list[str | None]  #: what each position shows now, None where it is masked
    committed: list[Committed]  #: what is new since the step seen before
    final_text: str  #: the beginning of the answer; it will not change
    seed: int | None = None  #: what repeats the answer; None from an older server


@dataclass(frozen=True, slots=True)
class Answer:
    """The last event of a stream."""

    text: str
    finish_reason: str  #: `stop` or `length`
    usage: Usage
    seed: int  #: what repeats it
    tokens: list[TokenDetail] | None = None  #: with `logprobs` or `reveal_steps`
