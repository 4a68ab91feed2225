"""Starts, watches and ends the rank processes; rank 0 is the engine's own process.

A socket pair connects rank 0 to each other rank. When one side dies, for any reason, the pair
closes: rank 0 notices the death of a rank, and a rank that of rank 0.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import queue
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import cast

from dllm_engine.errors import CheckpointError, DllmError, EngineDead, InvalidConfig

logger = logging.getLogger("dllm_engine")

#: Seconds that a rank may take to stop before it is killed.
_STOP_SECONDS = 5.0
#: Seconds to wait after a failed collective call: for the report of a dead rank, then for each
#: rank's answer to a ping.
_DIAGNOSIS_SECONDS = 2.0
_PING, _PONG = "ping", "pong"
_PACKAGE = Path(__file__).parents[1]


@dataclasses.dataclass(frozen=True)
class RankInfo:
    """A rank's number and how it joins the others."""

    rank: int
    size: int
    #: The file through which the ranks find each other; its folder is deleted at the end.
    rendezvous_file: Path
    #: Threads to use on a CPU.
    threads: int
    #: Time-out of a collective call, in seconds.
    timeout: float


@dataclasses.dataclass(frozen=True)
class _Rank:
    """Another rank, seen from rank 0."""

    name: str
    process: subprocess.Popen[bytes]
    connection: Connection[object, object]
    #: Its answers; None once any rank has failed.
    replies: queue.SimpleQueue[object]


class Ranks:
    """The other ranks of one model. Only `on_failure` and `diagnose` are thread-safe.

    Args:
        size: number of ranks, including rank 0.
        threads, timeout: see `RankInfo`.
        task: sent to each rank at its start.
    """

    def __init__(self, size: int, *, threads: int, timeout: float, task: object) -> None:
        rendezvous_file = Path(tempfile.mkdtemp(prefix="dllm-ranks-")) / "rendezvous"
        #: Rank 0's own.
        self.info = RankInfo(0, size, rendezvous_file, threads, timeout)
        #: The failure that ended the group.
        self.failure: DllmError | None = None
        self._failed = threading.Event()
        self._closing = False
        self._listeners: list[Callable[[], None]] = []
        self._lock = threading.Lock()
        self._diagnosing = threading.Lock()
        self._others: list[_Rank] = []
        self._watcher = threading.Thread(target=self._watch, name="dllm-ranks", daemon=True)
        try:
            for rank in range(1, size):
                self._others.append(_start(dataclasses.replace(self.info, rank=rank), task))
        except OSError:
            self.close(at_once=True)
            raise
        self._watcher.start()

    def on_failure(self, listener: Callable[[], None]) -> None:
        """Call `listener` from the watching thread when a rank fails; at once if one has failed."""
        with self._lock:
            self._listeners.append(listener)
            failed = self.failure is not None
        if failed:
            listener()

    def check(self) -> None:
        """Raise the failure if a rank has failed."""
        if self.failure is not None:
            raise type(self.failure)(str(self.failure))

    def post(self, message: object) -> None:
        """Send a message to all other ranks."""
        for rank in self._others:
            rank.connection.send(message)

    def collect(self) -> list[object]:
        """Wait for one answer from each rank; raise the failure if a rank fails."""
        answers = [rank.replies.get() for rank in self._others]
        self.check()
        return answers

    def diagnose(self, error: Exception) -> DllmError:
        """Find out why a collective call raised `error`, and end the group."""
        with self._diagnosing:
            if not self._failed.wait(_DIAGNOSIS_SECONDS):
                silent = ", ".join(self._silent())
                reason = f"{type(error).__name__}: {error}"
                if silent:
                    reason = f"{silent} did not answer within {self.info.timeout:g} s: {reason}"
                else:
                    reason = f"rank 0 of {self.info.size}: {reason}"
                self._fail(EngineDead(reason))
        assert self.failure is not None
        return self.failure

    def close(self, *, at_once: bool = False) -> None:
        """Stop the other ranks; kill those that do not stop within some seconds."""
        with self._lock:
            if self._closing:
                return
            self._closing = True
        # After a failure ranks may wait for each other, and would not read the message.
        timeout = 0.0 if at_once or self.failure is not None else _STOP_SECONDS
        for rank in self._others:
            try:
                rank.connection.send(None)
            except OSError:
                continue
        for rank in self._others:
            try:
                rank.process.wait(timeout)
            except subprocess.TimeoutExpired:
                rank.process.kill()
                rank.process.wait()
        if self._watcher.is_alive():
            self._watcher.join()
        for rank in self._others:
            rank.connection.close()
        shutil.rmtree(self.info.rendezvous_file.parent, ignore_errors=True)

    def _watch(self) -> None:
        alive = {rank.connection: rank for rank in self._others}
        while alive:
            for ready in wait(list(alive)):
                assert isinstance(ready, Connection)
                rank = alive[ready]
                try:
                    message = ready.recv()
                except (EOFError, OSError):
                    del alive[ready]
                    self._fail(EngineDead(f"{rank.name} {_end_of(rank.process)}"))
                    continue
                if isinstance(message, DllmError):
                    self._fail(_of_rank(rank.name, message))
                else:
                    rank.replies.put(message)

    def _fail(self, error: DllmError) -> None:
        with self._lock:
            if self._closing or self.failure is not None:
                return
            self.failure = error
            listeners = list(self._listeners)
        self._failed.set()
        logger.error("%s", error)
        for rank in self._others:
            rank.replies.put(None)
        for listener in listeners:
            listener()

    def _silent(self) -> list[str]:
        """Names of ranks that do not answer a ping; a rank in a collective call answers."""
        names = []
        for rank in self._others:
            try:
                rank.connection.send(_PING)
                rank.replies.get(timeout=_DIAGNOSIS_SECONDS)
            except (OSError, queue.Empty):
                names.append(rank.name)
        return names


