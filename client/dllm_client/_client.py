"""The blocking and the asyncio client. They send and sleep; `_operations` has the API's rules."""

import asyncio
import ipaddress
import time
from collections.abc import AsyncGenerator, Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

import httpx

from dllm_client import _operations as operations
from dllm_client._errors import (
    BadRequestError,
    DllmError,
    UnavailableError,
    from_response,
    from_transport,
)
from dllm_client._operations import Call, Operation, Pause, header
from dllm_client._pipeline import Item, Pipeline
from dllm_client._progress import progress_bar
from dllm_client._streaming import StreamReader, open_stream
from dllm_client._types import Answer, Outcome, Params, Prompt, Result, Step

DEFAULT_URL = "http://localhost:8000"
DEFAULT_TIMEOUT = 30.0
#: Jobs of `map` that are submitted and not yet returned. An engine runs 64 at once by default.
IN_FLIGHT = 96
#: Each wait for a job has a poll in flight, so that httpx's limit of 100 would be reached soon.
LIMITS = httpx.Limits(max_connections=None, max_keepalive_connections=100)

T = TypeVar("T")


def _options(base_url: str, api_key: str | None, timeout: float) -> dict[str, Any]:
    """The arguments of httpx's clients.

    Raises UnavailableError for an address of no server, and BadRequestError for other values.
    """
    try:
        address = httpx.URL(base_url)
    except (httpx.InvalidURL, UnicodeError) as error:
        raise UnavailableError(f"cannot reach {base_url!r}: {error}") from error
    # Refused now: a wait for a job would look for the server for a minute.
    if address.scheme not in ("http", "https") or not address.host:
        raise UnavailableError(f"cannot reach {base_url!r}: it is no http:// or https:// address")
    if not 0 < timeout < 1e9:  # more than a socket can be told
        raise BadRequestError(f"timeout: {timeout:g} is no time to wait", 400, "timeout")
    headers = {"Authorization": f"Bearer {header('api_key', api_key)}"} if api_key else {}
    return {
        "base_url": base_url,
        "headers": headers,
        "timeout": timeout,
        "limits": LIMITS,
        # A proxy has nothing to do with a server on this machine.
        "trust_env": not is_loopback(address.host),
        # Without `trust_env`, httpx would not look at SSL_CERT_FILE.
        "verify": httpx.create_ssl_context() if address.scheme == "https" else True,
    }


