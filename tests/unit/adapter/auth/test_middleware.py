"""Limits of the whole API: rates, sizes, and who may call from a browser."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from adapter_fakes import (
    HandClock,
    RunningApp,
    ScriptedEngine,
    fast_settings,
    running_app,
    served_app,
    until,
)
from sqlalchemy import select

from adapter.auth.keys import entry_of
from adapter.auth.rate_limit import RateLimiter
from adapter.db.database import Database
from adapter.db.tables import rate_limits
from adapter.errors import RateLimited

#: Each test that uses a database runs on both kinds.
DATABASES = ("sqlite", "postgresql")


@asynccontextmanager
async def running(database_url: str, **settings: object) -> AsyncIterator[RunningApp]:
    async with running_app(fast_settings(database_url, **settings), ScriptedEngine()) as api:
        yield api


async def submit(api: RunningApp, **headers: str) -> httpx.Response:
    return await api.client.post("/v1/generate", json={"prompt": "a"}, headers=headers)


async def test_rate_is_shared_between_workers(database_url: str) -> None:
    """Calls to all workers count together; one too many is told when to come again."""
    async with (
        running(database_url, rate_limit="4/minute") as one,
        running(database_url, rate_limit="4/minute") as two,
    ):
        answers = [await submit(api) for api in (one, two) * 3]

        assert [answer.status_code for answer in answers] == [200] * 4 + [429] * 2
        assert 0 < int(answers[-1].headers["retry-after"]) <= 60
        assert "4 per 1 minute (DLLM_RATE_LIMIT)" in answers[-1].json()["detail"]


async def test_polling_is_free(database_url: str) -> None:
    """Only calls that make work are counted."""
    async with running(database_url, rate_limit="1/minute") as api:
        await submit(api)
        for _ in range(5):
            assert (await api.client.get("/v1/result/0")).status_code == 200
        assert (await api.client.delete("/v1/result/0")).status_code == 200


async def test_every_key_has_its_own_rate(database_url: str) -> None:
    """What one key does is not held against another, nor against those without one."""
    keys = f"{entry_of('one', 'k1')},{entry_of('two', 'k2')}"
    async with running(database_url, rate_limit="1/minute", api_keys=keys) as api:
        codes = [(await submit(api, **{"x-api-key": k})).status_code for k in ("k1", "k1", "k2")]
        assert codes == [200, 429, 200]
        assert (await submit(api)).status_code == 401


async def test_every_address_has_its_own_rate(database_url: str) -> None:
    """Without keys, callers are told apart by their addresses."""
    async with running(database_url, rate_limit="1/minute") as api, AsyncExitStack() as stack:
        codes = []
        long = "9" * 300  # a proxy that is trusted passes on any text
        for address in ("10.0.0.1", "10.0.0.1", "10.0.0.2", long + "1", long + "1", long + "2"):
            transport = httpx.ASGITransport(api.app, client=(address, 1))
            client = httpx.AsyncClient(transport=transport, base_url="http://adapter")
            await stack.enter_async_context(client)
            answer = await client.post("/v1/generate", json={"prompt": "a"})
            codes.append(answer.status_code)
        assert codes == [200, 429, 200] * 2


async def test_window_ends(database: Database, clock: HandClock) -> None:
    """A caller's count begins anew when its window is over, and is forgotten in the end."""
    limiter = RateLimiter(database, "3/minute; 100/hour", clock)

    async def windows() -> list[tuple[str, int]]:
        rows = await database.read(select(rate_limits).order_by(rate_limits.c.expires))
        return [(row.key, row.calls) for row in rows]

    for _ in range(3):
        await limiter.hit("a")
    clock.advance(20.5)
    with pytest.raises(RateLimited, match="more prompts than 3 per 1 minute") as refused:
        await limiter.hit("a")
    assert refused.value.retry_after == 40
    clock.advance(39.5)
    await limiter.hit("a")
    assert await windows() == [("a 3 per 1 minute", 1), ("a 100 per 1 hour", 4)]

    clock.advance(60)
    await limiter.tidy()
    assert await windows() == [("a 100 per 1 hour", 4)]
    clock.advance(3600)
    await limiter.tidy()
    assert await windows() == []


