"""Instances of one model on one server forward cancels to each other.

Triton hands a request to any free instance, so the instance that gets a cancel is often not the one
that runs the request.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import select
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

#: Seconds after which an unacknowledged message is sent again, and after which one is sent that
#: found the socket full (it holds about ten).
AGAIN_SECONDS = 0.1
ROOM_SECONDS = 0.002
#: Longest message; a longer one was not sent by a peer.
MAX_BYTES = 65536

Done = Callable[[], object]


@dataclasses.dataclass
class _Waiting:
    """A cancel, and the instances that have not acknowledged it."""

    message: bytes
    #: Instances to wait for, and when (seconds, monotonic) to send to each again.
    missing: dict[str, float]
    done: Done


class InstanceBus:
    """One instance's place among the others: a socket in a folder that they share.

    Messages may be lost, so each is sent until its receiver acknowledges it or is gone.

    Args:
        folder: shared by all instances of a model, and by them alone; made where it is missing.
        instance: this instance's name.
        end: ends the requests with an id here, then calls its second argument; it must not block.

    Raises:
        OSError: the folder or the socket cannot be made.
    """

    def __init__(self, folder: Path, instance: str, end: Callable[[str, Done], None]) -> None:
        folder.mkdir(mode=0o700, exist_ok=True)
        if folder.stat().st_uid != os.getuid():
            raise PermissionError(f"{folder} belongs to another user")
        self._folder = folder
        self._path = folder / f"{instance}-{os.getpid()}"
        self._end = end
        self._tokens = itertools.count()
        self._waiting: dict[int, _Waiting] = {}
        #: Senders and tokens of cancels that are not done yet.
        self._ending: set[tuple[str, int]] = set()
        self._lock = threading.Lock()
        self._closing = False
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setblocking(False)
        self._path.unlink(missing_ok=True)
        self._socket.bind(str(self._path))
        self._thread = threading.Thread(target=self._loop, name="dllm-peers", daemon=True)
        self._thread.start()

    def broadcast_cancel(self, name: str, done: Done) -> None:
        """Have all other instances end the requests with this id, then call `done`.

        `done` is called on any thread, and must not block. An instance that dies counts as done.
        """
        others = {str(path) for path in self._folder.iterdir()} - {str(self._path)}
        if not others:
            done()
            return
        token = next(self._tokens)
        message = json.dumps({"end": name, "token": token}).encode()
        with self._lock:
            self._waiting[token] = _Waiting(message, dict.fromkeys(others, 0.0), done)
        self._wake()

    def close(self) -> None:
        """Stop; cancels that still wait count as done."""
        if self._closing:
            return
        self._closing = True
        self._wake()
        self._thread.join()
        self._socket.close()
        self._path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # the others are still there
            self._folder.rmdir()
        for waiting in self._waiting.values():
            waiting.done()

    def _wake(self) -> None:
        self._send(b"", str(self._path))

    def _loop(self) -> None:
        while not self._closing:
            select.select([self._socket], [], [], self._ask())
            with contextlib.suppress(BlockingIOError):
                while True:
                    message, sender = self._socket.recvfrom(MAX_BYTES)
                    if message:
                        self._receive(json.loads(message), sender)

    def _ask(self) -> float | None:
        """Send what is due; returns the seconds until more is."""
        with self._lock:
            waiting = list(self._waiting.items())
        now = time.monotonic()
        for token, asked in waiting:
            for path in [path for path, due in asked.missing.items() if due <= now]:
                sent = self._send(asked.message, path)
                if sent is None:
                    self._answered(token, path)
                else:
                    asked.missing[path] = now + (AGAIN_SECONDS if sent else ROOM_SECONDS)
        times = [due for _, asked in waiting for due in asked.missing.values()]
        return max(0.0, min(times) - now) if times else None

    def _receive(self, message: dict[str, str | int], sender: str) -> None:
        token = int(message["token"])
        if "end" not in message:
            self._answered(token, sender)
            return
        answer = json.dumps({"token": token}).encode()
        if (sender, token) in self._ending:
            return  # sent again during a long step
        self._ending.add((sender, token))

        def done() -> None:
            self._ending.discard((sender, token))
            self._send(answer, sender)

        self._end(str(message["end"]), done)

    def _answered(self, token: int, path: str) -> None:
        with self._lock:
            asked = self._waiting.get(token)
            if asked is None:
                return
            asked.missing.pop(path, None)
            if asked.missing:
                return
            del self._waiting[token]
        asked.done()

    def _send(self, message: bytes, path: str) -> bool | None:
        """Send without waiting; returns whether there was room, None if the receiver is gone."""
        try:
            self._socket.sendto(message, path)
        except (ConnectionRefusedError, FileNotFoundError):
            Path(path).unlink(missing_ok=True)
            return None
        except BlockingIOError:
            return False
        return True
