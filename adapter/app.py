"""The application: `uvicorn adapter.app:app`."""

import gc
import os
import secrets
import socket
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from importlib.metadata import version

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from adapter.api import health, jobs, metrics, page, stream
from adapter.api.body import BodyMiddleware
from adapter.api.error_handlers import add_error_handlers
from adapter.api.head import HeadMiddleware
from adapter.api.openai import decisions
from adapter.api.openai import routes as openai
from adapter.api.openapi import extend_openapi
from adapter.auth.keys import Keyring
from adapter.auth.middleware import AuthMiddleware
from adapter.auth.rate_limit import RateLimiter
from adapter.db.database import Database
from adapter.engine.channel import TritonCredentials
from adapter.engine.fleet import Fleet
from adapter.engine.monitor import EngineMonitor
from adapter.engine.pool import Endpoint, EnginePool
from adapter.engine.resolve import Resolver
from adapter.engine.streaming import StreamingRequests
from adapter.engine.triton import TritonEngine
from adapter.errors import SettingsError
from adapter.jobs.runner import JobRunner
from adapter.jobs.service import JobService
from adapter.jobs.store import JobStore
from adapter.jobs.watcher import JobWatcher
from adapter.periodic import PeriodicTask
from adapter.setting_names import misspelt
from adapter.settings import OPEN_TO_ALL, Settings, load_settings, refuse_start
from adapter.shares import Shares
from adapter.shutdown import on_shutdown_signal
from adapter.telemetry.logs import configure_logging, get_logger
from adapter.telemetry.middleware import TelemetryMiddleware
from adapter.telemetry.tracing import configure_tracing
from adapter.types import Engine

log = get_logger()


def create_app(
    settings: Settings | None = None,
    *,
    engines: Mapping[str, Engine] | None = None,
) -> FastAPI:
    """Build the application. Raises `SettingsError`.

    Tests pass `engines` to be used instead of tritonservers: by address, or address/model.
    """
    chosen = load_settings() if settings is None else settings
    configure_logging(chosen.log_level, chosen.log_format)
    for warning in misspelt(os.environ):
        log.warning("setting_unknown", message=warning)
    keyring = Keyring(chosen.api_keys, chosen.api_keys_file)
    TritonCredentials.of(chosen).check()
    if chosen.is_public and not keyring.required:
        log.warning("open_to_all", message=OPEN_TO_ALL.format(host=chosen.host))
    flush_spans = configure_tracing() if chosen.tracing else None

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            if flush_spans is not None:
                stack.callback(flush_spans)
            try:
                await _open(app, chosen, _fleet(chosen, engines), stack)
            except SettingsError as error:
                app.state.refusal = str(error)
                raise
            with on_shutdown_signal(app.state.jobs.stop):
                yield

    app = FastAPI(
        title="dLLM-Serve",
        summary="Diffusion language models behind a REST API",
        version=version("dllm-serve"),
        lifespan=lifespan,
        # FastAPI's pages load scripts from elsewhere; ours is in api/page.py.
        docs_url=None,
        redoc_url=None,
        # Its redirects are whole addresses, with the host and scheme that this server was told of;
        # ours are in api/error_handlers.py.
        redirect_slashes=False,
    )
    app.state.settings = chosen
    routers = [m.router for m in (jobs, stream, openai, decisions, page, health, metrics)]
    routes = [route for router in routers for route in router.routes]
    # The last one added is the first that a call passes.
    app.add_middleware(HeadMiddleware)
    app.add_middleware(
        BodyMiddleware,
        routes=routes,
        max_bytes=chosen.max_body_bytes,
        timeout=chosen.body_timeout,
        key_share=chosen.key_share,
    )
    app.add_middleware(
        AuthMiddleware,
        keyring=keyring,
        guard_metrics=chosen.metrics_need_key,
    )
    if origins := [origin.strip() for origin in chosen.cors_origins.split(",") if origin.strip()]:
        # Outside the auth middleware: a browser sends its preflight without a key.
        app.add_middleware(
            CORSMiddleware,
            allow_origins=origins,
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],
            expose_headers=["Retry-After", "X-Request-ID"],
        )
    app.add_middleware(TelemetryMiddleware, routes=routes)
    app.add_middleware(_StartMiddleware)
    add_error_handlers(app)
    for router in routers:
        app.include_router(router)
    page.mount_files(app)
    extend_openapi(app, chosen)
    return app


