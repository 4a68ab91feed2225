"""What one API key may hold of what all callers share."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from adapter_fakes import HANG, RunningApp, ScriptedEngine, fast_settings, running_app, until

from adapter.auth.keys import entry_of
from adapter.errors import TooManyCalls
from adapter.shares import Shares

KEYS = f"{entry_of('one', 'k1')},{entry_of('two', 'k2')}"
QUESTION = [{"role": "user", "content": "a"}]


@pytest.fixture
async def api(database_url: str) -> AsyncIterator[RunningApp]:
    """A worker with two keys, and an engine that never answers."""
    settings = fast_settings(
        database_url,
        api_keys=KEYS,
        key_share=0.5,
        max_live=4,
        max_held_polls=4,
        max_queued_jobs=4,
        max_inflight=1,
        engine_idle_timeout=30,
    )
    async with running_app(settings, ScriptedEngine([[HANG]])) as running:
        await until(lambda: running.app.state.fleet.default.state.ok)
        yield running


async def post(api: RunningApp, key: str, path: str, **body: Any) -> httpx.Response:
    return await api.client.post(f"/v1/{path}", json=body, headers={"X-API-Key": key})


async def test_one_key_leaves_places_to_others(api: RunningApp) -> None:
    """A key holds at most its share of the streams and OpenAI calls, each prompt counted."""
    prompts = {"model": "dllm", "prompt": ["a", "b"]}
    call = asyncio.create_task(post(api, "k1", "completions", **prompts))
    await until(lambda: api.app.state.live.inflight == 2)

    refused = await post(api, "k1", "chat/completions", model="dllm", messages=QUESTION)
    assert refused.status_code == 429
    assert "at most 2 may (DLLM_MAX_LIVE, DLLM_KEY_SHARE)" in refused.json()["error"]["message"]
    assert (await post(api, "k1", "generate/stream", prompt="a")).status_code == 429
    other = asyncio.create_task(post(api, "k2", "completions", **prompts))
    await until(lambda: api.app.state.live.inflight == 4)
    for task in (call, other):
        task.cancel()
    await asyncio.gather(call, other, return_exceptions=True)


async def test_a_batch_beyond_the_share_is_refused_whole(api: RunningApp) -> None:
    """A call with more prompts than its key may hold runs none of them."""
    never = await post(api, "k1", "completions", model="dllm", prompt=["a", "b", "c"])
    assert never.status_code == 400
    limit = "at most 2 items (DLLM_MAX_LIVE, DLLM_KEY_SHARE), not 3"
    assert limit in never.json()["error"]["message"]

    call = asyncio.create_task(post(api, "k1", "completions", model="dllm", prompt="a"))
    await until(lambda: api.app.state.live.inflight == 1)
    answer = await post(api, "k1", "completions", model="dllm", prompt=["b", "c"])
    assert answer.status_code == 429
    assert api.app.state.live.inflight == 1
    call.cancel()
    await asyncio.gather(call, return_exceptions=True)


async def test_one_key_leaves_polls_to_others(api: RunningApp) -> None:
    """A key holds at most its share of the polls."""
    ids = {
        key: (await post(api, key, "generate", prompt="a")).json()["request_ids"][0]
        for key in ("k1", "k2")
    }

    def poll(key: str) -> asyncio.Task[httpx.Response]:
        call = api.client.get(
            f"/v1/result/{ids[key]}", params={"wait": 30}, headers={"X-API-Key": key}
        )
        return asyncio.create_task(call)

    held = [poll("k1"), poll("k1")]
    await until(lambda: api.app.state.jobs.held == 2)
    refused = await poll("k1")
    assert refused.status_code == 429
    assert "DLLM_MAX_HELD_POLLS, DLLM_KEY_SHARE" in refused.json()["detail"]
    held.append(poll("k2"))
    await until(lambda: api.app.state.jobs.held == 3)
    for task in held:
        task.cancel()
    await asyncio.gather(*held, return_exceptions=True)


async def test_one_key_leaves_the_queue_to_others(api: RunningApp) -> None:
    """A key has at most its share of the queue, each prompt counted."""
    assert (await post(api, "k1", "generate", prompt="runs")).status_code == 200
    await until(lambda: api.app.state.fleet.default.endpoints[0].inflight == 1)
    assert (await post(api, "k1", "generate_batch", prompts=["a", "b"])).status_code == 200

    refused = await post(api, "k1", "generate", prompt="c")
    assert refused.status_code == 429
    assert refused.json()["detail"] == (
        "2 jobs of this key are waiting, and at most 2 may (DLLM_MAX_QUEUED_JOBS, DLLM_KEY_SHARE)"
    )
    assert (await post(api, "k2", "generate_batch", prompts=["a", "b"])).status_code == 200
    full = await post(api, "k2", "generate", prompt="c")
    assert full.json()["detail"] == "4 jobs are waiting, and at most 4 may (DLLM_MAX_QUEUED_JOBS)"


def test_calls_without_keys_have_no_share() -> None:
    """Where no keys are required, the limit of all is the only one."""
    shares = Shares(2, 0.5, what="calls wait", setting="LIMIT")
    for _ in range(2):
        shares.take(None)
    with pytest.raises(TooManyCalls, match=r"2 calls wait, and at most 2 may \(LIMIT\)"):
        shares.take(None)


@pytest.mark.parametrize(("limit", "share", "most"), [(1, 0.1, 1), (10, 0.25, 2), (10, 1.0, 10)])
def test_a_key_may_hold_one_at_least(limit: int, share: float, most: int) -> None:
    """A share is rounded down, but never to nothing; what is given back can be taken again."""
    shares = Shares(limit, share, what="calls wait", setting="LIMIT")
    for _ in range(most):
        shares.take("one")
    with pytest.raises(TooManyCalls):
        shares.take("one")
    shares.give_back("one")
    shares.take("one")
    assert shares.held == most