def is_loopback(host: str) -> bool:
    """Whether the host is this machine, which no proxy leads to."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


@contextmanager
def _proxy_errors(base_url: str) -> Iterator[None]:
    """Raises UnavailableError for a proxy of the environment that httpx cannot use."""
    try:
        yield
    except ImportError:
        reason = "the environment's proxy is a SOCKS proxy: pip install 'httpx[socks]', or unset"
        raise UnavailableError(f"cannot reach {base_url}: {reason} ALL_PROXY") from None
    except (ValueError, httpx.InvalidURL) as error:
        reason = f"the environment's proxy cannot be used: {error}; unset ALL_PROXY or HTTP_PROXY"
        raise UnavailableError(f"cannot reach {base_url}: {reason}") from None


class _Exchange:
    """Turns a Call into a request of httpx, for both clients."""

    def __init__(self, base_url: str, timeout: float) -> None:
        self.base_url = base_url
        self._timeout = timeout

    def _arguments(self, call: Call) -> dict[str, Any]:
        return {
            "method": call.method,
            "url": call.path,
            "json": call.json,
            "params": call.query or None,
            "headers": call.headers,
            "timeout": httpx.Timeout(self._timeout, read=self._timeout + call.extra_time),
        }


class Client(_Exchange):
    """A blocking client; safe to share between threads.

    `timeout` is the time in seconds for one answer of the server, not for a job. Every method
    raises a DllmError when something goes wrong. GETs and submissions without an answer are
    retried first, submissions under an Idempotency-Key, so that no job runs twice.
    A prompt is a text, a list of chat messages, or a list of token ids.
    `transport` replaces the network, for tests.
    """

    def __init__(
        self,
        base_url: str = DEFAULT_URL,
        *,
        api_key: str | None = None,
        timeout: float = DEFAULT_TIMEOUT,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        super().__init__(base_url, timeout)
        options = _options(base_url, api_key, timeout)
        with _proxy_errors(base_url):
            self._http = httpx.Client(transport=transport, **options)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def submit(
        self, prompt: Prompt, *, idempotency_key: str | None = None, **params: Unpack[Params]
    ) -> int:
        """Queue a prompt and return the id of its job at once.

        If you submit it again under the same key, it is not queued again, and you get the same id.
        """
        return self._run(operations.submit(prompt, params, idempotency_key))

    def submit_batch(
        self,
        prompts: Sequence[str],
        *,
        idempotency_key: str | None = None,
        **params: Unpack[Params],
    ) -> list[int]:
        """Queue several prompts, all or none; their ids, in order. The key is as in `submit`.

        The server limits how many it takes in one call (DLLM_MAX_BATCH_SIZE, 64 by default).
        """
        return self._run(operations.submit_batch(prompts, params, idempotency_key))

    def result(self, request_id: int) -> Result:
        """The job as it is now. Raises NotFoundError."""
        return self._run(operations.result(request_id))

    def wait(self, request_id: int, timeout: float | None = None) -> Result:
        """The job once it is finished. The wait goes on while the server restarts.

        Raises JobFailedError, JobCancelledError, or TimeoutError after `timeout` seconds; without
        a timeout, UnavailableError after a minute without an answer. The job itself goes on
        then; the error has its id as `request_id`.
        """
        return self._run(operations.wait(request_id, timeout))

    def generate(
        self, prompt: Prompt, *, wait_timeout: float | None = None, **params: Unpack[Params]
    ) -> str:
        """Submit, wait, and return the text. Raises what `submit` and `wait` raise.

        If the error has a `request_id`, the job was submitted, and you can wait for it again.
        """
        return self._run(operations.generate(prompt, params, wait_timeout))

    def stream(
        self, prompt: Prompt, **params: Unpack[Params]
    ) -> Generator[Step | Answer, None, None]:
        """Watch the denoising: a Step for each denoising step, then the Answer.

        When you close the generator, the server cancels the request. Raises StreamError if the
        stream ends without an answer.
        """
        reader = StreamReader()
        try:
            with self._http.stream(**self._arguments(open_stream(prompt, params))) as response:
                if not response.is_success:
                    response.read()
                    raise from_response(response)
                for chunk in response.iter_bytes():
                    for event in reader.feed(chunk):
                        yield event
                        if isinstance(event, Answer):
                            return
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise from_transport(error, self.base_url) from error
        raise reader.end()

    def generate_batch(
        self,
        prompts: Sequence[str],
        *,
        progress: bool = True,
        wait_timeout: float | None = None,
        **params: Unpack[Params],
    ) -> list[str]:
        """The texts of any number of prompts, in order, with a progress bar on a terminal.

        They are sent in as many calls as the server's limits ask for. Raises for the first job
        that fails; to keep the other texts, use `run_batch`.
        """
        with progress_bar(len(prompts), shown=progress) as advance:
            return self._run(operations.generate_batch(prompts, params, wait_timeout, advance))

    def run_batch(
        self,
        prompts: Sequence[str],
        *,
        wait_timeout: float | None = None,
        on_submit: Callable[[list[int]], None] | None = None,
        on_result: Callable[[Result], None] | None = None,
        **params: Unpack[Params],
    ) -> list[Result]:
        """The results of any number of prompts, in order; failed and cancelled jobs, too.

        `on_submit` is called with the ids of each call's jobs, `on_result` with each result, in
        order. `wait_timeout` is for all jobs together.
        """
        return self._run(
            operations.run_batch(
                prompts, params, wait_timeout, on_submit=on_submit, on_result=on_result
            )
        )

    def map(
        self,
        items: Iterable[Item],
        *,
        in_flight: int = IN_FLIGHT,
        wait_timeout: float | None = None,
        **params: Unpack[Params],
    ) -> Generator[Outcome, None, None]:
        """Run any number of prompts as jobs; yields their outcomes in order.

        At most `in_flight` items are read ahead, so the items may be an endless iterator. An item
        that is refused or fails gets its error in its outcome, and the others go on; `in_flight`
        waits while the service has no room. Close the generator to cancel the jobs in flight.

        Args:
            items: prompts, or a `Request` where a prompt has fields of its own.
            in_flight: most jobs that are submitted and not yet yielded.
            wait_timeout: seconds to wait for each job; one that takes longer goes on running.
            **params: fields of all requests.

        Raises:
            DllmError: the service cannot be reached, or refuses every request; the jobs in flight
                are cancelled.
        """
        pipeline = Pipeline(items, params, in_flight=in_flight, wait_timeout=wait_timeout)
        try:
            while (outcome := self._run(pipeline.next())) is not None:
                yield outcome
        finally:
            self._run(pipeline.cancel())

    def cancel(self, request_id: int) -> Result:
        """Cancel a job; returns it as it is then (a finished job stays finished)."""
        return self._run(operations.cancel(request_id))

    def health(self) -> str:
        """`ok`. Raises UnavailableError, with the server's reason, while it cannot serve."""
        return self._run(operations.health())

    def models(self) -> list[str]:
        """The names of the models that OpenAI's calls may ask for."""
        return self._run(operations.models())

    def _run(self, operation: Operation[T]) -> T:
        try:
            step = next(operation)
            while True:
                try:
                    response = self._perform(step)
                except DllmError as error:
                    step = operation.throw(error)
                else:
                    step = operation.send(response)
        except StopIteration as end:
            outcome: T = end.value
            return outcome

    def _perform(self, step: Call | Pause) -> httpx.Response | None:
        if isinstance(step, Pause):
            time.sleep(step.seconds)
            return None
        try:
            return self._http.request(**self._arguments(step))
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise from_transport(error, self.base_url) from error


