"""Tritonservers that come and go behind a name, and the models that they have."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest
from adapter_fakes import HANG, SIGN_OF_LIFE, ScriptedEngine, fast_settings, running_app, until

from adapter.engine.affinity import Affinity
from adapter.engine.fleet import Fleet
from adapter.engine.monitor import EngineMonitor
from adapter.engine.pool import Endpoint, EnginePool
from adapter.engine.resolve import Resolver
from adapter.errors import Unavailable, UnknownModel
from adapter.types import Inputs, Repository

DATABASES = ("sqlite",)


@dataclass
class Cluster:
    """A name that stands for several servers, and an engine at each address."""

    hosts: list[str]
    engines: dict[str, ScriptedEngine] = field(default_factory=dict)
    lookups: int = 0
    fails: bool = False

    async def look_up(self, host: str) -> list[str]:
        assert host == "triton"
        self.lookups += 1
        if self.fails:
            raise OSError("Temporary failure in name resolution")
        return list(self.hosts)

    def connect(self, address: str, _url: str) -> ScriptedEngine:
        return self.engines.setdefault(address, ScriptedEngine())

    def endpoint(self, address: str, url: str, pool: EnginePool) -> Endpoint:
        engine = self.connect(address, url)
        monitor = EngineMonitor(
            address, engine, model=pool.model, probe_interval=0.05, idle_timeout=1
        )
        return Endpoint(address, engine, monitor, pool.metrics)


@asynccontextmanager
async def fleet_of(cluster: Cluster, *urls: str) -> AsyncIterator[Fleet]:
    fleet = Fleet(
        urls or ["triton:1"],
        default="dllm",
        served_name="",
        connect=cluster.connect,
        endpoint=cluster.endpoint,
        interval=0.02,
        resolver=Resolver(cluster.look_up),
    )
    async with fleet:
        yield fleet


def names(fleet: Fleet) -> list[str]:
    return [endpoint.name for endpoint in fleet.default.endpoints]


async def ready(fleet: Fleet, *expected: str) -> None:
    await until(lambda: set(names(fleet)) == set(expected))
    await until(lambda: all(e.monitor.state.ok for e in fleet.default.endpoints))


async def test_a_name_stands_for_its_addresses() -> None:
    """Servers that come get requests, and those that go get no more."""
    cluster = Cluster(["10.0.0.1", "10.0.0.2"])
    async with fleet_of(cluster) as fleet:
        await ready(fleet, "10.0.0.1:1", "10.0.0.2:1")
        cluster.hosts = ["10.0.0.2", "fd00::3"]
        await ready(fleet, "10.0.0.2:1", "[fd00::3]:1")


async def test_there_is_always_a_server_that_answers() -> None:
    """The last server that answers stays until one of the new ones does."""
    cluster = Cluster(["10.0.0.1"])
    async with fleet_of(cluster) as fleet:
        await ready(fleet, "triton:1")  # one address: the name stands for itself
        cluster.engines["10.0.0.2:1"] = new = ScriptedEngine(probe_error=Unavailable("loading"))
        cluster.hosts = ["10.0.0.2", "10.0.0.3"]
        cluster.engines["10.0.0.3:1"] = newer = ScriptedEngine(probe_error=Unavailable("loading"))
        await until(lambda: len(names(fleet)) == 3)
        await asyncio.sleep(0.1)
        assert fleet.default.state.ok
        assert names(fleet)[0] == "triton:1"
        new.probe_error = newer.probe_error = None
        await ready(fleet, "10.0.0.2:1", "10.0.0.3:1")


async def test_lookups_that_fail_change_nothing() -> None:
    """While the name cannot be looked up, the known servers are used."""
    cluster = Cluster(["10.0.0.1", "10.0.0.2"])
    async with fleet_of(cluster) as fleet:
        cluster.fails = True
        before = cluster.lookups
        await until(lambda: cluster.lookups > before + 2)
        assert names(fleet) == ["10.0.0.1:1", "10.0.0.2:1"]


async def test_addresses_are_not_looked_up() -> None:
    """IP addresses and localhost stand for themselves."""
    cluster = Cluster([])
    async with fleet_of(cluster, "10.0.0.1:1", "[::1]:1", "localhost:1") as fleet:
        assert names(fleet) == ["10.0.0.1:1", "[::1]:1", "localhost:1"]
    assert cluster.lookups == 0


async def test_models_are_found_by_each_server_s_list() -> None:
    """Each model has the servers that list it; one that is not loaded yet is known to be away."""
    cluster = Cluster(["10.0.0.1", "10.0.0.2"])
    one, two = (cluster.connect(f"10.0.0.{n}:1", "") for n in (1, 2))
    one.models = Repository(("dllm", "dream"), {"sdar": "loading"})
    two.models = Repository(("dream",))
    async with fleet_of(cluster) as fleet:
        assert {p.model: [e.name for e in p.endpoints] for p in fleet.pools} == {
            "dllm": ["10.0.0.1:1"],
            "dream": ["10.0.0.1:1", "10.0.0.2:1"],
        }
        assert fleet.find(None) is fleet.find("dllm") is fleet.default
        with pytest.raises(Unavailable, match="'sdar' is not loaded: loading"):
            fleet.find("sdar")
        with pytest.raises(UnknownModel, match="this server has 'dllm', 'dream'"):
            fleet.find("gpt")
        one.models = two.models = Repository(("dllm", "sdar"))
        await until(lambda: [p.model for p in fleet.pools] == ["dllm", "sdar"])
        one.end()  # what it said holds
        await asyncio.sleep(0.1)
        assert [p.model for p in fleet.pools] == ["dllm", "sdar"]


async def test_models_of_a_silent_server_may_exist() -> None:
    """Before a server has listed its models, an unknown name is no error of the caller."""
    cluster = Cluster(["10.0.0.1"])
    cluster.connect("triton:1", "").end()
    async with fleet_of(cluster) as fleet:
        with pytest.raises(Unavailable, match="'dream' may be one of triton:1"):
            fleet.find("dream")


async def test_a_server_that_goes_finishes_its_requests(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request goes on where it is, and can be cancelled; then the connection closes."""
    monkeypatch.setattr("adapter.engine.pool.RETIRE_SECONDS", 0.02)
    leaving, staying = ScriptedEngine([[SIGN_OF_LIFE, HANG]]), ScriptedEngine()
    async with running_app(fast_settings(database_url), {"a:1": leaving, "b:1": staying}) as api:
        pool = api.app.state.fleet.default
        await until(lambda: all(e.monitor.state.ok for e in pool.endpoints))
        await api.client.post("/v1/generate_batch", json={"prompts": ["a", "b"]})
        await until(lambda: len(leaving.requests) == 1)
        endpoint = next(e for e in pool.endpoints if e.name == "a:1")
        pool.retire(endpoint)
        for job in range(2, 6):
            assert await api.submit() == job
            assert (await api.result(job))["status"] == "finished"
        assert (len(leaving.requests), endpoint.inflight, leaving.closed) == (1, 1, 0)
        pool.cancel("x")
        assert leaving.cancels == ["x"]
        leaving.end()
        await until(lambda: endpoint.inflight == 0)
        await until(lambda: endpoint.monitor.loop not in asyncio.all_tasks())
        statuses = [(await api.result(job))["status"] for job in (0, 1)]
        assert statuses == ["finished", "finished"]


