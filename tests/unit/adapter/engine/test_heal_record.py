"""How workers agree on who replaces an engine."""

import asyncio
import time

import pytest
from adapter_fakes import HandClock, ScriptedEngine, fast_settings, running_app, until
from sqlalchemy import select

from adapter.db.database import Database
from adapter.db.tables import engine_heal
from adapter.engine.reload_lease import (
    FORGET_SECONDS,
    EngineRecord,
    HealStore,
    OldEngines,
    engine_name,
)
from adapter.errors import EngineFailure, Unavailable

#: Each test that uses a database runs on both kinds.
DATABASES = ("sqlite", "postgresql")


@pytest.fixture
async def workers(database: Database, clock: HandClock) -> list[HealStore]:
    """Two workers that know the same engine."""
    stores = [HealStore(database, engine="e", owner=name, clock=clock) for name in ("a", "b")]
    await asyncio.gather(*(store.read() for store in stores))
    return stores


async def test_one_of_two_may_begin(workers: list[HealStore]) -> None:
    """The second to begin is told so, and the record shows that it goes on."""
    a, b = workers

    assert [await a.begin(epoch=0, lease=9), await b.begin(epoch=0, lease=9)] == [True, False]
    assert EngineRecord(epoch=0, healing=True, abandoned=False, silent_for=0) == await b.read()


async def test_engine_of_an_earlier_epoch_needs_no_replacing(workers: list[HealStore]) -> None:
    """Whoever saw the death of an engine that was replaced since comes too late."""
    a, b = workers
    await a.begin(epoch=0, lease=9)

    assert await a.finish()
    assert not await b.begin(epoch=0, lease=9)
    assert EngineRecord(epoch=1, healing=False, abandoned=False, silent_for=0) == await b.read()


async def test_dead_healer_is_succeeded(workers: list[HealStore], clock: HandClock) -> None:
    """When the healer falls silent another takes over, and the first can end nothing."""
    a, b = workers
    await a.begin(epoch=0, lease=9)
    clock.advance(5)
    assert await a.renew(lease=9)
    clock.advance(10)

    assert (await b.read()).abandoned
    assert await b.begin(epoch=0, lease=9)
    assert [await a.renew(lease=9), await a.finish(), await b.finish()] == [False, False, True]


async def test_abandoned_work_is_free_at_once(workers: list[HealStore]) -> None:
    """A healer that stops in the middle says so, and another begins anew."""
    a, b = workers
    await a.begin(epoch=0, lease=9)
    await a.abandon()

    assert (await b.read()).abandoned
    assert await b.begin(epoch=0, lease=9)


async def test_signs_of_life_are_shared(workers: list[HealStore], clock: HandClock) -> None:
    """What one worker hears, all know."""
    a, b = workers
    clock.advance(30)
    assert (await b.read()).silent_for == 30
    await a.publish_life()

    assert (await b.read()).silent_for == 0


async def names(database: Database) -> set[str]:
    return {row.engine for row in await database.read(select(engine_heal.c.engine))}


async def test_engines_that_left_the_configuration_are_forgotten(
    database: Database, clock: HandClock
) -> None:
    """Whom nobody has heard from for a month goes, unless it is configured or being replaced."""
    gone, dead, replaced, alive = (
        HealStore(database, engine=name, owner="a", clock=clock)
        for name in ("gone", "dead", "replaced", "alive")
    )
    for engine in (gone, dead, replaced, alive):
        await engine.read()
    old = OldEngines(database, ["dead"], clock=clock)

    clock.advance(FORGET_SECONDS - 1)
    await alive.publish_life()
    await old.forget()
    assert await names(database) == {"gone", "dead", "replaced", "alive"}

    clock.advance(2)
    assert await replaced.begin(epoch=0, lease=9)
    await old.forget()
    assert await names(database) == {"dead", "replaced", "alive"}


async def test_workers_forget_old_engines(database_url: str, database: Database) -> None:
    """A worker that starts removes what is left of the tritonservers of another time."""
    long_ago = HandClock()
    long_ago.now = 0.0
    await HealStore(database, engine="gone:1/dllm", owner="a", clock=long_ago).read()
    async with running_app(fast_settings(database_url), ScriptedEngine()) as api:
        await until(lambda: api.monitor.state.ok)
        async with asyncio.timeout(5):
            while await names(database) != {engine_name("engine:1", "dllm")}:
                await asyncio.sleep(0.01)