async def test_first_calls_at_once_are_all_counted(database: Database) -> None:
    """Many calls of a new caller at the same time make one count."""
    limiter = RateLimiter(database, "7/minute")
    answers = await asyncio.gather(*(limiter.hit("a") for _ in range(10)), return_exceptions=True)

    assert sum(isinstance(answer, RateLimited) for answer in answers) == 3


async def test_refused_calls_do_not_use_up_another_rate(database: Database) -> None:
    """Calls refused for the seconds' rate leave the minute's rate as it is."""
    clock = HandClock()
    for rates in ("6/minute; 3/second", "3/second; 6/minute"):
        limiter = RateLimiter(database, rates, clock)
        for _ in range(2):
            answers = [await refused(limiter, rates) for _ in range(9)]
            assert answers == [False] * 3 + [True] * 6
            clock.advance(1)
        assert await refused(limiter, rates)


async def refused(limiter: RateLimiter, caller: str) -> bool:
    try:
        await limiter.hit(caller)
    except RateLimited:
        return True
    return False


async def test_prompts_are_counted_and_not_calls(database_url: str) -> None:
    """A call counts as many times as it has prompts."""
    async with running(database_url, rate_limit="9/minute") as api:
        await until(lambda: api.app.state.fleet.default.state.ok)
        body = {"model": "dllm", "prompt": ["a"] * 7}
        texts = await api.client.post("/v1/completions", json=body)
        assert texts.status_code == 200
        assert (await api.client.post("/v1/completions", json=body)).status_code == 429
        assert [(await submit(api)).status_code for _ in range(3)] == [200, 200, 429]


@pytest.mark.parametrize(
    ("limit", "setting"),
    [
        ({"rate_limit": "9/second; 4/minute"}, "DLLM_RATE_LIMIT"),
        ({"max_batch_size": 4}, "DLLM_MAX_BATCH_SIZE"),
        ({"max_queued_jobs": 9}, "DLLM_MAX_QUEUED_JOBS, DLLM_KEY_SHARE"),
    ],
)
async def test_a_batch_that_is_always_too_long_is_told_the_limit(
    database_url: str, limit: dict[str, Any], setting: str
) -> None:
    """The error has the most prompts that a call may have as a number, whichever setting it is."""
    keys = entry_of("one", "k1")
    async with running(database_url, api_keys=keys, **limit) as api:
        body = {"prompts": ["a"] * 5}
        answer = await api.client.post("/v1/generate_batch", json=body, headers={"X-API-Key": "k1"})
    assert answer.status_code == 422
    assert answer.json()["detail"] == [
        {
            "type": "too_long",
            "loc": ["body", "prompts"],
            "msg": f"List should have at most 4 items ({setting}), not 5",
            "ctx": {"max_length": 4},
        }
    ]


@pytest.mark.parametrize(
    ("refused", "status"),
    [
        ({"prompts": ["a"] * 65}, 422),
        ({"prompts": ["a"] * 8}, 429),
        ({"prompts": ["a"], "steps": 0}, 422),
        ({"prompts": ["a" * 2000]}, 413),
    ],
)
async def test_refused_calls_leave_the_rate_alone(
    database_url: str, refused: dict[str, Any], status: int
) -> None:
    """A call that is refused before an engine is asked does not count for the rate."""
    limits = {"rate_limit": "10/minute; 100/hour", "max_queued_jobs": 100, "max_body_bytes": 1000}
    async with running(database_url, **limits) as api:

        async def batch(body: dict[str, Any]) -> int:
            return (await api.client.post("/v1/generate_batch", json=body)).status_code

        assert await batch({"prompts": ["a"] * 4}) == 200
        for _ in range(3):
            assert await batch(refused) == status
        assert await batch({"prompts": ["a"] * 6}) == 200
        assert await batch({"prompts": ["a"]}) == 429


