"""Runs an engine on a thread of its own, for callers on other threads."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable

from .engine import Engine
from .errors import EngineDead
from .request import CanvasUpdate
from .scheduler import Request

logger = logging.getLogger("dllm_engine")

#: Called on the engine's thread with each update of a request; must not block.
OnUpdate = Callable[[CanvasUpdate], None]


class EngineWorker:
    """Steps an engine while it has work.

    `submit` blocks while every slot is taken, so that requests beyond those wait with whoever
    calls (Triton's queue, which has priorities and time-outs).
    """

    def __init__(
        self, engine: Engine, on_death: Callable[[EngineDead], None] | None = None
    ) -> None:
        self.engine = engine
        self._on_death = on_death
        self._free = threading.BoundedSemaphore(engine.config.max_num_seqs)
        self._turn = threading.Lock()
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        #: Whom to tell of each request, and how many slots it takes.
        self._callbacks: dict[int, tuple[OnUpdate, int]] = {}
        self._death: EngineDead | None = None
        self._closing = False
        engine.on_failure(lambda: self._inbox.put(engine.check))
        self._thread = threading.Thread(target=self._loop, name="dllm-engine", daemon=True)
        self._thread.start()

    def submit(self, request: Request, on_update: OnUpdate) -> None:
        """Hand over a request from `Engine.make_request`; blocks while the engine is full.

        One that runs alone takes every slot: it waits until nothing runs, and others wait for it.

        Raises:
            EngineDead: the engine has stopped.
        """
        slots = self.engine.config.max_num_seqs if request.alone else 1
        with self._turn:  # two that each hold half of the slots would wait for ever
            for _ in range(slots):
                while not self._free.acquire(timeout=0.5):
                    self._check_alive()
        self._check_alive()
        self._inbox.put(lambda: self._add(request, on_update, slots))

    def cancel(self, request_id: int) -> None:
        """End a request before the next step; its final update says so. Unknown ids are fine."""
        self._inbox.put(lambda: self._cancel(request_id))

    def close(self, timeout: float | None = None) -> bool:
        """Finish what runs, then stop the thread. Nothing may be submitted any more.

        Returns:
            Whether it has stopped within `timeout` seconds.
        """
        self._inbox.put(None)
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _check_alive(self) -> None:
        if self._death is not None:
            raise self._death

    def _loop(self) -> None:
        try:
            while self._take_commands() or self.engine.has_work:
                for update in self.engine.step():
                    self._deliver(update)
        except EngineDead as death:
            self._die(death)
        except Exception as error:
            logger.exception("engine loop failed")
            self._die(EngineDead(f"{type(error).__name__}: {error}"))
        finally:
            self.engine.close()

    def _take_commands(self) -> bool:
        """Run what other threads asked for; waits when there is nothing else to do."""
        while not self._closing:
            try:
                command = self._inbox.get(block=not self.engine.has_work)
            except queue.Empty:
                break
            if command is None:
                self._closing = True
            else:
                command()
        return not self._closing

    def _add(self, request: Request, on_update: OnUpdate, slots: int) -> None:
        self._callbacks[request.request_id] = on_update, slots
        self.engine.add(request)

    def _cancel(self, request_id: int) -> None:
        update = self.engine.cancel(request_id)
        if update is not None:
            self._deliver(update)

    def _deliver(self, update: CanvasUpdate) -> None:
        if update.finished:
            on_update, slots = self._callbacks.pop(update.request_id)
            self._free.release(slots)
        else:
            on_update, _ = self._callbacks[update.request_id]
        on_update(update)

    def _die(self, death: EngineDead) -> None:
        self._death = death
        for update in self.engine.abandon(death):
            self._deliver(update)
        self.engine.close()  # the owner may end the process at once
        if self._on_death:
            self._on_death(death)
