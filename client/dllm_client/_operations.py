"""What each call of the client does, written once for the blocking and the asyncio client.

An operation is a generator. It yields a Call and is sent the response, or yields a Pause and is
sent nothing; what it returns is the outcome. Errors of the exchange are thrown into it. So the
rules (retries, long polling, parsing) live here, and a client only sends and sleeps.
"""

import json
import re
import time
import uuid
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import httpx

from dllm_client._errors import (
    BadRequestError,
    DllmError,
    JobCancelledError,
    JobFailedError,
    RateLimitedError,
    TimeoutError,
    UnavailableError,
    UnexpectedResponseError,
    from_response,
)
from dllm_client._types import Params, Result, Status

#: Seconds between polls of a server that does not hold them.
POLL_SECONDS = 0.1
#: Seconds a server is asked to hold a poll; proxies often cut a silent connection at 60.
HOLD_SECONDS = 30.0
#: Pauses before a call that found nobody is sent again; polls go on at the last of them.
RETRY_PAUSES = (0.1, 0.3, 1.0)
#: Seconds without an answer after which who waits without a limit is told that nobody is there.
#: A server that is started again, or moved, is back before.
OUTAGE_SECONDS = 60.0

#: What a header holds: printable ASCII characters, no space at either end.
_HEADER = re.compile(r"[!-~]([ -~]*[!-~])?")


@dataclass(frozen=True, slots=True)
class Call:
    """A request to send; `extra_time` is added to the client's time limit for the answer."""

    method: str
    path: str
    json: dict[str, Any] | None = None
    query: dict[str, str] = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict)
    extra_time: float = 0.0

    def __post_init__(self) -> None:
        """Raises BadRequestError, naming the field, for what JSON has no way to say."""
        for name, value in (self.json or {}).items():
            try:
                json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
            except (TypeError, ValueError) as error:  # no type of JSON, or NaN, or half a character
                raise BadRequestError(f"{name}: {error}", 400, name) from error


@dataclass(frozen=True, slots=True)
class Pause:
    """A time to sleep."""

    seconds: float


T = TypeVar("T")
Step = Call | Pause
Operation = Generator[Step, httpx.Response | None, T]


def header(name: str, value: str) -> str:
    """The value, if a header can hold it; raises BadRequestError for the field `name` if not."""
    if not _HEADER.fullmatch(value):
        # Without the value: it may be a secret.
        raise BadRequestError(f"{name}: must be printable ASCII characters", 400, name)
    return value


def submit(prompt: str, params: Params, key: str | None = None) -> Operation[int]:
    """Queue one prompt; the id of its job."""
    body = yield from _submit("/v1/generate", {"prompt": prompt, **params}, key)
    return _request_ids(body, 1)[0]


def submit_batch(
    prompts: Sequence[str], params: Params, key: str | None = None
) -> Operation[list[int]]:
    """Queue several prompts, all or none; the ids of their jobs, in order."""
    body = yield from _submit("/v1/generate_batch", {"prompts": list(prompts), **params}, key)
    return _request_ids(body, len(prompts))


def result(request_id: int) -> Operation[Result]:
    """The job as it is now."""
    body = yield from _send_again(Call("GET", f"/v1/result/{request_id}"))
    return _result_of(body)


def cancel(request_id: int) -> Operation[Result]:
    """Cancel the job; how it is afterwards."""
    body = yield from _send(Call("DELETE", f"/v1/result/{request_id}"))
    return _result_of(body)


def health() -> Operation[str]:
    """What the server says of itself; raises UnavailableError with its reason when not ready."""
    body = yield from _send(Call("GET", "/v1/health"))
    if not isinstance(body, dict) or not isinstance(body.get("status"), str):
        raise UnexpectedResponseError(f"not a health report: {body!r}")
    return str(body["status"])


def wait(request_id: int, timeout: float | None) -> Operation[Result]:
    """The job once it is finished; see Client.wait."""
    try:
        return (yield from _wait(request_id, timeout))
    except DllmError as error:
        error.request_id = request_id
        raise


def wait_all(
    request_ids: Sequence[int], timeout: float | None, on_done: Callable[[], None]
) -> Operation[list[Result]]:
    """All jobs once they are finished, in order; `on_done` is called after each."""
    deadline = None if timeout is None else time.monotonic() + timeout
    results = []
    for request_id in request_ids:
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        results.append((yield from wait(request_id, left)))
        on_done()
    return results


