"""Replacing a dead engine, one worker at a time."""

import asyncio

from adapter.engine.reload_lease import HealStore
from adapter.errors import EngineError, ModelControlRefused
from adapter.telemetry.logs import get_logger
from adapter.telemetry.metrics import ENGINE_RELOADS
from adapter.types import Engine

log = get_logger()

RETRY_SECONDS = 10.0
LOOK_SECONDS = 0.5
#: A new engine is idle, and so answers at once.
PROBE_SECONDS = 15.0


class Healer:
    """Unloads and loads the model in the background, if no other worker does.

    One that is silent for longer than `lease` seconds is taken to have died, and another worker
    begins anew.
    """

    def __init__(self, engine: Engine, store: HealStore, *, lease: float, enabled: bool) -> None:
        self._engine = engine
        self._store = store
        self._lease = lease
        self._enabled = enabled
        self._not_before = 0.0
        self._superseded = False
        ENGINE_RELOADS.labels(store.engine)  # shown before the first
        self._task: asyncio.Task[None] | None = None

    @property
    def busy(self) -> bool:
        """This worker is replacing the engine now."""
        return self._task is not None and not self._task.done()

    async def attempt(self, epoch: int, *, taken_over: bool) -> None:
        """Begin to replace the engine of `epoch`, unless that is futile or another's work.

        `taken_over`: another worker began it and has died. Triton goes on with what it was told,
        so the new engine may be there already, or will be soon.
        """
        now = asyncio.get_running_loop().time()
        if self.busy or not self._enabled or now < self._not_before:
            return
        self._collect()
        if await self._store.begin(epoch=epoch, lease=self._lease):
            self._not_before = now + RETRY_SECONDS
            self._superseded = False
            self._task = asyncio.create_task(
                self._replace(epoch, taken_over=taken_over), name="engine-reload"
            )

    async def renew(self) -> None:
        """Tell the others that it is still being done, or leave it to who has taken it over."""
        self._superseded = not await self._store.renew(lease=self._lease)

    async def stop(self) -> None:
        """Give up; if the model may be unloaded now, whoever comes next begins anew at once."""
        if not self.busy or self._task is None:
            return
        self._task.cancel()
        await asyncio.wait([self._task])
        await self._store.abandon()

    async def _replace(self, epoch: int, *, taken_over: bool) -> None:
        log.warning(
            "engine_reload_started", engine=self._store.engine, epoch=epoch, taken_over=taken_over
        )
        try:
            answers = taken_over and await self._answers_in_the_end()
            while not answers:
                if self._superseded:  # two that reload it in turn undo each other's work
                    return
                answers = await self._reload() or await self._comes_back()
        except ModelControlRefused as error:
            self._enabled = False
            log.error(
                "engine_reload_refused",
                engine=self._store.engine,
                hint="--model-control-mode=explicit",
                error=str(error),
            )
            await self._store.abort()
        else:
            await self._store.finish()
            ENGINE_RELOADS.labels(self._store.engine).inc()
            log.warning("engine_reload_finished", engine=self._store.engine, epoch=epoch + 1)

    async def _reload(self) -> bool:
        try:
            await self._engine.reload()
        except ModelControlRefused:
            raise
        except EngineError as error:
            log.error("engine_reload_failed", engine=self._store.engine, error=str(error))
            return False
        return True

    async def _comes_back(self) -> bool:
        """Whether it answers before it is time to try again.

        The model may be unloaded now, so that somebody must; but tritonserver may have been away
        with it, and be started by others.
        """
        again = asyncio.get_running_loop().time() + RETRY_SECONDS
        while asyncio.get_running_loop().time() < again:
            await asyncio.sleep(LOOK_SECONDS)
            if await self._answers_in_the_end():
                return True
        return False

    async def _answers_in_the_end(self) -> bool:
        try:
            while await self._engine.loading():
                await asyncio.sleep(LOOK_SECONDS)
            async with asyncio.timeout(PROBE_SECONDS):
                await self._engine.probe()
        except (TimeoutError, EngineError):
            return False
        return True

    def _collect(self) -> None:
        """Log what the last attempt has raised, such as a database that was away."""
        if self._task is not None and (error := self._task.exception()) is not None:
            log.error("engine_reload_broken", engine=self._store.engine, exc_info=error)
        self._task = None
