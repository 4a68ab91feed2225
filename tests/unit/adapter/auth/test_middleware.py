"""Limits of the whole API: rates, sizes, and who may call from a browser."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import httpx
import pytest
from adapter_fakes import (
    HandClock,
    RunningApp,
    ScriptedEngine,
    fast_settings,
    running_app,
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
    """A call counts as many times as it has prompts; of one with too many, only the first does."""
    async with running(database_url, rate_limit="4/minute") as api:

        async def batch(count: int) -> httpx.Response:
            return await api.client.post("/v1/generate_batch", json={"prompts": ["a"] * count})

        assert (await batch(3)).status_code == 200
        never = await batch(5)
        assert never.status_code == 422
        assert never.json()["detail"][0] == {
            "type": "engine_refusal",
            "loc": ["body", "prompts"],
            "msg": "at most 4 at once (DLLM_RATE_LIMIT); got 5",
        }
    async with running(database_url, rate_limit="9/minute") as api:
        await until(lambda: api.app.state.pool.state.ok)
        body = {"model": "dllm", "prompt": ["a"] * 7}
        texts = await api.client.post("/v1/completions", json=body)
        assert texts.status_code == 200
        assert (await api.client.post("/v1/completions", json=body)).status_code == 429
        assert (await submit(api)).status_code == 200


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
