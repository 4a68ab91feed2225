"""Rate limits: calls counted in the database, so that all workers share the count."""

import hashlib
import math
import time
from collections.abc import Callable, Mapping

from sqlalchemy import Connection, Table, case, delete, select
from sqlalchemy.dialects import postgresql, sqlite

from adapter.db.database import Database
from adapter.db.tables import rate_limits
from adapter.errors import RateLimited, StoreUnavailable
from adapter.rates import Rate
from adapter.telemetry.logs import get_logger
from adapter.telemetry.metrics import RATE_LIMIT_SKIPPED

log = get_logger()

TIDY_SECONDS = 60.0
#: Longer names of callers are hashed, to fit the table's column.
MAX_CALLER = 128
#: A call waits no longer than this to be counted.
COUNT_SECONDS = 2.0
WARNING_SECONDS = 60.0

#: SQLAlchemy has an upsert for each database.
INSERTS: Mapping[str, Callable[[Table], postgresql.Insert | sqlite.Insert]] = {
    "postgresql": postgresql.insert,
    "sqlite": sqlite.insert,
}


class RateLimiter:
    """Counts the calls of each caller; a caller's window begins with its first call."""

    def __init__(
        self, database: Database, rates: str, clock: Callable[[], float] = time.time
    ) -> None:
        self._database = database
        self._rates = Rate.parse_all(rates)
        self._clock = clock
        self._next_warning = 0.0

    async def hit(self, caller: str) -> None:
        """Count a call. Raises `RateLimited`.

        While the database does not answer, calls pass uncounted: streams need no database, and a
        limit that fails closed would end them.
        """
        if len(caller) > MAX_CALLER:  # a proxy passes on whatever its client called itself
            caller = hashlib.sha256(caller.encode(errors="surrogateescape")).hexdigest()
        for rate in self._rates:
            try:
                calls, expires = await self._count(f"{caller} {rate}", rate.seconds)
            except StoreUnavailable as error:
                self._skip(error)
                return
            if calls > rate.calls:
                msg = f"more calls than {rate} (DLLM_RATE_LIMIT)"
                raise RateLimited(msg, retry_after=max(1, math.ceil(expires - self._clock())))

    def _skip(self, error: StoreUnavailable) -> None:
        RATE_LIMIT_SKIPPED.inc()
        now = self._clock()
        if now >= self._next_warning:
            self._next_warning = now + WARNING_SECONDS
            log.warning("rate_limit_skipped", error=str(error))

    async def tidy(self) -> float:
        """Delete windows that are over; returns the seconds until the next time."""
        over = rate_limits.c.expires <= self._clock()
        if await self._database.read(select(rate_limits.c.key).where(over).limit(1)):
            await self._database.change(delete(rate_limits).where(over))
        return TIDY_SECONDS

    async def _count(self, key: str, seconds: int) -> tuple[int, float]:
        """Add a call to the window, or begin a new one; returns its calls, and when it is over."""
        now = self._clock()
        over = rate_limits.c.expires <= now

        def change(connection: Connection) -> tuple[int, float]:
            first = INSERTS[connection.dialect.name](rate_limits).values(
                key=key, calls=1, expires=now + seconds
            )
            upsert = first.on_conflict_do_update(
                index_elements=[rate_limits.c.key],
                set_={
                    "calls": case((over, 1), else_=rate_limits.c.calls + 1),
                    "expires": case((over, now + seconds), else_=rate_limits.c.expires),
                },
            ).returning(rate_limits.c.calls, rate_limits.c.expires)
            calls, expires = connection.execute(upsert).one()
            return calls, expires

        return await self._database.write(change, timeout=COUNT_SECONDS)
