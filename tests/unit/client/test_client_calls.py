"""The blocking client against a scripted server; the asyncio client at the end."""

import asyncio
import json
import sys
from typing import Any

import dllm_client
import httpx
import pytest
from client_fakes import BatchServer, Script, job, submitted
from dllm_client import (
    AsyncClient,
    AuthenticationError,
    BadRequestError,
    Client,
    JobCancelledError,
    JobFailedError,
    NotFoundError,
    RateLimitedError,
    Result,
    ServerError,
    Status,
    UnavailableError,
    UnexpectedResponseError,
    Usage,
    _operations,
)


def test_exported_names_exist() -> None:
    """`__all__` is sorted and holds exactly the public names of the package."""
    modules = {"cli", "notebook", "triton"}
    public = {name for name in vars(dllm_client) if not name.startswith("_")} - modules
    assert sorted(dllm_client.__all__) == dllm_client.__all__
    assert public == set(dllm_client.__all__)


def test_submit_sends_only_what_is_given(client: Client, script: Script) -> None:
    """The body has the prompt and the given parameters, and the id comes back."""
    script.answers = [submitted(7)]
    assert client.submit("hi", temperature=0.6, gen_length=128) == 7
    assert json.loads(script.requests[0].content) == {
        "prompt": "hi",
        "temperature": 0.6,
        "gen_length": 128,
    }


def test_api_key_is_a_bearer_token(script: Script) -> None:
    """The key travels in the Authorization header of every call."""
    script.answers = [submitted(0)]
    transport = httpx.MockTransport(script)
    with Client("http://server", api_key="secret", transport=transport) as client:
        client.submit("hi")
    assert script.requests[0].headers["Authorization"] == "Bearer secret"


def test_wait_asks_the_server_to_hold(client: Client, script: Script) -> None:
    """Waiting polls with ?wait= until the job is done, and returns it."""
    script.answers = [job("running"), job("running"), job("finished", "a text")]
    assert client.wait(0) == Result(0, Status.FINISHED, "a text")
    assert [request.url.params["wait"] for request in script.requests] == ["30", "30", "30"]


def test_result_has_what_the_server_tells(client: Client, script: Script) -> None:
    """A result is typed: why it ended, what it cost, its seed and its times."""
    usage = {"prompt_tokens": 1, "completion_tokens": 2, "steps": 3, "forward_passes": 4}
    usage["cached_tokens"] = 1
    times = {"created_at": 1.5, "started_at": 2.5, "finished_at": 3.5}
    more = {"finish_reason": "length", "usage": usage | {"new": 5}, "seed": 7, **times, "new": 1}
    script.answers = [job("finished", "a text", **more)]
    expected = Result(
        0, Status.FINISHED, "a text", None, "length", Usage(1, 2, 3, 4, 1), 7, 1.5, 2.5, 3.5
    )
    assert client.result(0) == expected


def test_wait_gives_up(client: Client, script: Script) -> None:
    """A job that is not done in time is a TimeoutError, which is the built-in one too."""
    script.answers = [job("running")]
    with pytest.raises(TimeoutError, match=r"job 3 was not finished after 0\.02 s") as caught:
        client.wait(3, timeout=0.02)
    assert isinstance(caught.value, dllm_client.TimeoutError)
    assert len(script.requests) > 1


def test_wait_outlasts_a_rate_limit(client: Client, script: Script) -> None:
    """A poll that is refused for being one too many is sent again after Retry-After."""
    refusal = httpx.Response(429, json={"detail": "slow"}, headers={"Retry-After": "0.001"})
    script.answers = [refusal, job("finished", "a text")]
    assert client.wait(0).text == "a text"


AWAY = [
    httpx.ConnectError("refused"),
    httpx.ConnectTimeout("no answer"),
    httpx.ReadError("reset"),
    httpx.ReadTimeout("silence"),
    httpx.RemoteProtocolError("disconnected"),
    httpx.Response(503, json={"detail": "starting"}),
    httpx.Response(502, content=b"<html>"),
    httpx.Response(504, content=b"<html>"),
]


