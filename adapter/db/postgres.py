"""PostgreSQL, over pools of connections on which every wait has a limit."""

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any, TypeVar
from urllib.parse import urlencode

import asyncpg  # type: ignore[import-untyped]
from sqlalchemy import URL, Connection, event, make_url, text
from sqlalchemy.engine import ExceptionContext
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from adapter.errors import StoreUnavailable
from adapter.settings import LIBPQ_PARAMETERS

T = TypeVar("T")

#: Connections in each pool: by default PostgreSQL has 100 for all workers together.
POOL_SIZE = 4
CONNECT_SECONDS = 3.0
#: Longest time to tell a silent server that its connection is given up.
CLOSE_SECONDS = 0.5
PING_SECONDS = 2.0
MIGRATION_SECONDS = 600.0
#: SQLSTATE of a write on a server that became a standby.
READ_ONLY = "25006"


class PostgresBackend:
    """A PostgreSQL server, reached over pools of connections.

    Readers have their own pool: a poll does not wait behind writers that wait for a lock. The ping
    has its own connection: a busy worker is not taken for a silent server.
    """

    def __init__(self, url: str, *, timeout: float) -> None:
        self._timeout = timeout
        pool = {"pool_size": POOL_SIZE, "pool_pre_ping": True}
        autocommit = {"isolation_level": "AUTOCOMMIT", "pool_reset_on_return": None}
        self._reader = _make_engine(url, timeout, **autocommit, **pool)
        self._writer = _make_engine(url, timeout, **pool)
        self._pinger = _make_engine(url, timeout, **autocommit, pool_size=1)

    async def read(self, query: Callable[[Connection], T]) -> T:
        """Read over any free connection."""
        async with _limit(self._timeout), self._reader.connect() as connection:
            return await connection.run_sync(query)

    async def write(self, change: Callable[[Connection], T], *, timeout: float | None = None) -> T:
        """Write over any free connection."""
        async with _limit(timeout or self._timeout), self._writer.begin() as connection:
            return await connection.run_sync(change)

    async def migrate(self, change: Callable[[Connection], T]) -> T:
        """Write, with much time: a large table takes long to change, and other workers wait."""
        async with _limit(MIGRATION_SECONDS), self._writer.begin() as connection:
            for limit in ("statement_timeout", "lock_timeout"):
                await connection.execute(text(f"SET LOCAL {limit} = '{MIGRATION_SECONDS:g}s'"))
            return await connection.run_sync(change)

    async def ping(self) -> None:
        """See whether the server answers and takes writes."""
        async with _limit(min(PING_SECONDS, self._timeout)), self._pinger.connect() as connection:
            if await connection.scalar(text("SELECT pg_is_in_recovery()")):
                await _leave(connection)

    async def close(self) -> None:
        """Close all connections."""
        for engine in (self._reader, self._writer, self._pinger):
            await engine.dispose()


class _Connection(asyncpg.Connection):  # type: ignore[misc]
    """A connection whose end takes half a second at most, even if the server is silent."""

    async def close(self, *, timeout: float | None = None) -> None:
        """End the running statement and close; the driver aborts when the time is over."""
        with suppress(TimeoutError):
            await super().close(timeout=min(CLOSE_SECONDS, timeout or CLOSE_SECONDS))

    def limit_unacknowledged(self, seconds: float) -> None:
        """Have the kernel give the connection up if what is sent is not acknowledged for so long.

        Elsewhere than on Linux, and for sockets of this machine's file system, nothing is done.
        """
        shared = self._transport.get_extra_info("socket")
        if shared.family not in (socket.AF_INET, socket.AF_INET6):
            return
        option = getattr(socket, "TCP_USER_TIMEOUT", None)
        if option is not None:
            # A copy of the descriptor, since uvloop's object cannot set options.
            with socket.socket(fileno=os.dup(shared.fileno())) as tcp:
                tcp.setsockopt(socket.IPPROTO_TCP, option, round(seconds * 1000))


def _make_engine(url: str, timeout: float, **options: Any) -> AsyncEngine:
    address, libpq = _split(url)
    engine = create_async_engine(
        address,
        max_overflow=0,
        pool_timeout=timeout,
        hide_parameters=True,  # keeps prompts out of logged errors
        connect_args={
            "timeout": min(CONNECT_SECONDS, timeout),
            "connection_class": _Connection,
            **libpq,
        },
        **options,
    )
    event.listen(engine.sync_engine, "connect", _limit_server(timeout))
    event.listen(engine.sync_engine, "handle_error", _on_error)
    return engine


def _split(url: str) -> tuple[URL, dict[str, str]]:
    """The address without libpq's parameters, and these as an argument of the driver.

    SQLAlchemy knows them by other names. The driver reads their files at each new connection.
    """
    address = make_url(url)
    libpq = {name: value for name, value in address.query.items() if name in LIBPQ_PARAMETERS}
    rest = address.difference_update_query(libpq)
    return rest, {"dsn": f"postgresql:///?{urlencode(libpq)}"} if libpq else {}


def _limit_server(timeout: float) -> Callable[[Any, object], None]:
    """Have the server end statements, lock waits and transactions that this side has given up.

    Both sides give up a connection on which nothing arrives any more. The server's limits are set
    by statements, not by parameters of the connection: PgBouncer refuses those.
    """
    whole, half = round(timeout * 1000), round(timeout * 500)
    limits = (
        f"SET statement_timeout = {whole};"
        f"SET lock_timeout = {half};"
        f"SET idle_in_transaction_session_timeout = {whole};"
        f"SET tcp_user_timeout = {whole}"
    )

    def connected(connection: Any, _record: object) -> None:
        connection.driver_connection.limit_unacknowledged(timeout)
        connection.run_async(lambda driver: driver.execute(limits))

    return connected


def _on_error(context: ExceptionContext) -> None:
    """Leave a server that became a standby: a new connection may find the new primary."""
    if getattr(context.original_exception, "sqlstate", None) == READ_ONLY:
        context.is_disconnect = True


async def _leave(connection: AsyncConnection) -> None:
    await connection.invalidate()
    msg = "the job store is a standby and takes no writes"
    raise StoreUnavailable(msg)


@asynccontextmanager
async def _limit(seconds: float) -> AsyncIterator[None]:
    """Limit a whole transaction, from waiting for a free connection to the commit.

    When the time is over, SQLAlchemy gives the connection up.
    """
    try:
        async with asyncio.timeout(seconds) as limit:
            yield
    except TimeoutError:
        if not limit.expired():
            raise
        msg = f"the job store has not answered for {seconds:g} s"
        raise StoreUnavailable(msg) from None
