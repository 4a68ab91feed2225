"""What each call of the client does, written once for the blocking and the asyncio client.

An operation is a generator. It yields a Call and is sent the response, or yields a Pause and is
sent nothing. Its return value is the result. Errors of the exchange are thrown into it. So the
rules (retries, long polling, parsing) live here, and a client only sends and sleeps.
"""

import json
import re
import time
import uuid
from collections import deque
from collections.abc import Callable, Collection, Generator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

import httpx

from dllm_client._errors import (
    BadRequestError,
    DllmError,
    JobCancelledError,
    JobError,
    JobFailedError,
    RateLimitedError,
    TimeoutError,
    UnavailableError,
    UnexpectedResponseError,
    from_response,
)
from dllm_client._types import (
    Params,
    Prompt,
    Result,
    Status,
    Usage,
    prompt_field,
    read_tokens,
)

#: Seconds between polls of a server that does not hold them.
POLL_SECONDS = 0.1
#: Seconds a server is asked to hold a poll; proxies often close a silent connection after 60.
HOLD_SECONDS = 30.0
#: Pauses before a call that got no answer is retried; polls go on with the last one.
RETRY_PAUSES = (0.1, 0.3, 1.0)
#: Seconds without an answer after which waiting without a time limit ends. A server that is
#: restarted or moved is back earlier.
OUTAGE_SECONDS = 60.0
#: Prompts per call while the server has not named a lower limit.
BATCH_SIZE = 64

#: A header's value: printable ASCII characters, no space at either end.
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
            # No type of JSON, NaN, half a character, or nested too deep.
            except (TypeError, ValueError, RecursionError) as error:
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


def submit(prompt: Prompt, params: Params, key: str | None = None) -> Operation[int]:
    """Queue one prompt; the id of its job."""
    body = yield from _submit("/v1/generate", {**prompt_field(prompt), **params}, key)
    return _request_ids(body, 1)[0]


def submit_batch(
    prompts: Sequence[str], params: Params, key: str | None = None
) -> Operation[list[int]]:
    """Queue several prompts, all or none; the ids of their jobs, in order."""
    if isinstance(prompts, str):
        raise BadRequestError("prompts: must be a list of texts, not one text", 400, "prompts")
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
    """The server's status; raises UnavailableError with its reason when it is not ready."""
    body = yield from _send(Call("GET", "/v1/health"))
    if not isinstance(body, dict) or not isinstance(body.get("status"), str):
        raise UnexpectedResponseError(f"not a health report: {body!r}")
    return str(body["status"])


def models() -> Operation[list[str]]:
    """The names of the models that OpenAI's calls may ask for."""
    body = yield from _send_again(Call("GET", "/v1/models"))
    match body:
        case {"data": [*data]} if all(isinstance(m, dict) and "id" in m for m in data):
            return [str(model["id"]) for model in data]
        case _:
            raise UnexpectedResponseError(f"not a list of models: {body!r}")


def wait(request_id: int, timeout: float | None) -> Operation[Result]:
    """The job once it is finished; see Client.wait."""
    try:
        return (yield from _wait(request_id, timeout))
    except DllmError as error:
        error.request_id = request_id
        raise


def generate(prompt: Prompt, params: Params, timeout: float | None) -> Operation[str]:
    """Submit and wait; the text."""
    request_id = yield from submit(prompt, params)
    return _text((yield from wait(request_id, timeout)))


def generate_batch(
    prompts: Sequence[str], params: Params, timeout: float | None, on_done: Callable[[], None]
) -> Operation[list[str]]:
    """Run all prompts; the texts, in order. Raises for the first job that fails."""

    def check(result: Result) -> None:
        _finished(result)
        on_done()

    results = yield from run_batch(prompts, params, timeout, on_result=check)
    return [_text(item) for item in results]


def run_batch(
    prompts: Sequence[str],
    params: Params,
    timeout: float | None,
    *,
    on_submit: Callable[[list[int]], None] | None = None,
    on_result: Callable[[Result], None] | None = None,
) -> Operation[list[Result]]:
    """Run all prompts, in as many calls as the server's limits ask for; see Client.run_batch."""
    deadline = None if timeout is None else time.monotonic() + timeout
    waiting: deque[int] = deque()
    results: list[Result] = []
    parts = _Parts(prompts)
    while parts.left or waiting:
        if parts.left:
            ids = yield from _submit_part(parts, params, waiting)
            waiting.extend(ids)
            if ids and on_submit:
                on_submit(ids)
        if waiting and (parts.blocked or not parts.left):
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            results.append((yield from _outcome(waiting.popleft(), left)))
            if on_result:
                on_result(results[-1])
    return results


