"""Triton and the adapter together: started in order, watched, stopped in reverse order."""

import os
import threading
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Protocol, Self

from launcher.adapter import Adapter
from launcher.checkpoint import check_checkpoint
from launcher.errors import LaunchError, ProcessDiedError
from launcher.ports import require_free_port
from launcher.settings import Settings
from launcher.tritonserver import TritonServer

WATCH_SECONDS = 0.1
#: Seconds before the second restart; the first one is immediate.
FIRST_DELAY = 1.0
LONGEST_DELAY = 10.0
#: After a part has run this long, its deaths are counted from the beginning.
STEADY_SECONDS = 10.0
#: A job that kills engines ends tritonserver a few times before it is given up.
MAX_RESTARTS = 20


class Reporter(Protocol):
    """Receives what happens; called from the log threads too, and must not raise."""

    def waiting(self, part: str, seconds: float, last_line: str) -> None:
        """`part` has been loading for `seconds`; `last_line` is its newest log line."""

    def ready(self, part: str, seconds: float) -> None:
        """`part` answers, `seconds` after its start."""

    def log(self, part: str, line: str) -> None:
        """`part` wrote a line."""

    def trouble(self, message: str) -> None:
        """A part died or failed to start again."""


class Part(Protocol):
    """A process of the stack."""

    @property
    def running(self) -> bool: ...

    @property
    def log_tail(self) -> list[str]: ...

    def start(self) -> None: ...

    def stop(self) -> None: ...


class Backoff:
    """The wait before the next restart of one part."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._started = clock()
        self.restarts = 0

    def started(self) -> None:
        """The part is up: its steady time begins."""
        self._started = self._clock()

    def next_delay(self) -> float | None:
        """Seconds to wait: none at first, then doubling; None when it has died too often."""
        if self._clock() - self._started > STEADY_SECONDS:
            self.restarts = 0
        if self.restarts >= MAX_RESTARTS:
            return None
        self.restarts += 1
        if self.restarts == 1:
            return 0.0
        return float(min(FIRST_DELAY * 2 ** (self.restarts - 2), LONGEST_DELAY))


def triton_server(
    settings: Settings, reporter: Reporter, env: Mapping[str, str] | None = None
) -> TritonServer:
    """Triton with these settings, not started yet."""
    return TritonServer(
        settings.model_repository,
        http_port=settings.triton_http_port,
        grpc_port=settings.triton_grpc_port,
        metrics_port=settings.triton_metrics_port,
        start_timeout=settings.start_timeout,
        env=env,
        on_log=lambda line: reporter.log("triton", line),
        on_wait=lambda seconds, line: reporter.waiting("triton", seconds, line),
    )


def check_model_path(env: Mapping[str, str]) -> None:
    """Raises CheckpointError if the engine could not load its checkpoint."""
    if path := env.get("MODEL_PATH"):
        check_checkpoint(path)


class Stack:
    """The whole service on one host, as a context manager.

    Entering returns when the REST API answers and raises a LaunchError when that fails; leaving
    stops the adapter, which then takes no more requests, and after it Triton. `env` is added to
    the environment of both.
    """

    def __init__(
        self, settings: Settings, reporter: Reporter, env: Mapping[str, str] | None = None
    ) -> None:
        self.settings = settings
        self._reporter = reporter
        self._env = dict(env or {})
        # In the order of their start.
        self._parts: dict[str, Part] = {
            "triton": triton_server(settings, reporter, self._env),
            "adapter": self._adapter(),
        }
        self._backoffs = {name: Backoff() for name in self._parts}

    def __enter__(self) -> Self:
        # Before minutes go into loading a model that could not be served.
        require_free_port("the REST API's", self.settings.host, self.settings.port, "DLLM_PORT")
        check_model_path({**os.environ, **self._env})
        for warning in self._adapter().check():
            self._reporter.trouble(warning)
        try:
            for name in self._parts:
                self._start(name)
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stop()

    def watch(self, until: threading.Event) -> None:
        """Restart parts that die until the event is set. Raises ProcessDiedError after too many."""
        while not until.wait(WATCH_SECONDS):
            for name, part in self._parts.items():
                if not part.running:
                    self._revive(name, part, until)

    def _revive(self, name: str, part: Part, until: threading.Event) -> None:
        tail = part.log_tail
        part.stop()
        delay = self._backoffs[name].next_delay()
        if delay is None:
            raise ProcessDiedError(f"{name} died {MAX_RESTARTS + 1} times in a row", tail)
        when = f"in {delay:.0f} s" if delay else "now"
        self._reporter.trouble(f"{name} ended on its own; starting it again {when}")
        if until.wait(delay):
            return
        try:
            self._start(name)
        except LaunchError as error:
            self._reporter.trouble(str(error))

    def _start(self, name: str) -> None:
        begun = time.monotonic()
        self._parts[name].start()
        self._backoffs[name].started()
        self._reporter.ready(name, time.monotonic() - begun)

    def _stop(self) -> None:
        for part in reversed(self._parts.values()):
            part.stop()

    def _adapter(self) -> Adapter:
        return Adapter(
            self.settings,
            env=self._env,
            on_log=lambda line: self._reporter.log("adapter", line),
            on_wait=lambda seconds, line: self._reporter.waiting("adapter", seconds, line),
        )
