"""Ends tritonserver when the process of an engine ends.

When the process of a model is killed, Triton never answers its requests and starts no new process.
So each engine has a small process beside it, a watcher, that waits for the engine's end and then
kills the server: open streams break at once, and a supervisor can start the server again.

Run as a script, this file is the watcher. It needs the standard library only, and addresses other
processes by file descriptors (pidfd), which never refer to a later process of the same number.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

logger = logging.getLogger("dllm_engine.triton")

SHARED_MEMORY = Path("/dev/shm")
SERVER_NAME = "tritonserver"
STUB_NAME = "triton_python_backend_stub"
#: A server that SIGKILL has not ended after this long is process 1 of its container.
KILL_SECONDS = 1.0
#: An engine whose server is gone has this long to end by itself.
ORPHAN_SECONDS = 5.0
STDIN, STDOUT = 0, 1


class FailFast:
    """This engine's watcher; starting it may fail, and then `armed` is false."""

    def __init__(self) -> None:
        self._watcher: subprocess.Popen[bytes] | None = None

    @property
    def armed(self) -> bool:
        """Whether the server ends with this process."""
        return self._watcher is not None

    def arm(self) -> None:
        """End the server, this process's parent, when this process ends. Logs why it cannot."""
        server = os.getppid()
        if _name_of(server) != SERVER_NAME:
            logger.warning("the server outlives its engine: process %d is no tritonserver", server)
            return
        try:
            fds = [os.pidfd_open(os.getpid()), os.pidfd_open(server)]
        except (AttributeError, OSError) as error:
            logger.warning("the server outlives its engine: no file descriptor for it: %s", error)
            return
        python = sys.executable or shutil.which("python3") or "python3"
        arguments = [*fds, os.getpid(), server, _region_of(os.getpid())]
        try:
            watcher = subprocess.Popen(
                [python, "-I", "-S", __file__, *map(str, arguments)],
                pass_fds=fds,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
        except OSError as error:
            logger.warning("the server outlives its engine: no watcher: %s", error)
            return
        finally:
            for fd in fds:
                os.close(fd)
        assert watcher.stdout is not None
        if watcher.stdout.read(1):
            self._watcher = watcher
        else:
            logger.warning("the server outlives its engine: the watcher has not started")
            watcher.communicate()

    def disarm(self) -> None:
        """Let the server outlive this process, which ends in order."""
        watcher, self._watcher = self._watcher, None
        if watcher is not None and watcher.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                watcher.stdin.write(b".")
                watcher.stdin.close()
            watcher.wait()


def watch(engine: int, server: int, engine_pid: int, server_pid: int, region: str) -> None:
    """Wait for the end of the engine or of the server, and end the other; `engine` and `server` are
    file descriptors. A byte on standard input means that the engine ends in order."""
    poller = select.poll()
    for fd in (STDIN, engine, server):
        poller.register(fd, select.POLLIN)
    while True:
        ready = {fd for fd, _ in poller.poll()}
        if STDIN in ready:
            if os.read(STDIN, 1):
                return
            poller.unregister(STDIN)  # the engine's process is about to be gone
        if server in ready:
            if not _ends(engine, ORPHAN_SECONDS):
                _send(engine, signal.SIGKILL)
            _remove(region)
            return
        if engine in ready:
            _say(f"engine process {engine_pid} has ended; killing tritonserver {server_pid}")
            _end_server(server, server_pid, region)
            return


def _end_server(server: int, server_pid: int, region: str) -> None:
    """Kill the server, then the processes of its other models, and remove their shared memory."""
    stubs = list(_stubs_of(server_pid))
    _send(server, signal.SIGKILL)
    if not _ends(server, KILL_SECONDS):
        # The kernel drops SIGKILL to process 1 when it comes from inside its container.
        _say("tritonserver is process 1 of its container: asking it to stop by SIGTERM")
        _send(server, signal.SIGTERM)
        return
    for stub, its_region in stubs:
        _send(stub, signal.SIGKILL)
        _remove(its_region)
    _remove(region)


def _stubs_of(server_pid: int) -> Iterator[tuple[int, str]]:
    """A file descriptor for each process of the server's models, and its shared memory's name."""
    for folder in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError, IndexError):
            pid = int(folder.name)
            fd = os.pidfd_open(pid)  # first, so that what is read below is about this process
            command = _command_of(pid)
            is_stub = Path(os.fsdecode(command[0])).name == STUB_NAME
            if is_stub and _parent_of(pid) == server_pid:
                yield fd, os.fsdecode(command[2])
            else:
                os.close(fd)


def _region_of(pid: int) -> str:
    """The shared memory of a model's process: its second argument."""
    command = _command_of(pid)
    return os.fsdecode(command[2]) if len(command) > 2 else ""


def _command_of(pid: int) -> list[bytes]:
    return Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")


def _name_of(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text().strip()
    return ""


def _parent_of(pid: int) -> int:
    # The name, in parentheses, may hold spaces.
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def _ends(process: int, seconds: float) -> bool:
    poller = select.poll()
    poller.register(process, select.POLLIN)
    return bool(poller.poll(seconds * 1000))


def _send(process: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(process, number)


def _remove(region: str) -> None:
    if region and "/" not in region:
        with contextlib.suppress(OSError):
            (SHARED_MEMORY / region).unlink()


def _say(message: str) -> None:
    with contextlib.suppress(OSError):  # the reader of the log may be gone
        sys.stderr.write(f"[dllm] {message}\n")
        sys.stderr.flush()


if __name__ == "__main__":
    # A signal to the whole process group is for the server, which then ends its engines in order.
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(ignored, signal.SIG_IGN)
    os.write(STDOUT, b".")  # from here on, signals are ignored
    watch(*map(int, sys.argv[1:5]), sys.argv[5])
