"""The adapter's errors as one tree, each with its HTTP status.

AdapterError
  SettingsError          a setting is invalid
  Unauthorized           the API key is missing or unknown
  RateLimited            too many calls in too short a time
  BodyTooLarge           the body exceeds its limit
  BodyTooManyValues      the body holds more values than any call may have
  BodyTimeout            the body takes too long to arrive
  NotJson                the body is of another type than JSON
  TooManyBodies          the worker is reading as many bodies as it may
  InvalidRequest         the engine refuses the request's values
    ContextExceeded        the prompt leaves no room for an answer
  KeyReused              the Idempotency-Key belongs to another submission
  UnknownModel           no tritonserver has a model of that name
  JobNotFound            no such job, or its result has expired
  TooManyJobs            the queue of jobs is full
  TooManyCalls           the worker serves as many calls as it may
  DeadlineExceeded       the request's `timeout` is over
  ClientDisconnected     the client closed the connection
  WorkerStops            the worker has to end before the call is answered
  StoreUnavailable       the database does not answer
  EngineError            the engine could not answer
    Overloaded             its queue is full
    Unavailable            it is unreachable or still loading
      EngineDraining         it is shutting down and did not run the request
      ConnectionLost         its connection broke: it may have begun the request
    EngineDead             its process has died
    EngineFailure          it reported an internal error
    StreamInterrupted      the stream ended without a result
"""

import re
from collections.abc import Mapping
from typing import ClassVar

#: What an engine says of a request that is longer than the model's context.
CONTEXT_EXCEEDED = re.compile(
    r"prompt \(\d+ tokens\) plus gen_length|has more than the \d+ tokens|must be at most \d+ ids"
)


class AdapterError(Exception):
    """Base of the adapter's errors; its text is written for the user."""

    status: ClassVar[int] = 500
    #: Seconds after which a retry may succeed.
    retry_after: int | None = None

    @property
    def headers(self) -> Mapping[str, str]:
        """Headers of the response."""
        return {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}


class SettingsError(AdapterError):
    """A setting does not parse, or contradicts another."""


class Unauthorized(AdapterError):
    """The API key is missing or unknown."""

    status = 401

    @property
    def headers(self) -> Mapping[str, str]:
        """The authentication scheme, which HTTP requires."""
        return {"WWW-Authenticate": "Bearer"}


class RateLimited(AdapterError):
    """Too many calls in too short a time."""

    status = 429

    def __init__(self, message: str, *, retry_after: int) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class BodyTooLarge(AdapterError):
    """The body exceeds its limit."""

    status = 413


class BodyTooManyValues(AdapterError):
    """The body holds more values than any call may have."""

    status = 413


class BodyTimeout(AdapterError):
    """The body takes too long to arrive."""

    status = 408

    @property
    def headers(self) -> Mapping[str, str]:
        """The rest of the body is not read, so the connection serves no further call."""
        return {"Connection": "close"}


class NotJson(AdapterError):
    """The body is of another type than JSON."""

    status = 415


class TooManyBodies(AdapterError):
    """The worker is reading as many bodies as it may."""

    status = 503
    retry_after = 1

    @property
    def headers(self) -> Mapping[str, str]:
        """The rest of the body is not read, so the connection serves no further call."""
        return {**super().headers, "Connection": "close"}


class InvalidRequest(AdapterError):
    """The engine refuses the request's values; the text is an input's name, a colon, a reason."""

    status = 422

    def __init__(self, message: str, *, prompt: int | None = None) -> None:
        super().__init__(message)
        #: Index of the prompt among several; None if it concerns all, or the only one.
        self.prompt = prompt


class ContextExceeded(InvalidRequest):
    """The prompt leaves no room for an answer in the model's context."""


def refusal(reason: str) -> InvalidRequest:
    """The error for an engine's refusal in these words."""
    return ContextExceeded(reason) if CONTEXT_EXCEEDED.search(reason) else InvalidRequest(reason)


class KeyReused(AdapterError):
    """The Idempotency-Key belongs to another submission."""

    status = 422


class UnknownModel(AdapterError):
    """No tritonserver has a model of that name."""

    status = 404


class JobNotFound(AdapterError):
    """No such job, or its result has expired."""

    status = 404


class TooManyJobs(AdapterError):
    """The queue of jobs is full."""

    status = 429
    retry_after = 5


class TooManyCalls(AdapterError):
    """The worker serves as many calls as it may."""

    status = 429
    retry_after = 1


class DeadlineExceeded(AdapterError):
    """The request's `timeout` is over."""

    status = 408

    @property
    def headers(self) -> Mapping[str, str]:
        """OpenAI's clients retry a 408 unless this header says not to."""
        return {"x-should-retry": "false"}


class ClientDisconnected(AdapterError):
    """The client closed the connection; the response is never read."""

    status = 499


class WorkerStops(AdapterError):
    """The worker has to end before the call is answered."""

    status = 503
    retry_after = 1


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
    """Triton is unreachable, or the model is not loaded."""

    status = 503
    retry_after = 5


class EngineDraining(Unavailable):
    """The engine is shutting down and reports that it did not run the request."""


class ConnectionLost(Unavailable):
    """The connection broke after the request was sent; tritonserver may have ended."""


class EngineDead(EngineError):
    """The model's process has died; Triton does not start it again by itself."""

    status = 503
    retry_after = 5


class EngineFailure(EngineError):
    """The engine answered with an error that is not the request's fault."""


class StreamInterrupted(EngineError):
    """The stream of a request ended before its result."""
