"""All models of all tritonservers: a pool of engines for each model.

Looks again and again which servers the names in `DLLM_TRITON_URL` stand for, and which models they
have.
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, Self

from adapter.engine.pool import Endpoint, EnginePool
from adapter.engine.resolve import Resolver
from adapter.errors import AdapterError, Unavailable, UnknownModel
from adapter.periodic import PeriodicTask
from adapter.telemetry.logs import get_logger
from adapter.types import Engine, Repository

log = get_logger()

#: Longest wait for a server's list of models.
INDEX_SECONDS = 2.0


class MakeEndpoint(Protocol):
    """Makes the endpoint of a pool's model at an address, which comes from one of the URLs."""

    def __call__(self, address: str, url: str, pool: EnginePool) -> Endpoint: ...


@dataclass(eq=False)
class Server:
    """A tritonserver, and what it has said about its models."""

    address: str
    #: The setting's entry that the address comes from.
    url: str
    #: Asks for the list of models.
    engine: Engine
    repository: Repository | None = None

    async def look(self) -> None:
        """Ask for the list of models; without an answer the last one stays."""
        try:
            async with asyncio.timeout(INDEX_SECONDS):
                self.repository = await self.engine.repository(self.repository)
        except (TimeoutError, AdapterError) as error:
            log.debug("models_not_listed", server=self.address, error=str(error) or "no answer")


class Fleet:
    """The pools of all models; a context manager that opens and closes their engines.

    Args:
        urls: addresses as host:port; a name may stand for several servers.
        default: Triton's name of the model of calls that name none.
        served_name: the default model's name in calls.
        connect: makes an engine of the default model at an address, which comes from a URL.
        endpoint: makes an endpoint.
        interval: seconds between two looks.
    """

    def __init__(
        self,
        urls: Sequence[str],
        *,
        default: str,
        served_name: str,
        connect: Callable[[str, str], Engine],
        endpoint: MakeEndpoint,
        interval: float,
        resolver: Resolver | None = None,
    ) -> None:
        self._urls = urls
        self._connect = connect
        self._endpoint = endpoint
        self._interval = interval
        self._resolver = resolver or Resolver()
        self._servers: dict[str, Server] = {}
        self._listeners: list[Callable[[], None]] = []
        #: The pool of calls that name no model.
        self.default = EnginePool(default, served_name)
        self._pools = {default: self.default}
        self._task = PeriodicTask("discovery", self._step)
        self.default.subscribe(self._task.wake)

    @property
    def pools(self) -> list[EnginePool]:
        """The pools of all models that some server has, the default first."""
        return [p for p in self._pools.values() if p.endpoints or p is self.default]

    @property
    def loops(self) -> list[PeriodicTask]:
        """The background tasks."""
        monitors = (e.monitor.loop for pool in self.pools for e in pool.endpoints)
        return [self._task, *monitors]

    def find(self, name: str | None) -> EnginePool:
        """The model that a call names; the default if it names none.

        Raises `UnknownModel`, or `Unavailable` if it may be known later.
        """
        if name is None:
            return self.default
        for pool in self.pools:
            if pool.served_name == name:
                return pool
        for server in self._servers.values():
            if server.repository is not None and name in server.repository.unready:
                msg = f"the model {name!r} is not loaded: {server.repository.unready[name]}"
                raise Unavailable(msg)
        silent = [s.address for s in self._servers.values() if s.repository is None]
        if silent:
            msg = f"the model {name!r} may be one of {silent[0]}, which has not answered yet"
            raise Unavailable(msg)
        known = ", ".join(repr(pool.served_name) for pool in self.pools)
        msg = f"the model {name!r} does not exist; this server has {known}"
        raise UnknownModel(msg)

    def of_job(self, model: str | None) -> EnginePool:
        """The pool of a job's model by its name at Triton; it may have no endpoints."""
        if model is None:
            return self.default
        return self._pools.get(model) or EnginePool(model)

    def cancel(self, request_id: str) -> None:
        """Cancel the requests with this id wherever they are."""
        for pool in self._pools.values():
            pool.cancel(request_id)

    def subscribe(self, listener: Callable[[], None]) -> None:
        """Call `listener` after every change of an endpoint's state."""
        self._listeners.append(listener)
        for pool in self._pools.values():
            pool.subscribe(listener)

    async def __aenter__(self) -> Self:
        await self._step()
        await self._task.__aenter__()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._task.__aexit__()
        for pool in self._pools.values():
            await pool.__aexit__()
        for server in self._servers.values():
            await server.engine.close()

    async def _step(self) -> float:
        found = await self._resolver.resolve(self._urls)
        gone = [server for address, server in self._servers.items() if address not in found]
        for address, url in found.items():
            if address not in self._servers:
                self._servers[address] = Server(address, url, self._connect(address, url))
        servers = [server for server in self._servers.values() if server not in gone]
        await asyncio.gather(*(server.look() for server in servers))
        await self._update(self._wanted(servers))
        for server in gone:
            del self._servers[server.address]
            await server.engine.close()
        return self._interval

    def _wanted(self, servers: Sequence[Server]) -> dict[str, dict[str, Server]]:
        """The servers of each model by address; one that has not answered has the default model."""
        wanted: dict[str, dict[str, Server]] = {name: {} for name in self._pools}
        for server in servers:
            listed = server.repository or Repository()
            models = set(listed.engines) or {self.default.model}
            if self.default.model in listed.unready:
                models.add(self.default.model)
            for model in sorted(models):
                wanted.setdefault(model, {})[server.address] = server
        return wanted

    async def _update(self, wanted: Mapping[str, Mapping[str, Server]]) -> None:
        for model, servers in wanted.items():
            if model not in self._pools:
                self._pools[model] = pool = EnginePool(model)
                for listener in (self._task.wake, *self._listeners):
                    pool.subscribe(listener)
            pool = self._pools[model]
            present = {endpoint.name for endpoint in pool.endpoints}
            for address, server in servers.items():
                if address not in present and not pool.bring_back(address):
                    log.info("engine_found", engine=address, model=model)
                    await pool.add(self._endpoint(address, server.url, pool))
            self._retire(pool, servers)

    def _retire(self, pool: EnginePool, servers: Mapping[str, Server]) -> None:
        """Let go of endpoints whose server is gone.

        One that still answers stays until another one does: the new ones may not be ready yet.
        """
        gone = [endpoint for endpoint in pool.endpoints if endpoint.name not in servers]
        ready = any(e.monitor.state.ok for e in pool.endpoints if e.name in servers)
        for endpoint in gone:
            if ready or not servers or not endpoint.monitor.state.ok:
                log.info("engine_gone", engine=endpoint.name, model=pool.model)
                pool.retire(endpoint)