def generate(prompt: str, params: Params, timeout: float | None) -> Operation[str]:
    """Submit and wait; the text."""
    request_id = yield from submit(prompt, params)
    return _text((yield from wait(request_id, timeout)))


def generate_batch(
    prompts: Sequence[str], params: Params, timeout: float | None, on_done: Callable[[], None]
) -> Operation[list[str]]:
    """Submit all and wait for all; the texts, in order."""
    request_ids = yield from submit_batch(prompts, params)
    results = yield from wait_all(request_ids, timeout, on_done)
    return [_text(item) for item in results]


def _send(call: Call) -> Operation[Any]:
    """The JSON body of a successful answer; raises what stands for any other."""
    response = yield call
    assert response is not None
    if not response.is_success:
        raise from_response(response)
    try:
        return response.json()
    except ValueError as error:
        raise UnexpectedResponseError(f"{response.url} did not answer with JSON") from error


def _submit(path: str, body: dict[str, Any], key: str | None) -> Operation[Any]:
    """The answer of a submission, which the key allows to be sent twice."""
    chosen = header("idempotency_key", key) if key else uuid.uuid4().hex
    headers = {"Idempotency-Key": chosen}
    return (yield from _send_again(Call("POST", path, json=body, headers=headers)))


def _send_again(call: Call) -> Operation[Any]:
    """Like _send, trying again when nobody answers; for calls that may be made twice."""
    for pause in RETRY_PAUSES:
        try:
            return (yield from _send(call))
        except UnavailableError:
            yield Pause(pause)
    return (yield from _send(call))


def _wait(request_id: int, timeout: float | None) -> Operation[Result]:
    """Poll until the job is done. It outlives a restart of its server, and so does this."""
    deadline = None if timeout is None else time.monotonic() + timeout
    trouble: DllmError | None = None  # why there was no answer the last time
    lost = 0.0  # since when there is none
    pauses = iter(RETRY_PAUSES)
    while True:
        begun = time.monotonic()
        left = HOLD_SECONDS if deadline is None else max(0.0, deadline - begun)
        # Not held after a failure: a proxy may have cut the last one for its silence.
        hold = min(HOLD_SECONDS, left) if trouble is None else 0.0
        pause = POLL_SECONDS
        try:
            current = yield from _poll(request_id, hold)
        except RateLimitedError as error:
            trouble, pause = None, error.retry_after or 1.0
        except (UnavailableError, TimeoutError) as error:
            if trouble is None:
                lost, pauses = time.monotonic(), iter(RETRY_PAUSES)
            trouble, pause = error, next(pauses, RETRY_PAUSES[-1])
        else:
            if current.done:
                return _finished(current)
            trouble = None
        now = time.monotonic()
        if deadline is not None and now >= deadline:
            reason = f": {trouble}" if trouble else ""
            message = f"job {request_id} was not finished after {timeout:g} s{reason}"
            raise TimeoutError(message) from trouble
        if deadline is None and trouble and now - lost >= OUTAGE_SECONDS:
            message = f"no word of job {request_id} for {OUTAGE_SECONDS:g} s: {trouble}"
            raise UnavailableError(message) from trouble
        pause = max(0.0, pause - (now - begun))
        yield Pause(pause if deadline is None else min(pause, deadline - now))


def _poll(request_id: int, hold: float) -> Operation[Result]:
    query = {"wait": f"{hold:g}"}
    call = Call("GET", f"/v1/result/{request_id}", query=query, extra_time=hold)
    return _result_of((yield from _send(call)))


def _request_ids(body: Any, count: int) -> list[int]:
    match body:
        case {"request_ids": [*ids]} if len(ids) == count and all(type(i) is int for i in ids):
            return list(ids)
        case _:
            raise UnexpectedResponseError(f"expected {count} request ids, not {body!r}")


def _finished(result: Result) -> Result:
    if result.status is Status.FAILED:
        reason = result.error or "the server gave no reason"
        raise JobFailedError(f"job {result.request_id} failed: {reason}", result)
    if result.status is Status.CANCELLED:
        raise JobCancelledError(f"job {result.request_id} was cancelled", result)
    return result


def _text(result: Result) -> str:
    if result.text is None:
        raise UnexpectedResponseError(f"job {result.request_id} is finished without a text")
    return result.text


def _result_of(data: Any) -> Result:
    """The job in a response; fields unknown are ignored."""
    try:
        return Result(
            request_id=int(data["request_id"]),
            status=Status(data["status"]),
            text=data["text"],
            error=data.get("error"),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UnexpectedResponseError(f"not a job: {data!r}") from error
