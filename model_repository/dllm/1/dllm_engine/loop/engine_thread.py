"""Runs an engine on a thread of its own, for callers on other threads."""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
from collections.abc import Callable

from dllm_engine.errors import EngineDead, NotRun, QueueFull
from dllm_engine.loop.engine import Engine
from dllm_engine.request import CanvasUpdate, Request
from dllm_engine.watchdog import Alarm

logger = logging.getLogger("dllm_engine")

#: Called on the engine's thread with each update of a request; must not block.
OnUpdate = Callable[[CanvasUpdate], None]


class EngineWorker:
    """Steps an engine while it has work, and bounds how many requests wait in it."""

    def __init__(
        self, engine: Engine, on_death: Callable[[EngineDead], None] | None = None
    ) -> None:
        self.engine = engine
        self._on_death = on_death
        #: Requests, things to do between two steps, and None: finish.
        self._inbox: queue.SimpleQueue[Request | Callable[[], None] | None] = queue.SimpleQueue()
        #: Whom to tell of each request, from `submit` to its final update.
        self._callbacks: dict[int, OnUpdate] = {}
        self._most = engine.config.max_num_seqs + engine.config.max_queue_size
        #: Held while a request is handed over, so that none can slip in behind the engine's death.
        self._lock = threading.Lock()
        self._death: EngineDead | None = None
        self._closing = False
        seconds = engine.step_timeout
        self._alarm = Alarm(seconds, self._late) if seconds else None
        engine.on_failure(lambda: self._inbox.put(engine.check))
        self._thread = threading.Thread(target=self._loop, name="dllm-engine", daemon=True)
        self._thread.start()

    def submit(self, request: Request, on_update: OnUpdate) -> None:
        """Hand over a request from `Engine.make_request`; returns at once.

        Raises:
            EngineDead: the engine has stopped.
            QueueFull: every slot is taken, and as many requests wait as may.
        """
        with self._lock:
            if self._death is not None:
                raise self._death
            if len(self._callbacks) >= self._most:
                limit = self.engine.config.max_queue_size
                raise QueueFull(f"exceeds maximum queue size of {limit} (DLLM_MAX_QUEUE_SIZE)")
            self._callbacks[request.request_id] = on_update
            self._inbox.put(request)

    def cancel(self, request_id: int) -> None:
        """End a request before the next step; its final update says so. Unknown ids are fine."""
        self._inbox.put(lambda: self._cancel(request_id))

    def between_steps(self, action: Callable[[], None]) -> None:
        """Call `action` on the engine's thread, after what was asked for before.

        Raises:
            EngineDead: the engine has stopped.
        """
        with self._lock:
            if self._death is not None:
                raise self._death
            self._inbox.put(action)

    def close(self, timeout: float | None = None) -> bool:
        """Fail what waits, finish what runs, then stop the thread.

        Returns:
            Whether it has stopped within `timeout` seconds.
        """
        self._inbox.put(None)
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _loop(self) -> None:
        try:
            self.engine.bind_thread()
            while self._take_commands():
                with self._alarm or contextlib.nullcontext():
                    updates = self.engine.step()
                if self._death is not None:
                    break  # given up meanwhile
                for update in updates:
                    self._deliver(update)
        except EngineDead as death:
            self._die(death)
        except Exception as error:
            logger.exception("engine loop failed")
            self._die(EngineDead(f"{type(error).__name__}: {error}"))
        finally:
            if self._alarm is not None:
                self._alarm.close()
            self.engine.close()

    def _take_commands(self) -> bool:
        """Run what other threads asked for; waits when there is nothing else to do.

        Returns:
            Whether to go on.
        """
        while True:
            try:
                command = self._inbox.get(block=not (self._closing or self.engine.has_work))
            except queue.Empty:
                break
            if command is None:
                self._closing = True
                for update in self.engine.turn_away(NotRun("the server is stopping")):
                    self._deliver(update)
            elif isinstance(command, Request):
                self.engine.add(command)
            else:
                with self._alarm or contextlib.nullcontext():  # a cancel may wait for a step
                    command()
        return not self._closing or self.engine.has_work

    def _cancel(self, request_id: int) -> None:
        update = self.engine.cancel(request_id)
        if update is not None:
            self._deliver(update)

    def _deliver(self, update: CanvasUpdate) -> None:
        on_update = self._callbacks[update.request_id]
        if update.finished:
            del self._callbacks[update.request_id]
        on_update(update)

    def _late(self) -> None:
        """The engine's thread is lost in a step; called on the alarm's."""
        seconds = self.engine.step_timeout
        self._die(EngineDead(f"a step has not ended within {seconds:g} s (DLLM_STEP_TIMEOUT)"))

    def _die(self, death: EngineDead) -> None:
        with self._lock:
            if self._death is not None:
                return
            self._death = death
        try:
            self._abandon(death)
        finally:
            if self._on_death:
                self._on_death(death)

    def _abandon(self, death: EngineDead) -> None:
        """Fail all that is with the engine, and let go of it."""
        actions = []
        with contextlib.suppress(queue.Empty):
            while True:
                command = self._inbox.get_nowait()
                if isinstance(command, Request):
                    self.engine.add(command)  # to be abandoned with the others
                elif command is not None:
                    actions.append(command)
        for update in self.engine.abandon(death):
            self._deliver(update)
        for action in actions:  # somebody may wait for them; there is nothing left to cancel
            with contextlib.suppress(EngineDead):
                action()
        self.engine.close()  # the owner may end the process at once
