"""Runs prompts as jobs, a bounded number at a time, and returns their outcomes in order.

Written once for the blocking and the asyncio client, like `_operations`.
"""

from collections import deque
from collections.abc import Iterable
from contextlib import suppress
from typing import cast

from dllm_client import _operations as operations
from dllm_client._errors import (
    AuthenticationError,
    BadRequestError,
    DllmError,
    JobError,
    RateLimitedError,
    ResponseError,
    TimeoutError,
)
from dllm_client._operations import Operation, Pause
from dllm_client._types import Outcome, Params, Prompt, Request

Item = Prompt | Request | DllmError


class Pipeline:
    """The jobs in flight of one `map` call.

    Args:
        items: prompts, with fields of their own as `Request`; read only as far as needed. An
            error stands for an item that could not be read, and becomes that item's outcome.
        params: fields of all requests; those of a `Request` go first.
        in_flight: most jobs that are submitted and not yet returned.
        wait_timeout: seconds to wait for each job, counted from when its turn comes.

    Raises:
        BadRequestError: `in_flight` is below 1.
    """

    def __init__(
        self,
        items: Iterable[Item],
        params: Params,
        *,
        in_flight: int,
        wait_timeout: float | None,
    ) -> None:
        if in_flight < 1:
            raise BadRequestError(f"in_flight: must be at least 1, got {in_flight}", 400)
        self._items = iter(items)
        self._params = params
        self._in_flight = in_flight
        self._wait_timeout = wait_timeout
        self._window: deque[int | DllmError] = deque()  # ids of jobs, or why there is none
        self._held: Request | DllmError | None = None  # one that the server had no room for
        self._returned = 0

    def next(self) -> Operation[Outcome | None]:
        """The outcome of the next item, in order; None behind the last one.

        Raises:
            DllmError: the service is away, or refuses every request (no key, another API).
        """
        yield from self._fill()
        if not self._window:
            return None
        first = self._window[0]
        outcome = Outcome(self._returned, error=first) if isinstance(first, DllmError) else None
        if outcome is None:
            outcome = yield from self._wait(cast(int, first))
        self._window.popleft()
        self._returned += 1
        return outcome

    def cancel(self) -> Operation[None]:
        """Cancel the jobs in flight, as far as the server can be reached."""
        with suppress(DllmError):
            for entry in self._window:
                if not isinstance(entry, DllmError):
                    yield from operations.cancel(entry)
        self._window.clear()

    def _fill(self) -> Operation[None]:
        """Submit items until enough are in flight, or the server takes no more."""
        while len(self._window) < self._in_flight:
            if self._held is None:
                try:
                    item = next(self._items)
                except StopIteration:
                    return
                self._held = item if isinstance(item, Request | DllmError) else Request(item)
            try:
                self._window.append((yield from self._submit(self._held)))
            except RateLimitedError as error:
                if self._window:
                    return
                yield Pause(error.retry_after or 1.0)
            else:
                self._held = None

    def _submit(self, item: Request | DllmError) -> Operation[int | DllmError]:
        if isinstance(item, DllmError):
            return item
        params = cast(Params, {**self._params, **item.params})
        try:
            return (yield from operations.submit(item.prompt, params))
        except (AuthenticationError, RateLimitedError):
            raise
        except ResponseError as error:
            return error

    def _wait(self, request_id: int) -> Operation[Outcome]:
        try:
            result = yield from operations.wait(request_id, self._wait_timeout)
        except JobError as error:
            return Outcome(self._returned, error.result, error)
        except AuthenticationError:
            raise
        except (ResponseError, TimeoutError) as error:
            return Outcome(self._returned, error=error)
        return Outcome(self._returned, result)
