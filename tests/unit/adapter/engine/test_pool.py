"""Several engines, and jobs that kill them."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import suppress
from typing import Any

import pytest
from adapter_fakes import (
    DONE,
    HANG,
    SIGN_OF_LIFE,
    ScriptedEngine,
    fast_settings,
    running_app,
    until,
)

from adapter.engine.follow import follow
from adapter.errors import ConnectionLost, SettingsError, StreamInterrupted, Unavailable
from adapter.settings import load_settings
from adapter.types import Event, Inputs


class MortalEngine(ScriptedEngine):
    """Answers after a moment; a request that says `poison` ends it, and it starts again."""

    running = 0
    deaths = 0
    most_beside_poison: list[int]

    async def generate(self, inputs: Inputs, **_: Any) -> AsyncGenerator[Event, None]:
        self.check_connection()
        self.requests.append(inputs)
        self.running += 1
        ended = self.ended
        try:
            yield SIGN_OF_LIFE
            await asyncio.sleep(0.02)
            if "poison" in str(inputs):
                self.most_beside_poison.append(self.running - 1)
                self.deaths += 1
                self.end()
                asyncio.get_running_loop().call_later(0.1, self.start)
            if ended.is_set():
                raise ConnectionLost("Socket closed")
            yield DONE
        finally:
            self.running -= 1


async def test_poison_fails_and_its_neighbours_finish(database_url: str) -> None:
    """A job that kills the engine is given up by itself, however many ran beside it."""
    engine = MortalEngine()
    engine.most_beside_poison = []
    # No worker dies here, and on a busy machine a short lease would be lost.
    settings = fast_settings(database_url, max_inflight=40, lease_seconds=15)
    async with running_app(settings, engine) as one, running_app(settings, engine) as two:
        prompts = [f"good {n}" for n in range(20)] + ["poison"] + ["good"] * 19
        await one.client.post("/v1/generate_batch", json={"prompts": prompts})
        results = [await two.result(n, wait=60) for n in range(40)]

    failed = results.pop(20)
    assert failed["status"] == "failed"
    assert failed["error"].startswith("given up after 3 attempts: ")
    assert {"finished"} == {result["status"] for result in results}
    assert engine.deaths == 3
    assert engine.most_beside_poison[-1] == 0


async def test_load_is_spread_over_engines(database_url: str) -> None:
    """Each request goes to the engine that has least to do."""
    engines = {f"engine:{n}": ScriptedEngine([[HANG]]) for n in range(3)}
    async with running_app(fast_settings(database_url), engines) as api:
        endpoints = api.app.state.fleet.default.endpoints
        await until(lambda: all(endpoint.monitor.state.ok for endpoint in endpoints))
        await api.client.post("/v1/generate_batch", json={"prompts": ["a"] * 9})
        await until(lambda: sum(len(engine.requests) for engine in engines.values()) == 9)
        assert [len(engine.requests) for engine in engines.values()] == [3, 3, 3]


async def test_dead_engine_is_passed_over(database_url: str) -> None:
    """The jobs of an engine that dies run on the others, whose own streams are not touched."""
    dying = ScriptedEngine([[SIGN_OF_LIFE, HANG]])
    living = ScriptedEngine([[HANG]])
    async with running_app(
        fast_settings(database_url, engine_idle_timeout=30), {"a:1": dying, "b:1": living}
    ) as api:
        endpoints = api.app.state.fleet.default.endpoints
        await until(lambda: all(endpoint.monitor.state.ok for endpoint in endpoints))
        await api.client.post("/v1/generate_batch", json={"prompts": ["a", "b"]})
        await until(lambda: len(dying.requests) == len(living.requests) == 1)
        living.scripts = [[DONE]]
        dying.alive = False

        await until(lambda: len(living.requests) == 2 and living.closed == 1)
        assert (await api.health())[0] == 200
        assert living.closed == 1


async def test_health_names_every_engine_that_is_away(database_url: str) -> None:
    """One engine that answers is enough; without any, health says what each of them said."""
    engines = {
        "a:1": ScriptedEngine(probe_error=Unavailable("not there")),
        "b:1": ScriptedEngine(probe_error=Unavailable("still loading")),
    }
    async with running_app(fast_settings(database_url), engines) as api:
        endpoints = api.app.state.fleet.default.endpoints
        await until(lambda: "loading" in endpoints[1].monitor.state.reason)
        await until(lambda: "there" in endpoints[0].monitor.state.reason)
        status, body = await api.health()
        assert (status, body["reason"]) == (503, "a:1: not there; b:1: still loading")

        engines["b:1"].probe_error = None
        await until(lambda: endpoints[1].monitor.state.ok)
        assert (await api.health())[0] == 200
        assert (await api.result(await api.submit()))["status"] == "finished"
        assert (len(engines["a:1"].requests), len(engines["b:1"].requests)) == (0, 1)


async def test_engine_that_turns_requests_away_rests(database_url: str) -> None:
    """After an error an engine is left alone for a moment, while the other is used."""
    bad, good = ScriptedEngine([[StreamInterrupted("gone")]]), ScriptedEngine()
    async with running_app(fast_settings(database_url), {"bad:1": bad, "good:1": good}) as api:
        endpoints = api.app.state.fleet.default.endpoints
        await until(lambda: all(endpoint.monitor.state.ok for endpoint in endpoints))
        for _ in range(6):
            assert (await api.result(await api.submit()))["status"] == "finished"
        assert len(bad.requests) < 6


@pytest.mark.parametrize(
    ("urls", "reason"),
    [
        ("a:1,a:1", "each address should be given once"),
        ("a", "'a' should be host:port"),
        ("http://a:1", "'http://a:1' should be host:port"),
        ("a:1,", "'' should be host:port"),
    ],
)
def test_addresses_make_sense(monkeypatch: pytest.MonkeyPatch, urls: str, reason: str) -> None:
    """A list of addresses that cannot work stops the start."""
    monkeypatch.setenv("DLLM_TRITON_URL", urls)
    with pytest.raises(SettingsError, match=reason):
        load_settings()


def test_addresses_are_a_list(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commas separate addresses, and spaces do not matter."""
    monkeypatch.setenv("DLLM_TRITON_URL", "a:1, b:2")
    assert load_settings().triton_urls == ["a:1", "b:2"]


async def test_pause_grows_with_each_failure(database_url: str) -> None:
    """An engine that fails again and again is left alone for longer each time, until it answers."""
    failing = Unavailable("not now")
    engine = ScriptedEngine([[failing], [failing], [failing], [DONE], [failing]])
    async with running_app(fast_settings(database_url), engine) as api:
        (endpoint,) = api.app.state.fleet.default.endpoints
        rests = []
        for _ in range(5):
            with suppress(Unavailable):
                await follow(
                    endpoint, {}, lambda _: None, request_id="x", deadline=None, idle_timeout=5
                )
            rests.append(round(endpoint.backoff_left, 1))
            await asyncio.sleep(max(0.0, endpoint.backoff_left))
    first, second, third, answered, again = rests
    assert 0 < first < second < third
    assert answered <= 0 < again < second
