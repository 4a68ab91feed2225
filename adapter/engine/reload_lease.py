"""The row in the database by which workers agree on who replaces a dead engine, and when."""

import ipaddress
import socket
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass

from sqlalchemy import ColumnElement, and_, delete, insert, or_, select, update
from sqlalchemy.exc import IntegrityError

from adapter.db.database import Database
from adapter.db.tables import engine_heal

#: Engines that no worker has heard from for longer are forgotten: their names have left the
#: configuration. One that comes back, or was dead for so long, gets a new record.
FORGET_SECONDS = 30 * 86_400.0
FORGETTING_PAUSE = 3600.0


@dataclass(frozen=True, slots=True)
class EngineRecord:
    """What all workers know about one engine."""

    epoch: int
    #: A worker has begun to replace it.
    healing: bool
    #: That worker has stopped renewing its lease.
    abandoned: bool
    #: Seconds since any worker heard from it.
    silent_for: float


class HealStore:
    """The record of one engine. Every method may raise `StoreUnavailable`."""

    def __init__(
        self,
        database: Database,
        *,
        engine: str,
        owner: str,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._database = database
        self.engine = engine
        self._owner = owner
        self._clock = clock

    async def read(self) -> EngineRecord:
        """The record, made on first sight."""
        query = select(engine_heal).where(engine_heal.c.engine == self.engine)
        rows = await self._database.read(query)
        now = self._clock()
        if not rows:
            await self._create(now)
            return EngineRecord(epoch=0, healing=False, abandoned=False, silent_for=0.0)
        row = rows[0]
        return EngineRecord(
            epoch=row.epoch,
            healing=row.healer is not None,
            abandoned=row.healer is not None and row.lease_expires < now,
            silent_for=now - row.last_life,
        )

    async def publish_life(self) -> None:
        """Tell the other workers that the engine has answered just now."""
        await self._update(engine_heal.c.engine == self.engine, last_life=self._clock())

    async def begin(self, *, epoch: int, lease: float) -> bool:
        """Become the one who replaces the engine of `epoch`. False if somebody else is or was."""
        now = self._clock()
        free = or_(engine_heal.c.healer.is_(None), engine_heal.c.lease_expires < now)
        return await self._update(
            free,
            engine_heal.c.epoch == epoch,
            healer=self._owner,
            lease_expires=now + lease,
        )

    async def renew(self, *, lease: float) -> bool:
        """Go on replacing it. False if somebody else has taken that over."""
        return await self._update(self._mine, lease_expires=self._clock() + lease)

    async def finish(self) -> bool:
        """The engine was replaced: begin its next epoch."""
        return await self._update(
            self._mine,
            healer=None,
            epoch=engine_heal.c.epoch + 1,
            last_life=self._clock(),
        )

    async def abort(self) -> bool:
        """It was not replaced, and nothing was begun that another worker must end."""
        return await self._update(self._mine, healer=None)

    async def abandon(self) -> bool:
        """Leave in the middle: another worker, or the next start, shall begin anew at once."""
        return await self._update(self._mine, lease_expires=0.0)

    @property
    def _mine(self) -> ColumnElement[bool]:
        return engine_heal.c.healer == self._owner

    async def _update(self, *conditions: ColumnElement[bool], **values: object) -> bool:
        record = update(engine_heal).where(engine_heal.c.engine == self.engine, *conditions)
        return await self._database.change(record.values(**values)) == 1

    async def _create(self, now: float) -> None:
        row = insert(engine_heal).values(engine=self.engine, epoch=0, last_life=now)
        with suppress(IntegrityError):  # another worker was first
            await self._database.change(row)


class OldEngines:
    """Forgets engines that left the configuration long ago; those in `known` have not."""

    def __init__(
        self,
        database: Database,
        known: Collection[str],
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._database = database
        self._known = frozenset(known)
        self._clock = clock

    async def forget(self) -> float:
        """Remove their records; the seconds until that is worth doing again."""
        now = self._clock()
        free = or_(engine_heal.c.healer.is_(None), engine_heal.c.lease_expires < now)
        # Other workers may be configured with others, which are alive, or begin a new record.
        old = and_(
            engine_heal.c.engine.not_in(self._known),
            engine_heal.c.last_life < now - FORGET_SECONDS,
            free,
        )
        if await self._database.read(select(engine_heal.c.engine).where(old).limit(1)):
            await self._database.change(delete(engine_heal).where(old))
        return FORGETTING_PAUSE


def engine_name(triton_url: str, model_name: str) -> str:
    """What identifies an engine among all the workers that share a database.

    A loopback address means another server on every host.
    """
    host = triton_url.rpartition(":")[0].strip("[]")
    prefix = f"{socket.gethostname()}/" if _is_loopback(host) else ""
    return f"{prefix}{triton_url}/{model_name}"


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name
        return host == "localhost"
