"""What can go wrong, as one small tree, and the HTTP status of each kind.

AdapterError
  SettingsError        the environment holds a value that makes no sense
  Unauthorized         a key is needed, and this is none
  RateLimited          too many calls in too short a time
  BodyTooLarge         more bytes than are read
  InvalidRequest       the engine refuses the values of a request
  KeyReused            the Idempotency-Key stands for another submission
  JobNotFound          no such job, or its result has expired
  TooManyJobs          the queue is full: come back later
  TooManyCalls         as many calls as may wait for their answers: come back later
  DeadlineExceeded     the time that the request gave itself is over
  CallerGone           whoever asked has hung up
  StoreUnavailable     the database does not answer
  EngineError          the engine could not answer
    Overloaded           its queue is full
    Unavailable          not there, or still loading
      EngineDraining         it is about to end, and has not run the request
    EngineDead           its process has died
    EngineFailure        it answered with an error of its own
    StreamInterrupted           the stream ended without a result
    ModelControlRefused  this server lets nobody load models
"""

from collections.abc import Mapping
from typing import ClassVar


class AdapterError(Exception):
    """Base of all errors of the adapter; its text is meant for the user."""

    status: ClassVar[int] = 500
    #: Seconds after which the same call may be answered otherwise.
    retry_after: int | None = None

    @property
    def headers(self) -> Mapping[str, str]:
        """What the answer says beside its body."""
        return {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}


class SettingsError(AdapterError):
    """A setting does not parse, or contradicts another."""


class Unauthorized(AdapterError):
    """A key is needed, and this is none."""

    status = 401

    @property
    def headers(self) -> Mapping[str, str]:
        """The scheme, which HTTP asks for."""
        return {"WWW-Authenticate": "Bearer"}


class RateLimited(AdapterError):
    """Too many calls in too short a time."""

    status = 429

    def __init__(self, message: str, *, retry_after: int) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class BodyTooLarge(AdapterError):
    """More bytes than are read."""

    status = 413


class InvalidRequest(AdapterError):
    """The engine refuses the values of a request: an input's name, a colon, and why."""

    status = 422

    def __init__(self, message: str, *, prompt: int | None = None) -> None:
        super().__init__(message)
        #: Which of several prompts it is about; None: all, or the only one.
        self.prompt = prompt


class KeyReused(AdapterError):
    """The Idempotency-Key stands for another submission."""

    status = 422


class JobNotFound(AdapterError):
    """No such job, or its result has expired."""

    status = 404


class TooManyJobs(AdapterError):
    """The queue of jobs is full."""

    status = 429
    retry_after = 5


class TooManyCalls(AdapterError):
    """As many calls as may are waiting for their answers."""

    status = 429
    retry_after = 1


class DeadlineExceeded(AdapterError):
    """The time that the request gave itself is over."""

    status = 408

    @property
    def headers(self) -> Mapping[str, str]:
        """OpenAI's clients repeat what is answered 408 unless they are told not to."""
        return {"x-should-retry": "false"}


class CallerGone(AdapterError):
    """Whoever asked has hung up; nobody will read this."""

    status = 499


class StoreUnavailable(AdapterError):
    """The database does not answer."""

    status = 503
    retry_after = 5


class EngineError(AdapterError):
    """The engine could not answer a request."""

    status = 502


class Overloaded(EngineError):
    """The engine's queue is full, or the request waited in it for too long."""

    status = 429
    retry_after = 5


class Unavailable(EngineError):
    """Triton is away, or the model is not loaded."""

    status = 503
    retry_after = 5


class EngineDraining(Unavailable):
    """The engine is about to end, and says itself that it has not run the request."""


class EngineDead(EngineError):
    """The model's process has died; Triton does not start it again by itself."""

    status = 503
    retry_after = 5


class EngineFailure(EngineError):
    """The engine answered with an error that is not the request's fault."""


class StreamInterrupted(EngineError):
    """The stream of a request ended before its result."""


class ModelControlRefused(EngineError):
    """Triton runs without `--model-control-mode=explicit`."""
