"""The connection to the SQL database: SQLite in a file, or PostgreSQL."""

import asyncio
import sqlite3
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Any, Protocol, Self, TypeVar

from sqlalchemy import Connection, Row, Select, UpdateBase
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from adapter.db.dialects import advisory_lock
from adapter.db.migrate import current_revision, downgrade_schema, is_current, upgrade_schema
from adapter.db.postgres import PostgresBackend
from adapter.db.sqlite import SqliteBackend
from adapter.errors import AdapterError, SettingsError, StoreUnavailable
from adapter.periodic import PeriodicTask
from adapter.telemetry.logs import get_logger
from adapter.telemetry.metrics import DATABASE_READY, observe_transaction

log = get_logger()

T = TypeVar("T")
Values = Mapping[str, Any]

OPEN_ATTEMPTS = 100
#: Limit of a transaction, in seconds.
DEFAULT_TIMEOUT = 5.0
PING_PAUSE = 1.0
RETRY_PAUSE = 0.2
#: Pings that must fail in a row: a single connection may break without a cause that lasts.
OUTAGE_FAILURES = 2
#: The address is wrong: user or password, name of the database.
WRONG_ADDRESS_SQLSTATES = ("28", "3D")
#: SQLSTATEs, or classes of them, that do not blame the statement: connection lost, server has
#: become a standby, transaction to be repeated, resources such as connections used up, lock not
#: available, server starting or stopping.
TRANSIENT_SQLSTATES = ("08", "25006", "40", "53", "55P03", "57")
SCHEMA_LOCK = 0x644C4C4D  # any number, as long as all workers use the same


class Database:
    """Reads and writes as transactions. Both raise `StoreUnavailable` when it does not answer.

    Between `open` and its end a ping each second tells whether the database answers. While it does
    not, transactions fail at once instead of each waiting for its limit.
    """

    def __init__(self, backend: "Backend") -> None:
        self._backend = backend
        self._prepared = False
        self._preparing: asyncio.Task[None] | None = None
        self._failures = 0
        self._listeners: list[Callable[[], None]] = []
        #: Why the database cannot be used now; None if it can.
        self.outage: str | None = None
        #: Pings.
        self.loop = PeriodicTask("database-ping", self._look)

    @classmethod
    @asynccontextmanager
    async def open(cls, url: str, *, timeout: float = DEFAULT_TIMEOUT) -> AsyncIterator[Self]:
        """Connect, and bring the schema up to date; any number of processes may do so at once.

        If the database does not answer, that is its `outage`, and it is prepared once it does.
        Raises `SettingsError` if a later release has changed the schema, or the address is wrong.
        """
        async with connect(url, timeout=timeout) as backend:
            database = cls(backend)
            try:
                await database._prepare()
            except StoreUnavailable as error:
                database._set_outage(str(error))
            else:
                DATABASE_READY.set(1)
            try:
                async with database.loop:
                    yield database
            finally:
                await database._stop_preparing()

    def subscribe(self, listener: Callable[[], None]) -> None:
        """Call `listener` when an outage begins or ends."""
        self._listeners.append(listener)

    async def read(self, query: Select[Any], values: Values | None = None) -> Sequence[Row[Any]]:
        """The rows of one query, which is a transaction by itself."""
        self._require()
        with _transaction("read"):
            return await self._backend.read(
                lambda connection: connection.execute(query, values).all()
            )

    async def write(self, change: Callable[[Connection], T], *, timeout: float | None = None) -> T:
        """Call `change` in a writing transaction; SQLite runs one at a time.

        `change` may be called again if the database was busy; the first call then changed nothing.
        `timeout` is the limit of this transaction, in seconds.
        """
        self._require()
        with _transaction("write"):
            return await self._backend.write(change, timeout=timeout)

    async def change(self, statement: UpdateBase, values: Values | None = None) -> int:
        """Execute one writing statement; the number of rows it concerned."""
        return await self.write(lambda connection: connection.execute(statement, values).rowcount)

    def _require(self) -> None:
        if self.outage is not None:
            raise StoreUnavailable(self.outage)

    async def _look(self) -> float:
        """Ping the database; two failures in a row are an outage."""
        try:
            with _transaction("read"):
                await self._backend.ping()
            if not self._prepared:
                await self._continue_preparing()
        except AdapterError as error:
            self._failures += 1
            if self._failures >= OUTAGE_FAILURES:
                self._set_outage(str(error))
                return PING_PAUSE
            return RETRY_PAUSE
        self._failures = 0
        self._set_outage(None)
        return PING_PAUSE

    def _set_outage(self, outage: str | None) -> None:
        changed = (outage is None) != (self.outage is None)
        self.outage = outage
        if not changed:
            return
        write = log.info if outage is None else log.warning
        write("database_state", ok=outage is None, reason=outage or "")
        DATABASE_READY.set(outage is None)
        for listener in self._listeners:
            listener()

    async def _continue_preparing(self) -> None:
        """Prepare the database in a task of its own, since a large table takes long to change.

        Raises `StoreUnavailable` while it runs: the pings go on.
        """
        if self._preparing is None:
            self._preparing = asyncio.create_task(self._prepare(), name="database-upgrade")
        await asyncio.wait([self._preparing], timeout=PING_PAUSE)
        if not self._preparing.done():
            msg = "the job store's schema is being upgraded"
            raise StoreUnavailable(msg)
        task, self._preparing = self._preparing, None
        task.result()

    async def _stop_preparing(self) -> None:
        if self._preparing is not None:
            self._preparing.cancel()
            await asyncio.wait([self._preparing])

    async def _prepare(self) -> None:
        """Upgrade the schema under a lock, if it needs to be.

        SQLite does not wait for the lock that turns WAL on.
        """
        for attempt in range(1, OPEN_ATTEMPTS + 1):
            try:
                with _transaction("write"):
                    if not await self._backend.read(is_current):
                        await self._backend.migrate(_upgrade)
            except StoreUnavailable as error:
                if attempt == OPEN_ATTEMPTS or "locked" not in str(error):
                    raise
                await asyncio.sleep(0.1)
            else:
                self._prepared = True
                return


