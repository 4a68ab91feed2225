"""A job: its states, and the data about it that other modules need."""

from dataclasses import dataclass, field
from enum import StrEnum

from adapter.types import DEFAULT_PRIORITY, Inputs, TokenDetail, Usage


class JobState(StrEnum):
    """A job's state; docs/architecture.md draws the transitions."""

    #: Waits for a worker to claim it.
    QUEUED = "queued"
    #: A worker runs it, for as long as it renews the lease.
    RUNNING = "running"
    #: Final: it has a text.
    FINISHED = "finished"
    #: Final: it has an error and no text.
    FAILED = "failed"
    #: Final: a client cancelled it.
    CANCELLED = "cancelled"

    @property
    def done(self) -> bool:
        """Whether the state is final."""
        return self not in ACTIVE


ACTIVE = frozenset({JobState.QUEUED, JobState.RUNNING})


@dataclass(frozen=True, slots=True)
class JobOptions:
    """How a call submits its jobs."""

    #: 1 is first, 3 last.
    priority: int = DEFAULT_PRIORITY
    #: Seconds from submission to the deadline; None: no deadline.
    timeout: float | None = None
    #: Name of the API key that owns the job.
    api_key: str | None = None
    #: `X-Request-ID` of the call.
    request_id: str | None = None
    #: W3C trace context of the call.
    traceparent: str | None = None
    #: Name of the model at Triton; None: the default one.
    model: str | None = None


DEFAULT_OPTIONS = JobOptions()


@dataclass(frozen=True, slots=True)
class JobDetails:
    """When a job ran, and what the engine tells about its result; None for what is unknown.

    Times are in Unix seconds.
    """

    created_at: float | None = None
    #: When its last run began.
    started_at: float | None = None
    finished_at: float | None = None
    finish_reason: str | None = None
    usage: Usage | None = None
    seed: int | None = None
    #: See `Event.tokens`.
    tokens: list[TokenDetail] | None = None


@dataclass(frozen=True, slots=True)
class Job:
    """A job as clients see it."""

    id: int
    state: JobState
    #: Runs that the engine began and lost.
    attempts: int
    text: str | None
    error: str | None
    #: Its id in the engine; None while no worker runs it.
    engine_request_id: str | None = None
    details: JobDetails = field(default=JobDetails(), compare=False)


@dataclass(frozen=True, slots=True)
class ClaimedJob:
    """A job that a worker has claimed and will run.

    Owner, attempts, rescues and the time tell this claim from every other one of the job.
    """

    id: int
    owner: str
    inputs: Inputs
    attempts: int
    options: JobOptions = DEFAULT_OPTIONS
    #: How often another worker took it over after its worker's lease expired.
    num_rescues: int = 0
    #: Seconds until its deadline.
    time_left: float | None = None
    #: Seconds since it was submitted.
    waited: float = 0.0
    #: When it was submitted and when it was claimed, in Unix seconds.
    created_at: float = field(default=0.0, compare=False)
    claimed_at: float = field(default=0.0, compare=False)

    @property
    def engine_request_id(self) -> str:
        """Its id in Triton and in the engine."""
        return engine_request_id(
            self.id, self.options.request_id, self.owner, self.attempts, self.num_rescues
        )


def engine_request_id(
    job_id: int, request_id: str | None, owner: str, attempts: int, num_rescues: int
) -> str:
    """The id of one run in Triton and in the engine; any worker can cancel the run by it.

    Job and `X-Request-ID` make it readable in the log. Worker, attempts and rescues make it unique
    to this run.
    """
    call = f"-{request_id}" if request_id else ""
    return f"{job_id}{call}-{owner}-{attempts}-{num_rescues}"


def timeout_message(timeout: float) -> str:
    """The error of a job that missed its deadline."""
    # Differences of timestamps are exact to some tenths of a microsecond.
    return f"timeout: the job was not done within {round(timeout, 4):g} s"
