"""A background task that repeats one step and survives the step's errors."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Self

from adapter.errors import StoreUnavailable
from adapter.telemetry.logs import get_logger

log = get_logger()


class PeriodicTask:
    """Calls `step` again and again; a context manager.

    `step` returns the seconds to wait before the next call; None waits for `wake`. Leaving the
    context lets the running step end: cut between a database write and its bookkeeping, a step
    would leave a job that no worker runs.
    """

    def __init__(
        self,
        name: str,
        step: Callable[[], Awaitable[float | None]],
        *,
        on_error: Callable[[Exception], None] | None = None,
        error_pause: float = 1.0,
    ) -> None:
        self._name = name
        self._step = step
        self._on_error = on_error
        self._error_pause = error_pause
        self._woken = asyncio.Event()
        self._stopping = False
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._run(), name=self._name)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._stopping = True
        self._woken.set()
        if self._task is not None:
            await self._task

    def wake(self) -> None:
        """Begin the next step now."""
        self._woken.set()

    async def _run(self) -> None:
        while not self._stopping:
            self._woken.clear()
            pause: float | None
            try:
                pause = await self._step()
            except Exception as error:  # the task must go on
                if isinstance(error, StoreUnavailable):  # expected: its text says enough
                    log.warning("periodic_task_failed", task=self._name, error=str(error))
                else:
                    log.exception("periodic_task_failed", task=self._name)
                if self._on_error is not None:
                    self._on_error(error)
                pause = self._error_pause
            await self._wait(pause)

    async def _wait(self, pause: float | None) -> None:
        try:
            async with asyncio.timeout(pause):
                await self._woken.wait()
        except TimeoutError:
            return
