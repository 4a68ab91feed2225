"""Metrics of all worker processes together.

`prometheus_client` adds up what several processes count if each of them finds, before it is
imported, a directory in PROMETHEUS_MULTIPROC_DIR. Workers of one uvicorn agree on one by their
parent's process id; elsewhere (gunicorn) whoever starts the workers sets the variable.
"""

import multiprocessing
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

VARIABLE = "PROMETHEUS_MULTIPROC_DIR"
PREFIX = "dllm-metrics-"


def share_metrics() -> None:
    """Have this process and its siblings, if it has any, count together."""
    parent = multiprocessing.parent_process()
    if parent is None or parent.pid is None or os.environ.get(VARIABLE):
        return
    root = Path(tempfile.gettempdir())
    _sweep(root)
    folder = root / f"{PREFIX}{os.getuid()}-{parent.pid}-{_start_time(parent.pid)}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid == os.getuid():
        os.environ[VARIABLE] = str(folder)


def forget_the_dead(mark_dead: object) -> None:
    """Have the gauges of workers that are no more not counted any more."""
    if not (folder := os.environ.get(VARIABLE)) or not callable(mark_dead):
        return
    for file in Path(folder).glob("gauge_live*_*.db"):
        pid = int(file.stem.rpartition("_")[2])
        if not _alive(pid):
            mark_dead(pid)


def _sweep(root: Path) -> None:
    """Remove what workers of servers that are no more have left."""
    for folder in root.glob(f"{PREFIX}{os.getuid()}-*-*"):
        _, pid, started = folder.name.removeprefix(PREFIX).split("-", 2)
        if _start_time(int(pid)) != started:
            shutil.rmtree(folder, ignore_errors=True)


def _alive(pid: int) -> bool:
    return _start_time(pid) != ""


def _start_time(pid: int) -> str:
    """When the process began, in the kernel's clock ticks, or nothing if there is none."""
    with suppress(OSError):
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
        if state != "Z":
            return fields[18]
    return ""


share_metrics()