async def _open(
    app: FastAPI,
    settings: Settings,
    fleet: Fleet,
    stack: AsyncExitStack,
) -> None:
    """Open the services in the order of their dependencies; the stack closes them in reverse."""
    worker = _worker_name()
    database = await stack.enter_async_context(
        Database.open(settings.database_url, timeout=settings.database_timeout)
    )
    tasks = [database.loop]
    app.state.rate_limiter = None
    if settings.rate_limit:
        app.state.rate_limiter = limiter = RateLimiter(database, settings.rate_limit)
        tidying = PeriodicTask("rate-limits", limiter.tidy)
        tasks.append(await stack.enter_async_context(tidying))
    store = JobStore(
        database, max_attempts=settings.job_max_attempts, default_model=settings.model_name
    )
    runner = JobRunner(store, fleet, owner=worker, settings=settings)
    watcher = JobWatcher(store, runner)
    make_shares = partial(
        Shares,
        settings.max_live,
        settings.key_share,
        what="calls wait for their answers",
        setting="DLLM_MAX_LIVE",
    )
    idle_timeout = settings.engine_idle_timeout
    live = StreamingRequests(fleet, make_shares=make_shares, idle_timeout=idle_timeout)
    database.subscribe(watcher.wake_all)
    for service in (fleet, watcher, runner, live):
        await stack.enter_async_context(service)
    app.state.database = database
    app.state.tasks = [*tasks, *runner.loops, watcher.loop]
    app.state.fleet = fleet
    app.state.live = live
    app.state.jobs = JobService(
        store,
        runner,
        watcher,
        fleet,
        max_queued=settings.max_queued_jobs,
        max_held=settings.max_held_polls,
        key_share=settings.key_share,
    )
    # These objects stay. Full collections that walk them delayed every call by 70 to 180 ms,
    # several times a minute.
    gc.collect()
    gc.freeze()
    found = sorted({endpoint.name for pool in fleet.pools for endpoint in pool.endpoints})
    log.info("worker_started", worker=worker, engines=found)


class _StartMiddleware:
    """Tells the server of a setting that is found wrong at start in a line, not by a traceback."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def told(message: Message) -> None:
            if message["type"] == "lifespan.startup.failed" and hasattr(state, "refusal"):
                message = {**message, "message": f"the adapter cannot start: {state.refusal}"}
            await send(message)

        state = scope["app"].state
        await self._app(scope, receive, told if scope["type"] == "lifespan" else send)


def _fleet(settings: Settings, engines: Mapping[str, Engine] | None) -> Fleet:
    def connect(address: str, url: str, model: str = settings.model_name) -> Engine:
        if engines is not None:
            return engines.get(f"{address}/{model}") or engines[address]
        return TritonEngine(
            address,
            model,
            stream_interval=settings.stream_interval,
            idle_timeout=settings.engine_idle_timeout,
            credentials=TritonCredentials.of(settings),
            found_by=url,
        )

    def endpoint(address: str, url: str, pool: EnginePool) -> Endpoint:
        engine = connect(address, url, pool.model)
        monitor = EngineMonitor(
            address,
            engine,
            model=pool.model,
            probe_interval=settings.probe_interval,
            idle_timeout=settings.engine_idle_timeout,
        )
        share = settings.share_prefixes
        return Endpoint(address, engine, monitor, pool.metrics, share_prefixes=share)

    return Fleet(
        settings.triton_urls if engines is None else [name for name in engines if "/" not in name],
        default=settings.model_name,
        served_name=settings.openai_model,
        connect=connect,
        endpoint=endpoint,
        interval=settings.discovery_interval,
        resolver=Resolver() if engines is None else Resolver(_no_lookup),
    )


async def _no_lookup(host: str) -> list[str]:
    return [host]


def _worker_name() -> str:
    """A name unique to each start, so that a restarted worker renews no old lease."""
    return f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"


def _served_app() -> FastAPI:
    """The application for uvicorn; a bad setting is one line instead of a traceback."""
    try:
        return create_app()
    except SettingsError as error:
        refuse_start(str(error))


app = _served_app()
