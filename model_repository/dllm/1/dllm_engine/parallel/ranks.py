"""Rank processes: started, watched and ended by rank 0, which is the engine's own process.

Rank 0 holds one end of a socket pair to each. What must be true of every other rank follows from
it: a closed pair tells rank 0 of a rank's death and a rank of rank 0's, however either died.
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

from dllm_engine.errors import CheckpointError, DllmError, EngineDead, InvalidConfig

logger = logging.getLogger("dllm_engine")

#: How long a rank that is told to stop may take.
_STOP_SECONDS = 5.0
#: When a collective call fails, the reason follows within this if a rank has died, and an answer
#: from every rank that still runs.
_NOTICE_SECONDS = 2.0
_PING, _PONG = "ping", "pong"
_PACKAGE = Path(__file__).parents[1]


@dataclasses.dataclass(frozen=True)
class RankInfo:
    """A rank's place among the others."""

    rank: int
    size: int
    #: A file by way of which the ranks meet; its folder goes when they part.
    rendezvous_file: Path
    #: Threads on a CPU.
    threads: int
    #: Seconds that a collective call may take.
    timeout: float


@dataclasses.dataclass(frozen=True)
class _Start:
    """The first message to a rank."""

    info: RankInfo
    task: object


@dataclasses.dataclass(frozen=True)
class _Failed:
    """What a rank says before it gives up."""

    error: DllmError


@dataclasses.dataclass(frozen=True)
class _Rank:
    """Another rank, as rank 0 sees it."""

    name: str
    process: subprocess.Popen[bytes]
    connection: Connection[object, object]
    #: What it answered; None once any rank has failed.
    replies: queue.SimpleQueue[object]


class Ranks:
    """The other ranks of one model. Not thread-safe, but for `on_failure` and `diagnose`.

    Args:
        size: of the group, rank 0 included.
        threads, timeout: see `RankInfo`.
        task: what each rank gets to know at its start.
    """

    def __init__(self, size: int, *, threads: int, timeout: float, task: object) -> None:
        rendezvous_file = Path(tempfile.mkdtemp(prefix="dllm-ranks-")) / "rendezvous_file"
        #: Rank 0's own place.
        self.info = RankInfo(0, size, rendezvous_file, threads, timeout)
        #: Why the group is of no use any more.
        self.failure: DllmError | None = None
        self._failed = threading.Event()
        self._closing = False
        self._listeners: list[Callable[[], None]] = []
        self._lock = threading.Lock()
        self._asking = threading.Lock()
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
        """Call `listener` on a thread of ours when a rank fails, at once if one has."""
        with self._lock:
            self._listeners.append(listener)
            failed = self.failure is not None
        if failed:
            listener()

    def check(self) -> None:
        """Raise the failure, if there is one."""
        if self.failure is not None:
            raise type(self.failure)(str(self.failure))

    def post(self, message: object) -> None:
        """Send the same to all."""
        for rank in self._others:
            rank.connection.send(message)

    def collect(self) -> list[object]:
        """One answer from each; raises the failure if one of them fails instead."""
        answers = [rank.replies.get() for rank in self._others]
        self.check()
        return answers

    def diagnose(self, error: Exception) -> DllmError:
        """Why a collective call raised `error`; the group is of no use after it."""
        with self._asking:
            if not self._failed.wait(_NOTICE_SECONDS):
                silent = ", ".join(self._silent())
                what = f"{type(error).__name__}: {error}"
                if silent:
                    what = f"{silent} did not answer within {self.info.timeout:g} s: {what}"
                else:
                    what = f"rank 0 of {self.info.size}: {what}"
                self._fail(EngineDead(what))
        assert self.failure is not None
        return self.failure

    def close(self, *, at_once: bool = False) -> None:
        """End the others; ones that have not stopped within some seconds are killed."""
        with self._lock:
            if self._closing:
                return
            self._closing = True
        # After a failure they may wait for each other, and would not hear us.
        patience = 0.0 if at_once or self.failure is not None else _STOP_SECONDS
        for rank in self._others:
            try:
                rank.connection.send(None)
            except OSError:
                continue
        for rank in self._others:
            try:
                rank.process.wait(patience)
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
                if isinstance(message, _Failed):
                    self._fail(_of_rank(rank.name, message.error))
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
        """Names of the ranks that do not answer; one that merely waits for others does."""
        names = []
        for rank in self._others:
            try:
                rank.connection.send(_PING)
                rank.replies.get(timeout=_NOTICE_SECONDS)
            except (OSError, queue.Empty):
                names.append(rank.name)
        return names


class RankConnection:
    """Rank 0, as another rank sees it; `descriptor` is that rank's end of the socket pair."""

    def __init__(self, descriptor: int) -> None:
        # A signal to the whole process group means rank 0: it lets running requests finish first.
        for name in (signal.SIGINT, signal.SIGTERM):
            signal.signal(name, signal.SIG_IGN)
        self._connection: Connection[object, object] = Connection(descriptor)
        first = self._connection.recv()
        assert isinstance(first, _Start)
        self.info, self.task = first.info, first.task
        self._sending = threading.Lock()
        self._inbox: queue.SimpleQueue[object] = queue.SimpleQueue()
        threading.Thread(target=self._listen, name="dllm-connection", daemon=True).start()

    def next(self) -> object:
        """The next message; None: stop."""
        return self._inbox.get()

    def reply(self, message: object) -> None:
        """Answer rank 0."""
        with self._sending:
            self._connection.send(message)

    def fail(self, error: DllmError) -> None:
        """Tell rank 0 why this rank ends."""
        self.reply(_Failed(error))

    def _listen(self) -> None:
        # On a thread of its own, so that a rank that waits for others is heard, and leaves with
        # rank 0 whatever it is at.
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
    # Whatever this process can import, wherever it was started and by whom.
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
    connection.send(_Start(info, task))
    return _Rank(name, process, connection, queue.SimpleQueue())


def _end_of(process: subprocess.Popen[bytes]) -> str:
    try:
        code = process.wait(_STOP_SECONDS)
    except subprocess.TimeoutExpired:
        return "has closed its connection"
    return f"was killed by signal {-code}" if code < 0 else f"ended with status {code}"


def _of_rank(name: str, error: DllmError) -> DllmError:
    """The same error, with whose it is."""
    kind = type(error) if isinstance(error, CheckpointError | InvalidConfig) else EngineDead
    return kind(f"{name}: {error}")