@dataclass(slots=True)
class _Parts:
    """The prompts of a batch that are not submitted yet, and how many go into one call."""

    prompts: Sequence[str]
    submitted: int = 0
    size: int = BATCH_SIZE
    #: The server takes no more until a job has ended.
    blocked: bool = False

    @property
    def left(self) -> bool:
        return self.submitted < len(self.prompts)


def _submit_part(parts: _Parts, params: Params, waiting: Collection[int]) -> Operation[list[int]]:
    """Queue the next prompts; no ids where the server asks for fewer, or for less at once."""
    part = parts.prompts[parts.submitted : parts.submitted + parts.size]
    try:
        ids = yield from submit_batch(part, params)
    except RateLimitedError as error:
        if not parts.submitted:
            raise
        parts.blocked = True
        if not waiting:
            yield Pause(error.retry_after or 1.0)
        return []
    except BadRequestError as error:
        limit = _fewer(error, len(part))
        if limit is not None:
            parts.size = limit
            return []
        # A batch is run as a whole or not at all, as if it were one call.
        for request_id in waiting:
            with suppress(DllmError):
                yield from cancel(request_id)
        raise _renumbered(error, parts.submitted) from error
    parts.blocked = False
    parts.submitted += len(part)
    return ids


def _fewer(error: BadRequestError, count: int) -> int | None:
    """How many prompts the server may take in place of `count`; None if fewer would not help."""
    limit = error.max_length if error.field == "prompts" else None
    if error.status == 413:  # all of them together are too large
        limit = count // 2
    return limit if limit is not None and 0 < limit < count else None


def _renumbered(error: BadRequestError, first: int) -> BadRequestError:
    """The error with a prompt's place in the whole batch, not in its part."""
    name, _, place = (error.field or "").partition(".")
    if name != "prompts" or not place.isdecimal():
        return error
    field = f"prompts.{first + int(place)}"
    message = str(error).replace(f"{name}.{place}", field, 1)
    return BadRequestError(message, error.status, field, error.max_length)


def _outcome(request_id: int, timeout: float | None) -> Operation[Result]:
    """The job once it has ended, in whichever way."""
    try:
        return (yield from wait(request_id, timeout))
    except JobError as error:
        return error.result


def _send(call: Call) -> Operation[Any]:
    """The JSON body of a successful answer; raises the error for any other."""
    response = yield call
    assert response is not None
    if not response.is_success:
        raise from_response(response)
    try:
        return response.json()
    except ValueError as error:
        raise UnexpectedResponseError(f"{response.url} did not answer with JSON") from error


def _submit(path: str, body: dict[str, Any], key: str | None) -> Operation[Any]:
    """The answer to a submission. The key makes it safe to send it twice."""
    chosen = header("idempotency_key", key) if key else uuid.uuid4().hex
    headers = {"Idempotency-Key": chosen}
    return (yield from _send_again(Call("POST", path, json=body, headers=headers)))


def _send_again(call: Call) -> Operation[Any]:
    """Like _send, with retries when there is no answer; for calls that are safe to repeat."""
    for pause in RETRY_PAUSES:
        try:
            return (yield from _send(call))
        except UnavailableError:
            yield Pause(pause)
    return (yield from _send(call))


def _wait(request_id: int, timeout: float | None) -> Operation[Result]:
    """Poll until the job is done. Both the job and this wait survive a restart of the server."""
    deadline = None if timeout is None else time.monotonic() + timeout
    trouble: DllmError | None = None  # why the last poll had no answer
    lost = 0.0  # when polls began to fail
    pauses = iter(RETRY_PAUSES)
    while True:
        begun = time.monotonic()
        left = HOLD_SECONDS if deadline is None else max(0.0, deadline - begun)
        # Not held after a failure: a proxy may have closed the last poll for its silence.
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
            message = f"no answer about job {request_id} for {OUTAGE_SECONDS:g} s: {trouble}"
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
    if problem := result.problem:
        kind = JobFailedError if result.status is Status.FAILED else JobCancelledError
        raise kind(problem, result)
    return result


def _text(result: Result) -> str:
    if result.text is None:
        raise UnexpectedResponseError(f"job {result.request_id} is finished without a text")
    return result.text


def _result_of(data: Any) -> Result:
    """The job in a response; unknown fields are ignored."""
    try:
        usage = data.get("usage")
        return Result(
            request_id=int(data["request_id"]),
            status=Status(data["status"]),
            text=data["text"],
            error=data.get("error"),
            finish_reason=data.get("finish_reason"),
            usage=usage and Usage.of(usage),
            seed=data.get("seed"),
            created_at=data.get("created_at"),
            started_at=data.get("started_at"),
            finished_at=data.get("finished_at"),
            tokens=read_tokens(data.get("tokens")),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UnexpectedResponseError(f"not a job: {data!r}") from error
