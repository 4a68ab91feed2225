"""One child process under a guard: its log, its state, its end."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TextIO

from launcher.errors import ProcessDiedError

GUARD = Path(__file__).with_name("guard.py")
TAIL_LINES = 40
#: Lines that would push an error out of the tail: Triton's tables, frames of Python's imports.
NOISE = ("+--", "| ", "  <frozen importlib._bootstrap")
GUARD_MARGIN_SECONDS = 5.0

LogCallback = Callable[[str], None]


class GuardedProcess:
    """A running command; its guard ends all of it when this process ends.

    `log_file` gets every line it writes; so does `on_log`, called from another thread, which must
    not raise, since a log that is not read blocks its writer. Raises ProcessDiedError when the
    command cannot be started at all.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        name: str,
        env: Mapping[str, str],
        grace: float = 10.0,
        shm_prefix: str = "",
        scratch: Path | None = None,
        on_log: LogCallback | None = None,
        log_file: Path | None = None,
    ) -> None:
        self.name = name
        self._grace = grace
        self._on_log = on_log
        self._tail: deque[str] = deque(maxlen=TAIL_LINES)
        options = ["--grace", str(grace), "--shm-prefix", shm_prefix]
        if scratch is not None:
            options += ["--scratch", str(scratch)]
        pid_read, pid_write = os.pipe()
        with open(pid_read, "rb") as report:
            self._guard = self._start_guard([*options, "--", *command], env, pid_write)
            os.close(pid_write)
            self._pump = threading.Thread(
                target=self._pump_log, args=(log_file,), name=f"{name}-log", daemon=True
            )
            self._pump.start()
            pid = report.read()
        if not pid:
            raise self.died()
        self.pid = int(pid)

    @staticmethod
    def _start_guard(
        arguments: Sequence[str], env: Mapping[str, str], pid_fd: int
    ) -> subprocess.Popen[str]:
        return subprocess.Popen(
            # -I -S: the guard needs the standard library only and starts in milliseconds.
            [sys.executable, "-I", "-S", str(GUARD), "--pid-fd", str(pid_fd), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=dict(env),
            pass_fds=(pid_fd,),
            # Ctrl-C is the launcher's to handle, not the child's. Not a session of its own: Linux
            # shares processors out between sessions first (autogroups), and with all of them busy
            # the adapter then waited up to 250 ms for the engine's session to let it run.
            process_group=0,
            text=True,
            errors="replace",
        )

    def _pump_log(self, log_file: Path | None) -> None:
        assert self._guard.stdout is not None
        with contextlib.ExitStack() as stack:
            sink: TextIO | None = None
            if log_file is not None:
                sink = stack.enter_context(log_file.open("a", buffering=1, encoding="utf-8"))
            for raw in self._guard.stdout:
                line = raw.rstrip("\n")
                if not line.startswith(NOISE):
                    self._tail.append(line)
                if sink is not None:
                    sink.write(raw)
                if self._on_log is not None:
                    self._on_log(line)

    @property
    def running(self) -> bool:
        return self._guard.poll() is None

    @property
    def last_line(self) -> str:
        return self._tail[-1] if self._tail else ""

    def tail(self) -> list[str]:
        """The last lines of its log."""
        return list(self._tail)

    def died(self) -> ProcessDiedError:
        """The error that describes its unexpected end; call it once `running` is false."""
        status = self._guard.wait()
        self._pump.join(timeout=2.0)
        return ProcessDiedError(f"{self.name} ended with exit status {status}", self.tail())

    def stop(self) -> None:
        """End the command and everything it started; returns when all of it is gone."""
        assert self._guard.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._guard.stdin.close()
        try:
            self._guard.wait(self._grace + GUARD_MARGIN_SECONDS)
        except subprocess.TimeoutExpired:
            self._kill()
        self._pump.join(timeout=2.0)

    def _kill(self) -> None:
        """The guard itself is stuck: end the command's group and the guard from here."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._guard.kill()
        self._guard.wait()
