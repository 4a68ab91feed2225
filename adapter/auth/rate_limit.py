"""Rate limits: calls counted in the database, so that all workers share the count."""

import math
import time
from collections.abc import Callable

from limits import parse_many
from limits.aio.storage import Storage
from limits.aio.strategies import FixedWindowRateLimiter
from sqlalchemy import ColumnElement, Connection, case, delete, insert, select, update
from sqlalchemy.exc import IntegrityError

from adapter.db.database import Database
from adapter.db.tables import rate_limits
from adapter.errors import RateLimited

TIDY_SECONDS = 60.0


class RateLimiter:
    """Counts calls of each caller; a caller's window begins with its first call.

    `rates` are like `60/minute`, or `5/second; 60/minute`.
    """

    def __init__(self, database: Database, rates: str) -> None:
        self._rates = parse_many(rates)
        self._storage = DatabaseStorage(database)
        self._limiter = FixedWindowRateLimiter(self._storage)

    async def hit(self, caller: str) -> None:
        """Count a call. Raises `RateLimited`, `StoreUnavailable`."""
        for rate in self._rates:
            if not await self._limiter.hit(rate, caller):
                stats = await self._limiter.get_window_stats(rate, caller)
                msg = f"more calls than {rate} (DLLM_RATE_LIMIT)"
                raise RateLimited(
                    msg, retry_after=max(1, math.ceil(stats.reset_time - time.time()))
                )

    async def tidy(self) -> float:
        """Forget windows that are over; the seconds until that is worth doing again."""
        await self._storage.purge()
        return TIDY_SECONDS


class DatabaseStorage(Storage):
    """The counts of `limits` in the table `rate_limits`: a row for each caller and limit."""

    STORAGE_SCHEME = None

    def __init__(self, database: Database, clock: Callable[[], float] = time.time) -> None:
        super().__init__()
        self._database = database
        self._clock = clock

    @property
    def base_exceptions(self) -> type[Exception]:
        """What `limits` would wrap if it were asked to."""
        return Exception

    async def incr(self, key: str, expiry: int, amount: int = 1) -> int:
        """Count; the window begins anew where it is over."""
        try:
            return await self._incr(key, expiry, amount)
        except IntegrityError:  # the caller's first two calls came at once
            return await self._incr(key, expiry, amount)

    async def _incr(self, key: str, expiry: int, amount: int) -> int:
        now = self._clock()
        over = rate_limits.c.expires <= now
        count = (
            update(rate_limits)
            .where(rate_limits.c.key == key)
            .values(
                calls=case((over, amount), else_=rate_limits.c.calls + amount),
                expires=case((over, now + expiry), else_=rate_limits.c.expires),
            )
            .returning(rate_limits.c.calls)
        )
        first = insert(rate_limits).values(key=key, calls=amount, expires=now + expiry)

        def change(connection: Connection) -> int:
            calls = connection.scalar(count)
            if calls is None:
                connection.execute(first)
                return amount
            return int(calls)

        return await self._database.write(change)

    async def get(self, key: str) -> int:
        """The calls of the present window."""
        query = select(rate_limits.c.calls).where(
            rate_limits.c.key == key, rate_limits.c.expires > self._clock()
        )
        rows = await self._database.read(query)
        return int(rows[0].calls) if rows else 0

    async def get_expiry(self, key: str) -> float:
        """When the present window is over."""
        query = select(rate_limits.c.expires).where(rate_limits.c.key == key)
        rows = await self._database.read(query)
        return float(rows[0].expires) if rows else self._clock()

    async def check(self) -> bool:
        """Whether the database answers. Raises `StoreUnavailable` if not."""
        await self.get("")
        return True

    async def clear(self, key: str) -> None:
        """Forget the calls of one caller."""
        await self._delete(rate_limits.c.key == key)

    async def reset(self) -> int | None:
        """Forget all calls; how many windows there were."""
        return await self._delete()

    async def purge(self) -> None:
        """Forget windows that are over."""
        over = rate_limits.c.expires <= self._clock()
        if await self._database.read(select(rate_limits.c.key).where(over).limit(1)):
            await self._delete(over)

    async def _delete(self, *which: ColumnElement[bool]) -> int:
        return await self._database.change(delete(rate_limits).where(*which))
