"""Copies our model repository with changes for a test."""

from __future__ import annotations

import shutil
from pathlib import Path

from tests.support.servers import REPOSITORY

ONE_INSTANCE = "instance_group [ { count: 1 kind: KIND_AUTO } ]"

#: An engine hangs in a step while a file with its process's name exists.
HANG = """
import os, time
from pathlib import Path
from dllm_engine import Engine

_step = Engine.step


def _step_or_hang(engine):
    while Path("FOLDER", f"hang-{os.getpid()}").exists():
        time.sleep(0.1)
    return _step(engine)


Engine.step = _step_or_hang
"""


def changed_repository(folder: Path, *, instances: int = 1, can_hang: bool = False) -> Path:
    """A repository in `folder` with this many instances of `dllm`; see `hang`."""
    repository = folder / "repository"
    shutil.copytree(REPOSITORY, repository, ignore=shutil.ignore_patterns("__pycache__"))
    config = repository / "dllm/config.pbtxt"
    text = config.read_text()
    assert ONE_INSTANCE in text
    several = f"instance_group [ {{ count: {instances} kind: KIND_CPU }} ]"
    config.write_text(text.replace(ONE_INSTANCE, several))
    if can_hang:
        with (repository / "dllm/1/model.py").open("a") as model:
            model.write(HANG.replace("FOLDER", str(folder)))
    return repository


def hang(folder: Path, process: int) -> None:
    """Make the next step of this process's engine hang; its repository is in `folder`."""
    (folder / f"hang-{process}").touch()
