"""What can become of a job that was driven through the engine."""

from dataclasses import dataclass

from adapter.types import Event


@dataclass(frozen=True, slots=True)
class Finished:
    """There is a result."""

    event: Event


@dataclass(frozen=True, slots=True)
class Failed:
    """No engine will ever run it."""

    error: str


@dataclass(frozen=True, slots=True)
class Lost:
    """The engine began it, perhaps, and lost it: run it again, up to a number of times."""

    reason: str


@dataclass(frozen=True, slots=True)
class Postponed:
    """It never ran, for no fault of its own: run it later."""

    reason: str


@dataclass(frozen=True, slots=True)
class Dropped:
    """It is no longer ours: cancelled, or taken up by another worker."""


Outcome = Finished | Failed | Lost | Postponed | Dropped


def kind_of(outcome: Outcome) -> str:
    """For log and metrics."""
    return type(outcome).__name__.lower()


def reason_of(outcome: Outcome) -> str | None:
    """Why there is no result, if that is known."""
    match outcome:
        case Failed(reason) | Lost(reason) | Postponed(reason):
            return reason
        case _:
            return None