class AsyncClient(_Exchange):
    """The same client for asyncio; see Client for what each method does and raises."""

    def __init__(
        self,
        base_url: str = DEFAULT_URL,
        *,
        api_key: str | None = None,
        timeout: float = DEFAULT_TIMEOUT,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        super().__init__(base_url, timeout)
        options = _options(base_url, api_key, timeout)
        with _proxy_errors(base_url):
            self._http = httpx.AsyncClient(transport=transport, **options)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def submit(
        self, prompt: Prompt, *, idempotency_key: str | None = None, **params: Unpack[Params]
    ) -> int:
        """Queue a prompt and return the id of its job at once."""
        return await self._run(operations.submit(prompt, params, idempotency_key))

    async def submit_batch(
        self,
        prompts: Sequence[str],
        *,
        idempotency_key: str | None = None,
        **params: Unpack[Params],
    ) -> list[int]:
        """Queue several prompts, all or none; their ids, in order."""
        return await self._run(operations.submit_batch(prompts, params, idempotency_key))

    async def result(self, request_id: int) -> Result:
        """The job as it is now."""
        return await self._run(operations.result(request_id))

    async def wait(self, request_id: int, timeout: float | None = None) -> Result:
        """The job once it is finished."""
        return await self._run(operations.wait(request_id, timeout))

    async def generate(
        self, prompt: Prompt, *, wait_timeout: float | None = None, **params: Unpack[Params]
    ) -> str:
        """Submit, wait, and return the text."""
        return await self._run(operations.generate(prompt, params, wait_timeout))

    async def stream(
        self, prompt: Prompt, **params: Unpack[Params]
    ) -> AsyncGenerator[Step | Answer, None]:
        """Watch the denoising: a Step for each denoising step, then the Answer."""
        reader = StreamReader()
        call = self._arguments(open_stream(prompt, params))
        try:
            async with self._http.stream(**call) as response:
                if not response.is_success:
                    await response.aread()
                    raise from_response(response)
                async for chunk in response.aiter_bytes():
                    for event in reader.feed(chunk):
                        yield event
                        if isinstance(event, Answer):
                            return
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise from_transport(error, self.base_url) from error
        raise reader.end()

    async def generate_batch(
        self,
        prompts: Sequence[str],
        *,
        progress: bool = True,
        wait_timeout: float | None = None,
        **params: Unpack[Params],
    ) -> list[str]:
        """The texts of any number of prompts, in order, with a progress bar on a terminal."""
        with progress_bar(len(prompts), shown=progress) as advance:
            operation = operations.generate_batch(prompts, params, wait_timeout, advance)
            return await self._run(operation)

    async def run_batch(
        self,
        prompts: Sequence[str],
        *,
        wait_timeout: float | None = None,
        on_submit: Callable[[list[int]], None] | None = None,
        on_result: Callable[[Result], None] | None = None,
        **params: Unpack[Params],
    ) -> list[Result]:
        """The results of any number of prompts, in order; failed and cancelled jobs, too."""
        return await self._run(
            operations.run_batch(
                prompts, params, wait_timeout, on_submit=on_submit, on_result=on_result
            )
        )

    async def map(
        self,
        items: Iterable[Item],
        *,
        in_flight: int = IN_FLIGHT,
        wait_timeout: float | None = None,
        **params: Unpack[Params],
    ) -> AsyncGenerator[Outcome, None]:
        """Run any number of prompts as jobs; yields their outcomes in order."""
        pipeline = Pipeline(items, params, in_flight=in_flight, wait_timeout=wait_timeout)
        try:
            while (outcome := await self._run(pipeline.next())) is not None:
                yield outcome
        finally:
            await self._run(pipeline.cancel())

    async def cancel(self, request_id: int) -> Result:
        """Cancel a job; returns it as it is then."""
        return await self._run(operations.cancel(request_id))

    async def health(self) -> str:
        """`ok`, or an UnavailableError."""
        return await self._run(operations.health())

    async def models(self) -> list[str]:
        """The names of the models that OpenAI's calls may ask for."""
        return await self._run(operations.models())

    async def _run(self, operation: Operation[T]) -> T:
        try:
            step = next(operation)
            while True:
                try:
                    response = await self._perform(step)
                except DllmError as error:
                    step = operation.throw(error)
                else:
                    step = operation.send(response)
        except StopIteration as end:
            outcome: T = end.value
            return outcome

    async def _perform(self, step: Call | Pause) -> httpx.Response | None:
        if isinstance(step, Pause):
            await asyncio.sleep(step.seconds)
            return None
        try:
            return await self._http.request(**self._arguments(step))
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise from_transport(error, self.base_url) from error
