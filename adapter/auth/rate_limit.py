"""Rate limits: prompts counted in the database, so that all workers share the count."""

import hashlib
import math
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from sqlalchemy import Connection, case, delete, or_, select, update

from adapter.db.database import Database
from adapter.db.dialects import insert_into
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


@dataclass(frozen=True, slots=True)
class Counted:
    """Prompts that were counted in one window."""

    key: str
    #: When the window is over, which tells it from the next one.
    ends: float
    prompts: int


class RateLimiter:
    """Counts the prompts of each caller; a caller's window begins with its first call."""

    def __init__(
        self, database: Database, rates: str, clock: Callable[[], float] = time.time
    ) -> None:
        self._database = database
        self._rates = Rate.parse_all(rates)
        self._clock = clock
        self._next_warning = 0.0

    @property
    def most_at_once(self) -> int:
        """The most prompts that one call may ever have."""
        return min(rate.calls for rate in self._rates)

    async def hit(self, caller: str, prompts: int = 1) -> list[Counted]:
        """Count the prompts of a call, or none of them if they are too many. Raises `RateLimited`.

        Returns what `give_back` takes. While the database does not answer, calls pass uncounted:
        streams need no database, and a limit that fails closed would end them.
        """
        if len(caller) > MAX_CALLER:  # a proxy passes on whatever its client called itself
            caller = hashlib.sha256(caller.encode(errors="surrogateescape")).hexdigest()

        # In one transaction: a call that one rate refuses does not count for another.
        def count(connection: Connection) -> list[Counted]:
            return [
                self._count(connection, f"{caller} {rate}", rate, prompts) for rate in self._rates
            ]

        try:
            return await self._database.write(count, timeout=COUNT_SECONDS)
        except StoreUnavailable as error:
            self._skip(error)
            return []

    async def give_back(self, counted: Sequence[Counted]) -> None:
        """Subtract what was counted, unless its window is over or the database does not answer."""

        def subtract(connection: Connection) -> None:
            for item in counted:
                window = update(rate_limits).where(
                    rate_limits.c.key == item.key, rate_limits.c.expires == item.ends
                )
                connection.execute(window.values(calls=rate_limits.c.calls - item.prompts))

        with suppress(StoreUnavailable):
            await self._database.write(subtract, timeout=COUNT_SECONDS)

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

    def _count(self, connection: Connection, key: str, rate: Rate, prompts: int) -> Counted:
        """Add to the window, or begin a new one. Raises `RateLimited`."""
        now = self._clock()
        calls, ends = rate_limits.c.calls, rate_limits.c.expires
        over = ends <= now
        first = insert_into(connection, rate_limits).values(
            key=key, calls=prompts, expires=now + rate.seconds
        )
        upsert = first.on_conflict_do_update(
            index_elements=[rate_limits.c.key],
            set_={
                "calls": case((over, prompts), else_=calls + prompts),
                "expires": case((over, now + rate.seconds), else_=ends),
            },
            where=or_(over, calls + prompts <= rate.calls),
        ).returning(ends)
        counted_until = connection.scalar(upsert)
        if counted_until is None:
            window_ends = connection.scalar(select(ends).where(rate_limits.c.key == key)) or now
            msg = f"more prompts than {rate} (DLLM_RATE_LIMIT)"
            raise RateLimited(msg, retry_after=max(1, math.ceil(window_ends - now)))
        return Counted(key, counted_until, prompts)


class Quota:
    """The prompts that one call has counted against its caller's rates."""

    def __init__(self, limiter: RateLimiter, caller: str) -> None:
        self._limiter = limiter
        self._caller = caller
        self._counted: list[Counted] = []

    async def take(self, prompts: int = 1) -> None:
        """Count prompts of the call. Raises `RateLimited`."""
        self._counted += await self._limiter.hit(self._caller, prompts)

    async def give_back(self) -> None:
        """Count nothing: the call is refused."""
        counted, self._counted = self._counted, []
        if counted:
            await self._limiter.give_back(counted)