def talk(*turns: str) -> Inputs:
    import json

    roles = ("user", "assistant")
    messages = [{"role": roles[n % 2], "content": turn} for n, turn in enumerate(turns)]
    return {"messages": json.dumps(messages)}


@dataclass
class Place:
    name: str
    inflight: int = 0


def test_a_conversation_stays_where_it_was() -> None:
    """Later turns go where the first one was, but never far beyond an even share."""
    places = [Place(f"e:{n}") for n in range(4)]
    affinity = Affinity()
    for number in range(50):
        home = affinity.choose(talk(f"question {number}"), places)
        home.inflight += 1
        later = talk(f"question {number}", "answer", "and then?")
        for place in places:
            assert affinity.choose(later, places).inflight <= 1.25 * (number + 2) / 4 + 1
            del place
    assert max(p.inflight for p in places) - min(p.inflight for p in places) <= 1

    idle = [Place(place.name) for place in places]
    homes = [affinity.choose(talk(f"new {n}"), idle[n % 4 : n % 4 + 1]) for n in range(40)]
    turns = [affinity.choose(talk(f"new {n}", "a", "b"), idle) for n in range(40)]
    assert homes == turns


def test_workers_agree_where_a_conversation_goes() -> None:
    """Without memory the hash tells; a server that comes takes over only its part."""
    places = [Place(f"e:{n}") for n in range(4)]
    turns = [talk(f"question {n}", "answer", "more") for n in range(200)]
    one = [Affinity().choose(turn, places[:3]).name for turn in turns]
    assert one == [Affinity().choose(turn, places[2::-1]).name for turn in turns]
    assert all(40 < one.count(place.name) < 95 for place in places[:3])
    moved = [
        (old, new)
        for old, turn in zip(one, turns, strict=True)
        if (new := Affinity().choose(turn, places).name) != old
    ]
    assert 25 < len(moved) < 80
    assert {new for _, new in moved} == {"e:3"}


def test_a_full_home_is_left() -> None:
    """A conversation moves while the engine where it was has over 1.25 times its share."""
    home, other = Place("home"), Place("other")
    affinity = Affinity()
    affinity.choose(talk("q"), [home])
    turn = talk("q", "a", "q")
    home.inflight, other.inflight = 5, 3
    assert affinity.choose(turn, [home, other]) is home
    home.inflight, other.inflight = 6, 2
    assert affinity.choose(turn, [home, other]) is other
