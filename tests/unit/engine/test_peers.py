"""Instances of a model forward cancels to each other."""

from __future__ import annotations

import os
import queue
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest
from dllm_peers import AGAIN_SECONDS, InstanceBus

PATIENCE = 10.0


class Instance:
    """An instance that notes what it is to end, and does so at once unless it is busy."""

    def __init__(self, folder: Path, name: str) -> None:
        self.ended: list[str] = []
        self.busy = False
        self.held: queue.SimpleQueue[Callable[[], object]] = queue.SimpleQueue()
        self.peers = InstanceBus(folder, name, self._end)

    def _end(self, name: str, done: Callable[[], object]) -> None:
        self.ended.append(name)
        if self.busy:
            self.held.put(done)
        else:
            done()

    def broadcast_cancel(self, name: str) -> threading.Event:
        """Set once it is done everywhere."""
        done = threading.Event()
        self.peers.broadcast_cancel(name, done.set)
        return done


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What instances of one model share."""
    return tmp_path / "model"


@pytest.fixture
def instances(folder: Path) -> Iterator[list[Instance]]:
    """Three of one model."""
    with ExitStack() as stack:
        made = [Instance(folder, f"dllm_0_{n}") for n in range(3)]
        for instance in made:
            stack.enter_context(closing(instance.peers))
        yield made


def test_all_others_end_it(instances: list[Instance]) -> None:
    """A broadcast reaches all other instances, and not its sender."""
    first, *others = instances
    assert first.broadcast_cancel("mine").wait(PATIENCE)
    assert first.ended == []
    assert [set(other.ended) for other in others] == [{"mine"}] * 2


def test_it_is_over_when_the_slowest_is_done(instances: list[Instance]) -> None:
    """An instance in a long step is waited for."""
    first, _, busy = instances
    busy.busy = True
    over = first.broadcast_cancel("mine")
    release = busy.held.get(timeout=PATIENCE)
    assert not over.wait(5 * AGAIN_SECONDS)
    release()
    assert over.wait(PATIENCE)
    assert busy.ended == ["mine"]


def test_many_at_once(instances: list[Instance]) -> None:
    """No cancel is lost when there are more than the sockets hold."""
    overs = [instances[n % 3].broadcast_cancel(f"request {n}") for n in range(300)]
    assert all(over.wait(PATIENCE) for over in overs)
    for n, instance in enumerate(instances):
        assert set(instance.ended) == {f"request {i}" for i in range(300) if i % 3 != n}


def test_dead_instances_are_not_waited_for(folder: Path, instances: list[Instance]) -> None:
    """The socket that a killed instance has left is removed."""
    left = folder / "dllm_0_9-1"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as dead:
        dead.bind(str(left))
    assert instances[0].broadcast_cancel("mine").wait(PATIENCE)
    assert not left.exists()


def test_instances_that_close_are_not_waited_for(instances: list[Instance]) -> None:
    """An instance that closes before it has answered counts as done."""
    first, _, busy = instances
    busy.busy = True
    over = first.broadcast_cancel("mine")
    busy.held.get(timeout=PATIENCE)
    busy.peers.close()
    assert over.wait(PATIENCE)


def test_the_only_instance_is_done_at_once(folder: Path) -> None:
    """A broadcast without others is done at once; the last instance removes the folder."""
    with closing(Instance(folder, "dllm_0_0").peers) as peers:
        done = threading.Event()
        peers.broadcast_cancel("mine", done.set)
        assert done.is_set()
    assert not folder.exists()


def test_folder_of_another_user_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another user may have made the folder first."""
    folder.mkdir()
    uid = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: uid + 1)
    with pytest.raises(PermissionError, match="another user"):
        InstanceBus(folder, "dllm_0_0", lambda _name, done: done())
