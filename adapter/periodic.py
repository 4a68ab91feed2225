"""A background task that repeats one step and survives the step's errors."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Self

from adapter.errors import StoreUnavailable
from adapter.telemetry.logs import get_logger
from adapter.telemetry.metrics import TASK_LAST_STEP

log = get_logger()

#: Each wait inside a step has a limit, and their sum stays far below this.
STALL_SECONDS = 60.0
#: Time that a running step gets to end once its task is told to stop.
STOP_SECONDS = 2.0


class PeriodicTask:
    """Calls `step` again and again; a context manager.

    `step` returns the seconds to wait before the next call; None waits for `wake`. Leaving the
    context lets the running step end: cut between a database write and its bookkeeping, a step
    would leave a job that no worker runs until its lease expires. A step that hangs is cancelled.
    """

    def __init__(
        self,
        name: str,
        step: Callable[[], Awaitable[float | None]],
        *,
        on_error: Callable[[Exception], None] | None = None,
        error_pause: float = 1.0,
    ) -> None:
        self.name = name
        self._step = step
        self._on_error = on_error
        self._error_pause = error_pause
        self._woken = asyncio.Event()
        self._stopping = False
        self._step_began: float | None = None
        self._stop_by: float | None = None
        self._last_failure = ""
        self._task: asyncio.Task[None] | None = None

    @property
    def stalled(self) -> bool:
        """Whether a step has hung for so long that only a new process can help."""
        if self._task is None or self._stopping:
            return False
        return self._task.done() or self.seconds_in_step > STALL_SECONDS

    @property
    def seconds_in_step(self) -> float:
        """Since when the running step runs; 0 between two steps."""
        return 0.0 if self._step_began is None else time.monotonic() - self._step_began

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._run(), name=self.name)
        return self

    async def __aexit__(self, *_: object) -> None:
        self.stop()
        task, stop_by = self._task, self._stop_by
        if task is None or stop_by is None:
            return
        await asyncio.wait([task], timeout=max(0.0, stop_by - time.monotonic()))
        if not task.done():
            log.warning("periodic_task_cancelled", task=self.name)
            task.cancel()
            await asyncio.wait([task], timeout=STOP_SECONDS)

    def stop(self) -> None:
        """Begin no other step; leaving the context waits for the running one."""
        if not self._stopping:
            self._stopping = True
            self._stop_by = time.monotonic() + STOP_SECONDS
        self._woken.set()

    def wake(self) -> None:
        """Begin the next step now."""
        self._woken.set()

    async def _run(self) -> None:
        moved = TASK_LAST_STEP.labels(self.name)
        while not self._stopping:
            self._woken.clear()
            self._step_began = time.monotonic()
            pause: float | None
            try:
                pause = await self._step()
            except Exception as error:  # noqa: BLE001 - the task must go on
                self._log(error)
                if self._on_error is not None:
                    self._on_error(error)
                pause = self._error_pause
            else:
                self._last_failure = ""
            self._step_began = None
            moved.set_to_current_time()
            await self._wait(pause)

    def _log(self, error: Exception) -> None:
        """Log the error; an outage of the database only once."""
        if not isinstance(error, StoreUnavailable):
            log.exception("periodic_task_failed", task=self.name)
        elif str(error) != self._last_failure:
            log.warning("periodic_task_failed", task=self.name, error=str(error))
        self._last_failure = str(error)

    async def _wait(self, pause: float | None) -> None:
        try:
            async with asyncio.timeout(pause):
                await self._woken.wait()
        except TimeoutError:
            return