async def test_record_that_is_gone_is_made_anew(
    workers: list[HealStore], database: Database, clock: HandClock
) -> None:
    """A worker whose engine others have forgotten goes on."""
    a, _ = workers
    clock.advance(FORGET_SECONDS + 1)
    await OldEngines(database, [], clock=clock).forget()
    assert await names(database) == set()

    assert EngineRecord(epoch=0, healing=False, abandoned=False, silent_for=0) == await a.read()


async def test_model_left_unloaded_is_loaded_by_the_next_worker(
    database_url: str, database: Database
) -> None:
    """A worker that was killed between unload and load leaves work that the next one does."""
    name = engine_name("engine:1", "dllm")
    ghost = HealStore(database, engine=name, owner="ghost")
    await ghost.read()
    await ghost.begin(epoch=0, lease=0.01)
    engine = ScriptedEngine(alive=False)
    async with running_app(fast_settings(database_url), engine) as api:
        assert (await api.result(await api.submit()))["status"] == "finished"

    assert engine.reloads == 1


async def test_engine_that_was_begun_by_a_dead_worker_is_not_begun_again(
    database_url: str, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A load goes on when its worker dies: the next one waits for it and looks at the engine."""
    monkeypatch.setattr("adapter.engine.reloader.LOOK_SECONDS", 0.01)
    ghost = HealStore(database, engine=engine_name("engine:1", "dllm"), owner="ghost")
    await ghost.read()
    await ghost.begin(epoch=0, lease=0.01)
    engine = ScriptedEngine(loadings=5)
    async with running_app(fast_settings(database_url), engine) as api:
        assert (await api.result(await api.submit()))["status"] == "finished"
        assert (await ghost.read()).epoch == 1
    assert (engine.reloads, engine.loadings < 0) == (0, True)


async def test_engine_that_comes_back_by_itself_is_noticed_at_once(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the server was away, so that nothing could be loaded, it may be started by others."""
    monkeypatch.setattr("adapter.engine.reloader.LOOK_SECONDS", 0.01)
    engine = ScriptedEngine(alive=False, reload_error=Unavailable("failed to connect"))
    async with running_app(fast_settings(database_url, lease_seconds=30), engine) as api:
        await until(lambda: engine.reloads == 1)
        await asyncio.sleep(0.1)
        engine.alive = True

        assert (await api.result(await api.submit()))["status"] == "finished"
        assert api.monitor.state.ok
    assert engine.reloads == 1


async def test_engine_that_does_not_load_is_tried_now_and_then(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of the workers does so until it loads, with a pause each time."""
    monkeypatch.setattr("adapter.engine.reloader.LOOK_SECONDS", 0.01)
    monkeypatch.setattr("adapter.engine.reloader.RETRY_SECONDS", 0.3)
    engine = ScriptedEngine(alive=False, reload_error=EngineFailure("it does not load"))
    settings = fast_settings(database_url)
    async with running_app(settings, engine) as one, running_app(settings, engine) as two:
        await until(lambda: engine.reloads == 1)
        await asyncio.sleep(1.0)
        assert 2 <= engine.reloads <= 4
        engine.reload_error = None
        await until(lambda: one.monitor.state.ok and two.monitor.state.ok)


async def test_healer_that_has_lost_its_lease_leaves_the_engine_to_its_successor(
    database_url: str, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two that reload one engine in turn would undo each other's work."""
    monkeypatch.setattr("adapter.engine.reloader.LOOK_SECONDS", 0.01)
    monkeypatch.setattr("adapter.engine.reloader.RETRY_SECONDS", 0.1)
    engine = ScriptedEngine(alive=False, reload_error=EngineFailure("it does not load"))
    async with running_app(fast_settings(database_url), engine):
        await until(lambda: engine.reloads == 1)
        heir = engine_heal.update().values(healer="heir", lease_expires=time.time() + 30)
        await database.change(heir)
        await asyncio.sleep(0.2)
        reloads = engine.reloads
        await asyncio.sleep(0.4)
        assert engine.reloads == reloads


@pytest.mark.parametrize(
    ("url", "local"),
    [
        ("127.0.0.1:8011", True),
        ("localhost:8011", True),
        ("[::1]:8011", True),
        ("10.0.0.1:8001", False),
        ("triton:8001", False),
    ],
)
def test_loopback_engines_of_two_hosts_differ(url: str, local: bool) -> None:
    """The same loopback address is another engine on every host."""
    assert local == (f"{url}/dllm" != engine_name(url, "dllm"))
