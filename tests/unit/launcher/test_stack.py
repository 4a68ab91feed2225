"""The stack with scripted parts: order, restarts, and giving up."""

import socket
import threading
from pathlib import Path

import pytest

from launcher.errors import LaunchError, PortTakenError, ProcessDiedError
from launcher.ports import free_port
from launcher.settings import Settings
from launcher.stack import MAX_RESTARTS, STEADY_SECONDS, Backoff, Stack


class Recorder:
    """A reporter that writes everything into one list."""

    def __init__(self) -> None:
        self.events: list[str] = []

    def waiting(self, part: str, seconds: float, last_line: str) -> None:
        del seconds
        self.events.append(f"waiting {part} {last_line}")

    def ready(self, part: str, seconds: float) -> None:
        del seconds
        self.events.append(f"ready {part}")

    def log(self, part: str, line: str) -> None:
        self.events.append(f"{part}: {line}")

    def trouble(self, message: str) -> None:
        self.events.append(message)


class FakePart:
    """A process that lives as many looks as told, once per start."""

    log_tail = ("last words",)

    def __init__(self, name: str, events: list[str], *, lives: list[int], refuses: int = 0) -> None:
        self._name = name
        self._events = events
        self._lives = lives
        self._refuses = refuses
        self._left = 0

    @property
    def running(self) -> bool:
        self._left -= 1
        return self._left >= 0

    def start(self) -> None:
        if self._refuses and len(self._lives) == 1:
            self._refuses -= 1
            raise LaunchError(f"{self._name} does not want to")
        self._left = self._lives.pop(0) if len(self._lives) > 1 else self._lives[0]
        self._events.append(f"start {self._name}")

    def stop(self) -> None:
        self._events.append(f"stop {self._name}")


class Looks(threading.Event):
    """An event that is set after so many waits, without any time passing."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self._count = count

    def wait(self, timeout: float | None = None) -> bool:
        del timeout
        self._count -= 1
        return self._count < 0


def fake_stack(recorder: Recorder, triton: FakePart) -> Stack:
    stack = Stack(Settings(port=free_port()), recorder)
    adapter = FakePart("adapter", recorder.events, lives=[10**9])
    stack._parts = {"triton": triton, "adapter": adapter}  # type: ignore[dict-item]
    return stack


def test_order_of_start_and_stop() -> None:
    """Triton comes first and goes last, so the adapter never faces a server that is gone."""
    recorder = Recorder()
    with fake_stack(recorder, FakePart("triton", recorder.events, lives=[10**9])):
        recorder.events.append("serving")
    assert recorder.events == [
        "start triton",
        "ready triton",
        "start adapter",
        "ready adapter",
        "serving",
        "stop adapter",
        "stop triton",
    ]


def test_failed_start_stops_what_runs() -> None:
    """When a part cannot start, those before it are ended and the error goes on."""
    recorder = Recorder()
    triton = FakePart("triton", recorder.events, lives=[10**9])
    stack = fake_stack(recorder, triton)
    refusing = FakePart("adapter", recorder.events, lives=[1], refuses=1)
    stack._parts["adapter"] = refusing  # type: ignore[assignment]
    with pytest.raises(LaunchError, match="does not want to"), stack:
        pass
    assert recorder.events[-1] == "stop triton"


def test_dead_part_is_restarted() -> None:
    """A part that ended is stopped for good, started again at once, and reported."""
    recorder = Recorder()
    with fake_stack(recorder, FakePart("triton", recorder.events, lives=[1, 10**9])) as stack:
        stack.watch(Looks(8))
    assert recorder.events[4:-2] == [
        "stop triton",
        "triton ended on its own; starting it again now",
        "start triton",
        "ready triton",
    ]


def test_failed_restart_is_tried_again() -> None:
    """A restart that fails is reported, and the next one waits longer."""
    recorder = Recorder()
    triton = FakePart("triton", recorder.events, lives=[1, 10**9], refuses=1)
    with fake_stack(recorder, triton) as stack:
        stack.watch(Looks(12))
    assert "triton does not want to" in recorder.events
    assert "triton ended on its own; starting it again in 1 s" in recorder.events
    assert recorder.events.count("start triton") == 2


def test_too_many_deaths_end_the_stack() -> None:
    """A part that keeps dying makes `watch` raise, with its log, for an outer supervisor."""
    recorder = Recorder()
    with (
        pytest.raises(ProcessDiedError, match=r"died 21 times in a row.*\n  \| last words"),
        fake_stack(recorder, FakePart("triton", recorder.events, lives=[0])) as stack,
    ):
        stack.watch(Looks(1000))
    assert recorder.events[-2:] == ["stop adapter", "stop triton"]


def test_backoff_doubles_and_forgets() -> None:
    """Pauses double; a part that ran steadily starts afresh; after too many deaths it is over."""
    now = 0.0
    backoff = Backoff(lambda: now)
    delays = [backoff.next_delay() for _ in range(MAX_RESTARTS + 1)]
    assert delays[:6] == [0.0, 1.0, 2.0, 4.0, 8.0, 10.0]
    assert delays[-2:] == [10.0, None]
    backoff.started()
    now += STEADY_SECONDS + 1
    assert backoff.next_delay() == 0.0


def test_taken_api_port_is_found_before_loading(repository: Path) -> None:
    """A port of the API that is in use is reported before the model is loaded."""
    recorder = Recorder()
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        stack = Stack(Settings(port=port, model_repository=repository), recorder)
        with pytest.raises(PortTakenError, match=rf"port {port} .*DLLM_PORT"), stack:
            pass
    assert recorder.events == []
