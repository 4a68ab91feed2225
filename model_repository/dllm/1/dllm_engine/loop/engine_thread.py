"""Runs an engine on a thread of its own, for callers on other threads."""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
from collections.abc import Callable

from dllm_engine.errors import EngineDead, NotStarted, QueueFull
from dllm_engine.loop.engine import Engine
from dllm_engine.request import CanvasUpdate, Request
from dllm_engine.watchdog import Watchdog

logger = logging.getLogger("dllm_engine")

#: Called on the engine's thread with each update of a request; must not block.
OnUpdate = Callable[[CanvasUpdate], None]


class EngineThread:
    """Steps an engine while it has work, and limits how many requests it holds."""

    def __init__(
        self, engine: Engine, on_death: Callable[[EngineDead], None] | None = None
    ) -> None:
        self.engine = engine
        self._on_death = on_death
        #: Requests, actions to call between two steps, and None: drain and stop.
        self._inbox: queue.SimpleQueue[Request | Callable[[], None] | None] = queue.SimpleQueue()
        #: By request id, from `submit` to the final update.
        self._callbacks: dict[int, OnUpdate] = {}
        self._max_requests = engine.config.max_num_seqs + engine.config.max_queue_size
        #: Held while a request is submitted, so that none arrives after the engine's death.
        self._lock = threading.Lock()
        self._death: EngineDead | None = None
        self._closing = False
        self._watchdog = Watchdog(engine.runner.step_timeout, self._on_timeout)
        engine.runner.on_failure(lambda: self._inbox.put(engine.runner.check))
        self._thread = threading.Thread(target=self._loop, name="dllm-engine", daemon=True)
        self._thread.start()

    def submit(self, request: Request, on_update: OnUpdate) -> None:
        """Queue a request from `Engine.make_request`; returns at once.

        Raises:
            EngineDead: the engine has stopped.
            QueueFull: all slots and the queue are full.
        """
        with self._lock:
            if self._death is not None:
                raise self._death
            if len(self._callbacks) >= self._max_requests:
                limit = self.engine.config.max_queue_size
                raise QueueFull(f"exceeds maximum queue size of {limit} (DLLM_MAX_QUEUE_SIZE)")
            self._callbacks[request.request_id] = on_update
            self._inbox.put(request)

    def cancel(self, request_id: int) -> None:
        """End a request before the next step; ids of no running request are ignored."""
        self._inbox.put(lambda: self._cancel(request_id))

    def call_between_steps(self, action: Callable[[], None]) -> None:
        """Call `action` on the engine's thread, after all earlier calls of this object.

        Raises:
            EngineDead: the engine has stopped.
        """
        with self._lock:
            if self._death is not None:
                raise self._death
            self._inbox.put(action)

    def close(self, timeout: float | None = None) -> bool:
        """Fail waiting requests, finish running ones, then stop the thread.

        Returns:
            Whether it stopped within `timeout` seconds.
        """
        self._inbox.put(None)
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _loop(self) -> None:
        try:
            self.engine.runner.bind_thread()
            while self._take_commands():
                with self._watchdog:
                    updates = self.engine.step()
                if self._death is not None:
                    break  # the watchdog gave the step up
                for update in updates:
                    self._deliver(update)
        except EngineDead as death:
            self._die(death)
        except Exception as error:
            logger.exception("engine loop failed")
            self._die(EngineDead(f"{type(error).__name__}: {error}"))
        finally:
            self._watchdog.close()
            self.engine.runner.close()

    def _take_commands(self) -> bool:
        """Run what other threads asked for; blocks while there is no other work.

        Returns:
            Whether to keep stepping.
        """
        while True:
            try:
                command = self._inbox.get(block=not (self._closing or self.engine.has_work))
            except queue.Empty:
                break
            if command is None:
                self._closing = True
                for update in self.engine.reject_waiting(NotStarted("the server is stopping")):
                    self._deliver(update)
            elif isinstance(command, Request):
                self.engine.add(command)
            else:
                with self._watchdog:  # a cancel may wait for a step
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

    def _on_timeout(self) -> None:
        """Give up the engine, whose thread hangs in a step; called on the watchdog's thread."""
        seconds = self.engine.runner.step_timeout
        self._die(EngineDead(f"a step has not ended within {seconds:g} s (DLLM_STEP_TIMEOUT)"))

    def _die(self, death: EngineDead) -> None:
        with self._lock:
            if self._death is not None:
                return
            self._death = death
        try:
            self._abort_all(death)
        finally:
            if self._on_death:
                self._on_death(death)

    def _abort_all(self, death: EngineDead) -> None:
        """Fail all requests, those still in the inbox too, and close the engine."""
        actions = []
        with contextlib.suppress(queue.Empty):
            while True:
                command = self._inbox.get_nowait()
                if isinstance(command, Request):
                    self.engine.add(command)  # `abort_all` fails it with the others
                elif command is not None:
                    actions.append(command)
        for update in self.engine.abort_all(death):
            self._deliver(update)
        for action in actions:  # another thread may wait for them
            with contextlib.suppress(EngineDead):
                action()
        self.engine.runner.close()  # the owner may end the process at once