@pytest.mark.parametrize("timeout", [None, 30.0])
def test_wait_outlasts_a_restart(client: Client, script: Script, timeout: float | None) -> None:
    """A poll without an answer is retried, however often and for whichever reason."""
    script.answers = [submitted(4), *AWAY, job("running"), *AWAY, job("finished", "a text")]
    assert client.generate("hi", wait_timeout=timeout) == "a text"
    assert len(script.requests) == 3 + 2 * len(AWAY)


def test_wait_asks_for_no_hold_after_a_failure(client: Client, script: Script) -> None:
    """A proxy may have cut a poll for its silence: the next one is answered at once."""
    script.answers = [httpx.Response(504), job("running"), job("finished", "a text")]
    client.wait(0)
    assert [request.url.params["wait"] for request in script.requests] == ["30", "0", "30"]


def test_hold_is_granted_to_the_answer_alone(script: Script) -> None:
    """A held poll may take longer to be answered, but no longer to be sent."""
    script.answers = [job("finished", "a text")]
    with Client("http://server", timeout=5, transport=httpx.MockTransport(script)) as client:
        client.wait(0)
    limits = {"connect": 5, "pool": 5, "write": 5, "read": 35}
    assert script.requests[0].extensions["timeout"] == limits


@pytest.mark.parametrize("trouble", AWAY)
def test_dead_server_is_reported_in_the_end(
    client: Client,
    script: Script,
    trouble: httpx.Response | Exception,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A wait without a time limit ends after a while, with the job's id in the error."""
    monkeypatch.setattr(_operations, "OUTAGE_SECONDS", 0.02)
    script.answers = [submitted(4), trouble]
    with pytest.raises(UnavailableError, match="no answer about job 4 for 0.02 s: .+") as caught:
        client.generate("hi")
    assert caught.value.request_id == 4
    assert len(script.requests) > 2


def test_dead_server_at_the_deadline(
    client: Client, script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wait with a time limit ends at the limit; the error has the reason, too."""
    monkeypatch.setattr(_operations, "OUTAGE_SECONDS", 0.0)
    script.answers = [submitted(4), httpx.ConnectError("refused")]
    message = r"job 4 was not finished after 0\.02 s: cannot reach http://server: refused"
    with pytest.raises(dllm_client.TimeoutError, match=message) as caught:
        client.generate("hi", wait_timeout=0.02)
    assert caught.value.request_id == 4


def test_errors_of_a_wait_name_the_job(client: Client, script: Script) -> None:
    """Every error of a wait has the job's id."""
    for answer in (httpx.Response(500), httpx.Response(401), job("failed"), job("cancelled")):
        script.answers = [submitted(4), answer]
        with pytest.raises(dllm_client.DllmError) as caught:
            client.generate("hi")
        assert caught.value.request_id == 4


def test_pauses_grow_without_an_answer() -> None:
    """The first retries come at once; then the server is asked once a second."""
    operation = _operations.wait(4, None)
    steps = [next(operation)]
    while len(steps) < 11:
        poll = isinstance(steps[-1], _operations.Call)
        steps.append(operation.throw(UnavailableError("")) if poll else operation.send(None))
    pauses = [step.seconds for step in steps if isinstance(step, _operations.Pause)]
    assert pauses == pytest.approx([0.1, 0.3, 1.0, 1.0, 1.0], abs=0.05)


def test_generate_is_submit_and_wait(client: Client, script: Script) -> None:
    """The text of one prompt takes one POST and the polls."""
    script.answers = [submitted(4), job("finished", "a text", 4)]
    assert client.generate("hi") == "a text"
    assert script.asked == ["POST /v1/generate", "GET /v1/result/4"]


def test_generate_batch_keeps_the_order(client: Client, script: Script) -> None:
    """Texts come in the order of the prompts."""
    script.answers = [submitted(4, 5), job("finished", "a", 4), job("finished", "b", 5)]
    assert client.generate_batch(["x", "y"], gen_length=64) == ["a", "b"]
    assert json.loads(script.requests[0].content) == {"prompts": ["x", "y"], "gen_length": 64}


def test_generate_batch_of_any_length() -> None:
    """More prompts than the server takes in one call go out in several, and keep their order."""
    server = BatchServer(limit=16)
    with Client("http://server", transport=httpx.MockTransport(server)) as other:
        prompts = [str(i) for i in range(65)]
        assert other.generate_batch(prompts) == [f"answer-{i}" for i in range(65)]
    assert server.calls == [16, 16, 16, 16, 1]


def test_batch_of_long_prompts() -> None:
    """Prompts that are too large for one body together go out in several calls."""
    server = BatchServer(limit=64, max_chars=100)
    prompts = [f"{i:030}" for i in range(10)]
    with Client("http://server", transport=httpx.MockTransport(server)) as other:
        assert other.generate_batch(prompts) == [f"answer-{prompt}" for prompt in prompts]
        with pytest.raises(BadRequestError, match="the body is too large"):
            other.generate_batch(["a" * 101])
    assert server.calls == [2] * 5


def test_batch_waits_for_room_in_the_queue(quick: None) -> None:
    """When the server takes no more jobs, results are fetched first, and the rest goes out then."""
    del quick
    server = BatchServer(limit=64, room=80)
    with Client("http://server", transport=httpx.MockTransport(server)) as client:
        results = client.run_batch([str(i) for i in range(200)])
    assert [result.text for result in results] == [f"answer-{i}" for i in range(200)]
    assert server.calls == [64, 64, 64, 8]


def test_first_call_of_a_batch_is_refused_as_ever(quick: None) -> None:
    """A queue that is full from the start is a RateLimitedError."""
    del quick
    transport = httpx.MockTransport(BatchServer(limit=64, room=0))
    with Client("http://server", transport=transport) as client, pytest.raises(RateLimitedError):
        client.generate_batch(["a"])


def test_bad_prompt_of_a_long_batch(quick: None) -> None:
    """The error has the prompt's place in the whole batch; jobs submitted before are cancelled."""
    del quick
    server = BatchServer(limit=64, bad="70")
    with (
        Client("http://server", transport=httpx.MockTransport(server)) as client,
        pytest.raises(BadRequestError, match=r"^prompts\.70: is bad") as caught,
    ):
        client.generate_batch([str(i) for i in range(100)])
    assert caught.value.field == "prompts.70"
    assert server.cancelled == list(range(64))


def test_run_batch_has_a_result_for_each_prompt(client: Client, script: Script) -> None:
    """A failed job is a result, too; ids and results are told as they come."""
    script.answers = [
        submitted(4, 5),
        job("failed", None, 4, error="out of luck"),
        job("finished", "b", 5),
    ]
    ids: list[int] = []
    seen: list[Result] = []
    results = client.run_batch(["x", "y"], on_submit=ids.extend, on_result=seen.append)
    assert [(result.status, result.problem) for result in results] == [
        (Status.FAILED, "job 4 failed: out of luck"),
        (Status.FINISHED, None),
    ]
    assert (ids, seen) == ([4, 5], results)


def test_text_in_place_of_a_batch(client: Client, script: Script) -> None:
    """One text is no list of prompts, though it is a sequence of letters."""
    with pytest.raises(BadRequestError, match="^prompts: must be a list"):
        client.generate_batch("abc")
    assert not script.requests


MESSAGES = [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize(
    ("prompt", "field"),
    [("hi", "prompt"), (MESSAGES, "messages"), ([1, 2], "input_ids"), ([], "input_ids")],
)
def test_prompt_has_three_forms(
    client: Client, script: Script, prompt: dllm_client.Prompt, field: str
) -> None:
    """A text, chat messages and token ids go out under the API's names, in a stream, too."""
    script.answers = [submitted(7), httpx.Response(503)]
    client.submit(prompt, seed=1)
    with pytest.raises(UnavailableError):
        next(client.stream(prompt, seed=1))
    for request in script.requests:
        assert json.loads(request.content) == {field: prompt, "seed": 1}


@pytest.mark.parametrize("kind", [Client, AsyncClient])
def test_proxy_that_cannot_be_used(
    kind: type[Client | AsyncClient], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A proxy that httpx cannot use is an error that says what to do; loopback needs no proxy."""
    monkeypatch.setitem(sys.modules, "socksio", None)
    monkeypatch.setenv("ALL_PROXY", "socks5://127.0.0.1:1080")
    with pytest.raises(UnavailableError, match="httpx\\[socks\\].* or unset ALL_PROXY"):
        kind("http://server")
    monkeypatch.setenv("ALL_PROXY", "nonsense://127.0.0.1:1080")
    with pytest.raises(UnavailableError, match="nonsense.*unset"):
        kind("http://server")
    for local in ("http://localhost:8000", "http://127.0.0.1", "http://[::1]:8000"):
        kind(local)


def test_failed_job_carries_its_result(client: Client, script: Script) -> None:
    """A failed job raises with the server's reason and the job."""
    script.answers = [job("failed", error="the engine died")]
    with pytest.raises(JobFailedError, match="job 0 failed: the engine died") as caught:
        client.wait(0)
    assert caught.value.result.status is Status.FAILED


def test_cancelled_job_raises_when_waited_for(client: Client, script: Script) -> None:
    """Cancelling returns the job; waiting for it afterwards raises."""
    script.answers = [job("cancelled")]
    assert client.cancel(0).status is Status.CANCELLED
    with pytest.raises(JobCancelledError):
        client.wait(0)
    assert script.asked[0] == "DELETE /v1/result/0"


def test_get_is_repeated_without_an_answer(client: Client, script: Script) -> None:
    """A poll goes on after a short outage."""
    script.answers = [httpx.ConnectError("refused"), httpx.ReadError("reset"), job("running")]
    assert not client.result(0).done
    assert len(script.requests) == 3


def test_submission_is_repeated_under_its_key(client: Client, script: Script) -> None:
    """A submission that may have arrived is sent again under the same key; the next has another."""
    script.answers = [httpx.ConnectTimeout("no answer"), httpx.ReadError("reset"), submitted(0)]
    assert client.submit("hi") == 0
    assert client.submit_batch(["hi"]) == [0]
    assert client.submit("hi", idempotency_key="mine") == 0
    first, second, third, other, given = (r.headers["Idempotency-Key"] for r in script.requests)
    assert first == second == third
    assert len({first, other, given}) == 3
    assert given == "mine"


def test_absent_server(client: Client, script: Script) -> None:
    """A server without an answer is an UnavailableError."""
    script.answers = [httpx.ConnectError("refused")]
    with pytest.raises(UnavailableError, match="cannot reach http://server: refused"):
        client.submit("hi")


def test_cancellation_is_not_repeated(client: Client, script: Script) -> None:
    """A call without an idempotency key is sent once."""
    script.answers = [httpx.ReadError("reset"), job("cancelled")]
    with pytest.raises(UnavailableError, match="cannot reach http://server: reset"):
        client.cancel(0)
    assert len(script.requests) == 1


def test_timeouts_are_not_repeated(client: Client, script: Script) -> None:
    """A call that ran into its time limit is not sent again."""
    script.answers = [httpx.ReadTimeout("slow")]
    with pytest.raises(dllm_client.TimeoutError, match="did not answer in time"):
        client.result(0)
    assert len(script.requests) == 1


def test_health(client: Client, script: Script) -> None:
    """Ready is `ok`; not ready raises with the server's own reason."""
    unavailable = {"status": "unavailable", "reason": "model is loading"}
    script.answers = [httpx.Response(200, json={"status": "ok"})]
    assert client.health() == "ok"
    script.answers = [httpx.Response(503, json=unavailable)]
    with pytest.raises(UnavailableError, match="model is loading"):
        client.health()


FASTAPI = {"detail": [{"type": "x", "loc": ["body", "gen_length"], "msg": "too long"}]}
NESTED = {"detail": [{"type": "x", "loc": ["body", "prompts", 1], "msg": "empty"}]}
OPENAI = {"error": {"message": "too long", "param": "gen_length"}}


@pytest.mark.parametrize(
    ("body", "field", "message"),
    [
        (FASTAPI, "gen_length", "gen_length: too long"),
        (NESTED, "prompts.1", "prompts.1: empty"),
        (OPENAI, "gen_length", "gen_length: too long"),
        ({"detail": "gen_length too long"}, None, "gen_length too long"),
        ({"unknown": 1}, None, "HTTP 422 Unprocessable Entity"),
        ([], None, "HTTP 422 Unprocessable Entity"),
    ],
)
def test_bad_request_names_the_field(
    client: Client, script: Script, body: object, field: str | None, message: str
) -> None:
    """Field and reason reach the caller from every form of error body."""
    script.answers = [httpx.Response(422, json=body)]
    with pytest.raises(BadRequestError) as caught:
        client.submit("hi")
    assert (caught.value.field, str(caught.value), caught.value.status) == (field, message, 422)


@pytest.mark.parametrize(
    ("prompt", "params", "field"),
    [
        ("hi", {"temperature": float("nan")}, "temperature"),
        ("hi", {"timeout": float("inf")}, "timeout"),
        ("hi", {"stop": ["ok", "\ud800"]}, "stop"),
        ("hi", {"canvas_ids": {1, 2}}, "canvas_ids"),
        ("half a character: \udcff", {}, "prompt"),
    ],
)
def test_value_that_cannot_be_sent(
    client: Client, script: Script, prompt: str, params: Any, field: str
) -> None:
    """A value that JSON cannot hold is refused as the server would refuse it, naming the field."""
    with pytest.raises(BadRequestError, match=f"^{field}: ") as caught:
        client.submit(prompt, **params)
    assert caught.value.field == field
    with pytest.raises(BadRequestError, match=f"^{field}: "):
        next(client.stream(prompt, **params))
    with pytest.raises(BadRequestError, match="^prompts: |^" + field):
        client.generate_batch([prompt], **params)
    assert not script.requests


@pytest.mark.parametrize("timeout", [float("nan"), -1.0, 0.0, float("inf")])
def test_unusable_time_limit(timeout: float) -> None:
    """A time limit that no socket takes is refused when the client is made."""
    for kind in (Client, AsyncClient):
        with pytest.raises(BadRequestError, match="^timeout: ") as caught:
            kind("http://server", timeout=timeout)
        assert caught.value.field == "timeout"


@pytest.mark.parametrize("key", ["schlüssel", "\udcff", "two\nlines", " spaced ", "\0"])
def test_key_that_no_header_holds(client: Client, script: Script, key: str) -> None:
    """Neither kind of key may have it; the message names which, and does not tell it."""
    with pytest.raises(BadRequestError, match="^idempotency_key: must be") as caught:
        client.submit("hi", idempotency_key=key)
    assert caught.value.field == "idempotency_key"
    for kind in (Client, AsyncClient):
        with pytest.raises(BadRequestError, match="^api_key: must be printable ASCII characters$"):
            kind("http://server", api_key=key)
    assert not script.requests


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (400, BadRequestError),
        (401, AuthenticationError),
        (403, AuthenticationError),
        (404, NotFoundError),
        (413, BadRequestError),
        (429, RateLimitedError),
        (500, ServerError),
        (502, UnavailableError),
        (503, UnavailableError),
        (302, UnexpectedResponseError),
    ],
)
def test_status_decides_the_error(
    client: Client, script: Script, status: int, error: type[Exception]
) -> None:
    """Each HTTP status has one error, with or without a body that can be read."""
    script.answers = [httpx.Response(status, content=b"<html>")]
    with pytest.raises(error):
        client.submit("hi")


def test_retry_after_is_read(client: Client, script: Script) -> None:
    """The pause a server asks for reaches the caller; a date counts as none."""
    for header, seconds in (("5", 5.0), ("Wed, 21 Oct 2026 07:28:00 GMT", None)):
        script.answers = [httpx.Response(429, headers={"Retry-After": header})]
        with pytest.raises(RateLimitedError) as caught:
            client.submit("hi")
        assert caught.value.retry_after == seconds


@pytest.mark.parametrize(
    "body",
    [{"request_ids": []}, {"request_ids": ["0"]}, {"request_ids": [0, 1]}, {}, [], "text", None],
)
def test_foreign_answers_are_recognised(client: Client, script: Script, body: object) -> None:
    """An answer that is not this API's raises instead of being guessed at."""
    script.answers = [httpx.Response(200, json=body)]
    with pytest.raises(UnexpectedResponseError):
        client.submit("hi")
    with pytest.raises(UnexpectedResponseError):
        client.result(0)
    with pytest.raises(UnexpectedResponseError):
        client.health()


def test_page_instead_of_json(client: Client, script: Script) -> None:
    """A web page where JSON should be is named with its address."""
    script.answers = [httpx.Response(200, text="<html>")]
    with pytest.raises(UnexpectedResponseError, match="http://server/v1/health"):
        client.health()


@pytest.mark.parametrize("url", ["nonsense", "ftp://server", "http://", "http://a/\udcff"])
@pytest.mark.parametrize("kind", [Client, AsyncClient])
def test_unusable_address(kind: type[Client | AsyncClient], url: str) -> None:
    """An address that cannot work is told at once, not when a job has been waited for."""
    with pytest.raises(UnavailableError, match="cannot reach '"):
        kind(url)


def test_host_that_does_not_exist() -> None:
    """An unusable host name is a DllmError, not one of httpx's errors."""
    with pytest.raises(UnavailableError, match="cannot reach"), Client("http://[") as client:
        client.health()


async def test_asyncio_client_does_the_same(script: Script, quick: None) -> None:
    """The asyncio client runs the same operations, with pauses and retries."""
    del quick
    script.answers = [
        submitted(1),
        job("running"),
        httpx.ConnectError("refused"),
        job("finished", "a text"),
        submitted(2, 3),
        job("finished", "b"),
        job("finished", "c"),
        job("cancelled"),
        httpx.Response(200, json={"status": "ok"}),
        httpx.Response(404, json={"detail": "no such job"}),
    ]
    async with AsyncClient("http://server", transport=httpx.MockTransport(script)) as client:
        assert await client.generate("hi", seed=1) == "a text"
        assert await client.generate_batch(["x", "y"]) == ["b", "c"]
        assert (await client.cancel(3)).status is Status.CANCELLED
        assert await client.health() == "ok"
        with pytest.raises(NotFoundError, match="no such job"):
            await client.result(9)


async def test_as_many_calls_at_once_as_the_caller_likes() -> None:
    """A call that the server holds keeps no other from being sent."""
    count = 120
    together = asyncio.Barrier(count)
    body = job("finished", "a text").content
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)

    async def hold(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        await together.wait()
        writer.write(answer)
        writer.close()

    async with await asyncio.start_server(hold, "127.0.0.1", 0, backlog=count) as server:
        host, port = server.sockets[0].getsockname()
        async with AsyncClient(f"http://{host}:{port}", timeout=2.0) as client:
            results = await asyncio.gather(*(client.result(number) for number in range(count)))
    assert {result.text for result in results} == {"a text"}


def test_bytes_are_no_token_ids(script: Script) -> None:
    """A prompt of bytes is refused, and not sent as a list of numbers."""
    with pytest.raises(BadRequestError, match="prompt"):
        Client("http://server", transport=httpx.MockTransport(script)).submit(b"hi")  # type: ignore[arg-type]
    assert script.requests == []
