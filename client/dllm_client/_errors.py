"""Everything this package raises.

DllmError
 ├─ UnavailableError          no server answers, or it cannot serve now (502 to 504)
 ├─ TimeoutError              no answer, or no finished job, within the time allowed
 ├─ ResponseError             the server refused; `status` is the HTTP status
 │   ├─ BadRequestError       a value is wrong (400, 413, 422); `field` names it where known;
 │   │                        also a value that cannot be sent (this package refuses it, 400)
 │   ├─ AuthenticationError   no key, or not the right one (401, 403)
 │   ├─ NotFoundError         no such job, or its result has expired (404)
 │   ├─ RateLimitedError      too much at once (429); `retry_after` in seconds
 │   └─ ServerError           a fault on the server's side (other 5xx)
 ├─ JobError                  the job ended without a text; `result` holds it
 │   ├─ JobFailedError
 │   └─ JobCancelledError
 ├─ StreamError               a stream ended before its answer; the message says why
 └─ UnexpectedResponseError   an answer that this API does not have

An error that ends the wait for a job has the job's id as `request_id`: you can wait for it again.

Errors of httpx are turned into these in `from_transport`, errors of tritonclient in
`dllm_client.triton`, and nowhere else.
"""

from __future__ import annotations

import builtins
from typing import Any

import httpx

from dllm_client._types import Result

UNAVAILABLE = frozenset({502, 503, 504})


class DllmError(Exception):
    """Base of all errors of this package."""

    request_id: int | None = None  #: the job that was waited for; it may go on running


class UnavailableError(DllmError):
    """No server answers, or it cannot serve now; trying again later may help."""


class TimeoutError(DllmError, builtins.TimeoutError):
    """The time limit has passed. A job that was waited for goes on running."""


class ResponseError(DllmError):
    """The server refused the request."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class BadRequestError(ResponseError):
    """A value of the request is wrong."""

    def __init__(
        self,
        message: str,
        status: int,
        field: str | None = None,
        max_length: int | None = None,
    ) -> None:
        super().__init__(message, status)
        self.field = field
        self.max_length = max_length  #: the limit, where the field is too long and the server says


class AuthenticationError(ResponseError):
    """The API key is missing or not accepted."""


class NotFoundError(ResponseError):
    """There is no such job (any more)."""


class RateLimitedError(ResponseError):
    """Too many requests, or a full queue."""

    def __init__(self, message: str, status: int, retry_after: float | None = None) -> None:
        super().__init__(message, status)
        self.retry_after = retry_after


class ServerError(ResponseError):
    """The server has a fault."""


class JobError(DllmError):
    """The job ended without a text."""

    def __init__(self, message: str, result: Result) -> None:
        super().__init__(message)
        self.result = result
        self.request_id = result.request_id


class JobFailedError(JobError):
    """The server gave up on the job."""


class JobCancelledError(JobError):
    """The job was cancelled."""


class StreamError(DllmError):
    """The stream ended without an answer; the message has the server's reason, if it sent one."""


class UnexpectedResponseError(DllmError):
    """The answer does not follow the API; perhaps another service listens there."""


def from_transport(error: httpx.HTTPError | httpx.InvalidURL, url: str) -> DllmError:
    """The error for a failed exchange with `url`."""
    # A server that no connection can be made to is unavailable, not slow.
    if isinstance(error, httpx.TimeoutException) and not isinstance(error, httpx.ConnectTimeout):
        return TimeoutError(f"{url} did not answer in time ({type(error).__name__})")
    reason = str(error) or type(error).__name__
    return UnavailableError(f"cannot reach {url}: {reason}")


def from_response(response: httpx.Response) -> DllmError:
    """The error for a response whose status is not a success."""
    status = response.status_code
    field, reason = _reason(response)
    message = f"{field}: {reason}" if field else reason
    if status == 408:
        return TimeoutError(message)
    if status in UNAVAILABLE:
        return UnavailableError(message)
    if status in (401, 403):
        return AuthenticationError(message, status)
    if status == 404:
        return NotFoundError(message, status)
    if status == 429:
        return RateLimitedError(message, status, _retry_after(response))
    if 400 <= status < 500:
        return BadRequestError(message, status, field, _max_length(response))
    if status >= 500:
        return ServerError(message, status)
    return UnexpectedResponseError(f"status {status} instead of an answer: is this the right URL?")


def _retry_after(response: httpx.Response) -> float | None:
    try:
        return float(response.headers["Retry-After"])
    except (KeyError, ValueError):  # absent, or a date
        return None


def _reason(response: httpx.Response) -> tuple[str | None, str]:
    """The field that is wrong, where the body names one, and the reason in words."""
    fallback = f"HTTP {response.status_code} {response.reason_phrase}".strip()
    try:
        body = response.json()
    except ValueError:
        return None, fallback
    if not isinstance(body, dict):
        return None, fallback
    detail = body.get("detail") or body.get("error") or body.get("message") or body.get("reason")
    return _parse_detail(detail, fallback)


def _max_length(response: httpx.Response) -> int | None:
    """The longest that the wrong field may be, if the body has that."""
    try:
        limit = response.json()["detail"][0]["ctx"]["max_length"]
    except (ValueError, TypeError, LookupError):
        return None
    return limit if type(limit) is int else None


def _parse_detail(detail: Any, fallback: str) -> tuple[str | None, str]:
    match detail:
        case str():
            return None, detail
        case [{"msg": str(reason), "loc": [_, *path]}, *_]:  # as FastAPI reports it
            return ".".join(str(part) for part in path) or None, reason
        case {"message": str(reason)}:  # as OpenAI reports it
            param = detail.get("param")
            return (str(param) if param else None), reason
        case _:
            return None, fallback