async def test_what_is_given_back_stays_in_its_window(database: Database) -> None:
    """A call that is refused after its window ended takes nothing from the next window."""
    clock = HandClock()
    limiter = RateLimiter(database, "3/minute", clock)
    counted = await limiter.hit("a", 2)
    clock.advance(60)
    await limiter.hit("a", 3)
    await limiter.give_back(counted)
    assert await refused(limiter, "a")


async def submit_from(url: str, forwarded: list[str]) -> list[int]:
    """Statuses of calls with these headers `X-Forwarded-For`."""
    async with httpx.AsyncClient(base_url=url) as client:
        calls = [
            await client.post("/v1/generate", json={"prompt": "a"}, headers={"X-Forwarded-For": f})
            for f in forwarded
        ]
    return [call.status_code for call in calls]


LONG = ["x" * 300, "x" * 299 + "y"]


@pytest.mark.parametrize(
    ("trusted", "forwarded", "statuses"),
    [
        pytest.param("10.0.0.1", ["1.1.1.1", "2.2.2.2", "3.3.3.3"], [200, 200, 429], id="nobody"),
        pytest.param("10.0.0.1", [*LONG, "1.1.1.1"], [200, 200, 429], id="nobody, long"),
        pytest.param("127.0.0.1", ["1.1.1.1", "2.2.2.2", "3.3.3.3"], [200] * 3, id="proxy"),
        pytest.param("127.0.0.1", ["1.1.1.1"] * 3, [200, 200, 429], id="client of a proxy"),
        pytest.param(
            "127.0.0.1",
            [f"{n}.{n}.{n}.{n}, 9.9.9.9" for n in range(3)],
            [200, 200, 429],
            id="client of a proxy that makes addresses up",
        ),
        pytest.param("127.0.0.1", [*LONG, *LONG, LONG[0]], [200] * 4 + [429], id="proxy, long"),
    ],
)
async def test_only_a_trusted_proxy_says_whose_call_it_is(
    tmp_path: Path, trusted: str, forwarded: list[str], statuses: list[int]
) -> None:
    """The rate counts by the address of the peer, or of the client that a trusted proxy names."""
    settings = fast_settings(f"sqlite:///{tmp_path}/jobs.db", rate_limit="2/minute")
    async with served_app(settings, ScriptedEngine(), forwarded_allow_ips=trusted) as url:
        assert await submit_from(url, forwarded) == statuses


@pytest.mark.parametrize("chunked", [False, True])
async def test_too_large_a_body_is_413(database_url: str, chunked: bool) -> None:
    """A body beyond the limit is refused with the limit, whether its size was told or not."""

    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(3):
            yield b" " * 500

    async with running(database_url, max_body_bytes=1000) as api:
        body = chunks() if chunked else b" " * 1001
        answer = await api.client.post("/v1/generate", content=body)
        assert answer.status_code == 413
        assert "larger than 1000 bytes (DLLM_MAX_BODY_BYTES)" in answer.json()["detail"]

        padded = b'{"prompt": "a"}'.ljust(1000)
        answer = await api.client.post(
            "/v1/generate", content=padded, headers={"content-type": "application/json"}
        )
        assert answer.status_code == 200


async def test_browsers_of_other_pages_are_kept_out(database_url: str) -> None:
    """Unless a page's origin is in the settings, no answer allows it to call."""
    asking = {"Origin": "https://chat.example", "Access-Control-Request-Method": "POST"}
    async with running(database_url) as api:
        answer = await api.client.options("/v1/generate", headers=asking)
        assert "access-control-allow-origin" not in answer.headers

    keys = entry_of("one", "k1")
    origins = "https://chat.example, https://b.example"
    async with running(database_url, cors_origins=origins, api_keys=keys) as api:
        answer = await api.client.options("/v1/generate", headers=asking)
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] == "https://chat.example"
        refused = await submit(api, Origin="https://chat.example")
        assert refused.status_code == 401
        assert refused.headers["access-control-allow-origin"] == "https://chat.example"
        other = await submit(api, Origin="https://evil.example")
        assert "access-control-allow-origin" not in other.headers
