"""What is sent and what comes back."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Self, TypedDict

from dllm_client._errors import UnexpectedResponseError


class Sampling(TypedDict, total=False):
    """How to generate; what is absent takes the server's default."""

    temperature: float
    gen_length: int
    steps: int
    block_length: int
    cfg_scale: float
    remasking: str
    confidence_threshold: float
    top_p: float
    top_k: int
    seed: int
    stop: list[str]
    ignore_eos: bool
    cache: str
    retention_ratio: float


class Params(Sampling, total=False):
    """The optional fields of a REST request."""

    raw: bool  #: do not wrap the prompt in the checkpoint's chat template


class Status(StrEnum):
    """The states of a job."""

    RUNNING = "running"  #: waiting or at work
    FINISHED = "finished"  #: `text` is there
    FAILED = "failed"  #: `error` says why
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True)
class Usage:
    """What a request cost; a count the server does not report is None."""

    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    steps: int | None = None
    forward_passes: int | None = None

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        return cls(**{name: data.get(name) for name in cls.__slots__})


@dataclass(frozen=True, slots=True)
class Result:
    """A job as the server saw it at one moment."""

    request_id: int
    status: Status
    text: str | None = None
    error: str | None = None
    finish_reason: str | None = None
    seed: int | None = None
    usage: Usage | None = None

    @property
    def done(self) -> bool:
        """Will this job change no more?"""
        return self.status is not Status.RUNNING

    @classmethod
    def from_json(cls, data: Any) -> Self:
        """Raises UnexpectedResponseError when `data` is not a job; ignores fields it does not know.

        The only strict fields are the three that the API has always had.
        """
        try:
            return cls(
                request_id=int(data["request_id"]),
                status=Status(data["status"]),
                text=data["text"],
                error=data.get("error"),
                finish_reason=data.get("finish_reason"),
                seed=data.get("seed"),
                usage=Usage.from_json(data["usage"]) if data.get("usage") else None,
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UnexpectedResponseError(f"not a job: {data!r}") from error