class Backend(Protocol):
    """Runs transactions on one kind of database."""

    async def read(self, query: Callable[[Connection], T]) -> T:
        """Call `query` with a connection that begins no transaction, so none has to end."""
        ...

    async def write(self, change: Callable[[Connection], T], *, timeout: float | None = None) -> T:
        """Call `change` in a transaction; commit it, or roll it back if `change` raises."""
        ...

    async def migrate(self, change: Callable[[Connection], T]) -> T:
        """As `write`, for as long as it takes."""
        ...

    async def ping(self) -> None:
        """See whether the database answers and takes writes."""
        ...


@contextmanager
def _transaction(kind: str) -> Iterator[None]:
    """Time a transaction, and raise `StoreUnavailable` for errors that will pass."""
    began = time.perf_counter()
    try:
        yield
    except (OperationalError, InterfaceError) as error:
        msg = f"the job store does not answer: {error.orig}"
        raise StoreUnavailable(msg) from error
    except sqlite3.Error as error:
        msg = f"the job store does not answer: {error}"
        raise StoreUnavailable(msg) from error
    except (PoolTimeoutError, OSError) as error:
        msg = f"the job store cannot be reached: {str(error) or 'no answer in time'}"
        raise StoreUnavailable(msg) from error
    except Exception as error:
        # SQLAlchemy does not wrap every error that a driver raises while it connects.
        cause = error.orig if isinstance(error, DBAPIError) else error
        invalidated = isinstance(error, DBAPIError) and error.connection_invalidated
        sqlstate = getattr(cause, "sqlstate", None) or ""
        if sqlstate.startswith(WRONG_ADDRESS_SQLSTATES):
            msg = f"DLLM_DATABASE_URL: {cause}"
            raise SettingsError(msg) from error
        if not invalidated and not sqlstate.startswith(TRANSIENT_SQLSTATES):
            raise
        msg = f"the connection to the job store has failed: {cause}"
        raise StoreUnavailable(msg) from error
    finally:
        observe_transaction(kind, time.perf_counter() - began)


@asynccontextmanager
async def connect(url: str, *, timeout: float = DEFAULT_TIMEOUT) -> AsyncIterator[Backend]:
    """Open the backend that the address names."""
    if url.startswith("sqlite"):
        file = SqliteBackend(url, timeout=timeout)
        try:
            yield file
        finally:
            file.close()
    else:
        server = PostgresBackend(url, timeout=timeout)
        try:
            yield server
        finally:
            await server.close()


async def migrate(backend: Backend, revision: str | None = None) -> tuple[str | None, str | None]:
    """Upgrade the schema, or downgrade it to a revision; the revisions before and after.

    Raises `SettingsError` for a revision that cannot be reached, and `StoreUnavailable`.
    """

    def change(connection: Connection) -> tuple[str | None, str | None]:
        advisory_lock(connection, SCHEMA_LOCK)
        before = current_revision(connection)
        if revision is None:
            upgrade_schema(connection)
        else:
            downgrade_schema(connection, revision)
        return before, current_revision(connection)

    with _transaction("write"):
        return await backend.migrate(change)


def _upgrade(connection: Connection) -> None:
    advisory_lock(connection, SCHEMA_LOCK)
    upgrade_schema(connection)
