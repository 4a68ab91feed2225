"""The watcher ends a server whose engine has ended, and nothing else."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import dllm_fail_fast
import pytest
from dllm_fail_fast import FailFast

SLEEPER = "import time; time.sleep(600)"
PATIENCE = 10


class Watched:
    """An engine, its server and a watcher, all of them real processes."""

    def __init__(self, region: Path) -> None:
        self.engine = subprocess.Popen([sys.executable, "-c", SLEEPER])
        self.server = subprocess.Popen([sys.executable, "-c", SLEEPER])
        fds = [os.pidfd_open(self.engine.pid), os.pidfd_open(self.server.pid)]
        arguments = [*fds, self.engine.pid, self.server.pid, region.name]
        self.watcher = subprocess.Popen(
            [sys.executable, "-I", "-S", dllm_fail_fast.__file__, *map(str, arguments)],
            pass_fds=fds,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert self.watcher.stdout is not None
        assert self.watcher.stdout.read(1)
        for fd in fds:
            os.close(fd)

    def close(self) -> None:
        """Leave no process behind."""
        for process in (self.engine, self.server, self.watcher):
            process.kill()
            process.wait()


@pytest.fixture
def region() -> Iterator[Path]:
    """Shared memory of the engine."""
    path = dllm_fail_fast.SHARED_MEMORY / f"dllm-fail-fast-test-{os.getpid()}"
    path.touch()
    yield path
    path.unlink(missing_ok=True)


@pytest.fixture
def watched(region: Path) -> Iterator[Watched]:
    """An engine that is watched."""
    watched = Watched(region)
    yield watched
    watched.close()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_server_ends_with_its_engine(
    watched: Watched, region: Path, number: signal.Signals
) -> None:
    """However the engine ends, its server is killed and its shared memory removed."""
    watched.engine.send_signal(number)
    assert watched.server.wait(PATIENCE) == -signal.SIGKILL
    watched.watcher.wait(PATIENCE)
    assert not region.exists()


def test_engine_that_ends_in_order_leaves_its_server(watched: Watched, region: Path) -> None:
    """A byte on the watcher's standard input ends the watcher alone."""
    watched.watcher.communicate(b".", timeout=PATIENCE)
    watched.engine.kill()
    watched.engine.wait(PATIENCE)
    assert watched.watcher.returncode == 0
    assert watched.server.poll() is None
    assert region.exists()


def test_engine_does_not_outlive_its_server(watched: Watched, region: Path) -> None:
    """An engine that hangs when its server is gone is killed after a while."""
    watched.server.kill()
    assert watched.engine.wait(dllm_fail_fast.ORPHAN_SECONDS + PATIENCE) == -signal.SIGKILL
    watched.watcher.wait(PATIENCE)
    assert not region.exists()


def test_signal_to_the_group_is_not_for_the_watcher(watched: Watched) -> None:
    """Ctrl-C and a stop of the whole group leave the watcher to see what the engine does."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        watched.watcher.send_signal(number)
    watched.engine.kill()
    assert watched.server.wait(PATIENCE) == -signal.SIGKILL


def test_parent_that_is_no_tritonserver_is_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    """A process whose parent has another name is not armed, and the log says so."""
    fail_fast = FailFast()
    fail_fast.arm()
    assert not fail_fast.armed
    assert "is no tritonserver" in caplog.text
    fail_fast.disarm()


@pytest.mark.parametrize("python", ["/nowhere/python", "/bin/true"])
def test_a_watcher_that_cannot_be_started_is_only_logged(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, python: str
) -> None:
    """The engine serves without one, and is not armed."""
    monkeypatch.setattr(dllm_fail_fast, "_name_of", lambda _: dllm_fail_fast.SERVER_NAME)
    monkeypatch.setattr(sys, "executable", python)
    fail_fast = FailFast()
    fail_fast.arm()
    assert not fail_fast.armed
    assert "the server outlives its engine" in caplog.text
    fail_fast.disarm()