class RankConnection:
    """A rank's connection to rank 0; `descriptor` is its end of the socket pair."""

    def __init__(self, descriptor: int) -> None:
        # A signal to the process group is for rank 0, which lets running requests finish first.
        for name in (signal.SIGINT, signal.SIGTERM):
            signal.signal(name, signal.SIG_IGN)
        self._connection: Connection[object, object] = Connection(descriptor)
        self.info, self.task = cast(tuple[RankInfo, object], self._connection.recv())
        self._sending = threading.Lock()
        self._inbox: queue.SimpleQueue[object] = queue.SimpleQueue()
        threading.Thread(target=self._listen, name="dllm-connection", daemon=True).start()

    def next(self) -> object:
        """Wait for the next message; None: stop."""
        return self._inbox.get()

    def reply(self, message: object) -> None:
        """Answer rank 0."""
        with self._sending:
            self._connection.send(message)

    def fail(self, error: DllmError) -> None:
        """Tell rank 0 why this rank fails."""
        self.reply(error)

    def _listen(self) -> None:
        # On its own thread, so that a rank answers pings during a collective call, and exits with
        # rank 0 at any time.
        try:
            while True:
                message = self._connection.recv()
                if message == _PING:
                    self.reply(_PONG)
                else:
                    self._inbox.put(message)
        except (EOFError, OSError):
            shutil.rmtree(self.info.rendezvous_file.parent, ignore_errors=True)
            os._exit(1)


def _start(info: RankInfo, task: object) -> _Rank:
    ours, theirs = socket.socketpair()
    # A rank can import the same modules as this process, however this process was started.
    paths = [str(_PACKAGE.parent), *filter(None, sys.path)]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(paths),
        "OMP_NUM_THREADS": str(info.threads),
    }
    entry = f"from {_PACKAGE.name}.execution.rank_worker import main; main"
    python = sys.executable or shutil.which("python3") or "python3"
    with theirs:
        process = subprocess.Popen(
            [python, "-P", "-c", f"{entry}({theirs.fileno()})"],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            env=environment,
        )
    connection: Connection[object, object] = Connection(ours.detach())
    name = f"rank {info.rank} of {info.size} (process {process.pid})"
    connection.send((info, task))
    return _Rank(name, process, connection, queue.SimpleQueue())


def _end_of(process: subprocess.Popen[bytes]) -> str:
    try:
        code = process.wait(_STOP_SECONDS)
    except subprocess.TimeoutExpired:
        return "has closed its connection"
    return f"was killed by signal {-code}" if code < 0 else f"ended with status {code}"


def _of_rank(name: str, error: DllmError) -> DllmError:
    """The error with the name of its rank."""
    kind = type(error) if isinstance(error, CheckpointError | InvalidConfig) else EngineDead
    return kind(f"{name}: {error}")
