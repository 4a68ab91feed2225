"""What a job is: its states, and what is known about it."""

from dataclasses import dataclass
from enum import StrEnum

from adapter.types import DEFAULT_PRIORITY, Inputs


class JobState(StrEnum):
    """Where a job is in its life."""

    #: Waiting for a worker.
    QUEUED = "queued"
    #: A worker drives it, for as long as it renews the lease.
    RUNNING = "running"
    #: There is a text.
    FINISHED = "finished"
    #: There is an error, and there will be no text.
    FAILED = "failed"
    #: Somebody did not want it any more.
    CANCELLED = "cancelled"

    @property
    def done(self) -> bool:
        """Nothing changes any more."""
        return self not in UNDONE


UNDONE = frozenset({JobState.QUEUED, JobState.RUNNING})


@dataclass(frozen=True, slots=True)
class Terms:
    """On what terms a call submits its jobs."""

    #: 1 is first, 3 last.
    priority: int = DEFAULT_PRIORITY
    #: Seconds after which the job is not wanted any more.
    timeout: float | None = None
    #: Name of the key it was submitted with; it is that key's alone.
    api_key: str | None = None
    #: `X-Request-ID` of the call.
    request_id: str | None = None
    #: W3C trace context of the call.
    traceparent: str | None = None


STANDARD_TERMS = Terms()


@dataclass(frozen=True, slots=True)
class Job:
    """One row, as far as anybody needs it."""

    id: int
    state: JobState
    #: Runs that the engine began and lost.
    attempts: int
    text: str | None
    error: str | None
    #: What the engine calls it; None while no worker drives it.
    engine_request_id: str | None = None


@dataclass(frozen=True, slots=True)
class ClaimedJob:
    """A job that this worker drives from now on."""

    id: int
    owner: str
    inputs: Inputs
    attempts: int
    terms: Terms = STANDARD_TERMS
    #: Workers that have lost it.
    orphaned: int = 0
    #: Seconds until its deadline.
    time_left: float | None = None
    #: Seconds since it was submitted.
    waited: float = 0.0

    @property
    def engine_request_id(self) -> str:
        """What Triton and the engine call it."""
        return engine_request_id(
            self.id, self.terms.request_id, self.owner, self.attempts, self.orphaned
        )


def engine_request_id(
    job_id: int, request_id: str | None, owner: str, attempts: int, orphaned: int
) -> str:
    """What Triton and the engine call a run of a job: by this any worker can cancel it there.

    The job and the call that submitted it, for whoever reads the log; the worker, the attempt and
    how many workers have lost it, this one maybe, so that it is this run's alone.
    """
    call = f"-{request_id}" if request_id else ""
    return f"{job_id}{call}-{owner}-{attempts}-{orphaned}"


def late(timeout: float) -> str:
    """The error of a job that was not done by its deadline."""
    # Differences of points in time are as exact as these: some tenths of a microsecond.
    return f"timeout: the job was not done within {round(timeout, 4):g} s"
