"""The possible outcomes of a job's run."""

from dataclasses import dataclass, field

from adapter.types import Event


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run ended, and why it has no result, if that is known."""

    reason: str | None = None

    @property
    def kind(self) -> str:
        """The outcome's name in log and metrics."""
        return type(self).__name__.lower()


@dataclass(frozen=True, slots=True)
class Finished(Outcome):
    """The engine sent the result."""

    event: Event = field(kw_only=True)


@dataclass(frozen=True, slots=True)
class Failed(Outcome):
    """No engine will ever run the job."""


@dataclass(frozen=True, slots=True)
class Interrupted(Outcome):
    """The engine lost the job, perhaps after it began: retry, which counts as an attempt."""


@dataclass(frozen=True, slots=True)
class Snoozed(Outcome):
    """The job did not run, through no fault of its own: requeue it without counting."""


@dataclass(frozen=True, slots=True)
class Superseded(Outcome):
    """The job is no longer this worker's: cancelled, or claimed by another one."""
