"""A guarded process: log, state and end."""

import sys
import time
from pathlib import Path

import pytest

from launcher.errors import ProcessDiedError
from launcher.process import TAIL_LINES, GuardedProcess


def python(code: str, **options: object) -> GuardedProcess:
    return GuardedProcess([sys.executable, "-c", code], name="child", env={}, **options)  # type: ignore[arg-type]


def test_command_that_is_not_there(tmp_path: Path) -> None:
    """A command that cannot be run raises, with the reason, and its scratch folder goes."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    with pytest.raises(ProcessDiedError, match="cannot run /nowhere: No such file"):
        GuardedProcess(["/nowhere"], name="child", env={}, scratch=scratch)
    assert not scratch.exists()


def test_unexpected_end_carries_status_and_tail() -> None:
    """The error of a process that ended has its exit status and only the last lines."""
    child = python("import sys\nfor i in range(100): print(i)\nsys.exit(3)")
    while child.running:
        time.sleep(0.02)
    error = child.died()
    child.stop()
    assert "exit status 3" in str(error)
    assert len(error.log_tail) == TAIL_LINES
    assert "99" == error.log_tail[-1] == child.last_line


def test_tail_leaves_out_the_import_machinery() -> None:
    """Frames of importlib, which would push the error out of the tail, are not kept."""
    lines: list[str] = []
    frames = "  <frozen importlib._bootstrap>(1126): _find_and_load_unlocked\\n"
    child = python(f"print('the error'); print('{frames}' * 100, end='')", on_log=lines.append)
    while child.running:
        time.sleep(0.02)
    assert child.died().log_tail == ("the error",)
    child.stop()
    assert len(lines) == 101


def test_stop_ends_what_ignores_sigterm() -> None:
    """SIGTERM first; SIGKILL once the grace is over."""
    code = "import signal, time; signal.signal(15, signal.SIG_IGN); print(1); time.sleep(60)"
    child = python("import sys\n" + code.replace("print(1)", "print(1, flush=True)"), grace=0.2)
    while not child.last_line:
        time.sleep(0.02)
    begun = time.monotonic()
    child.stop()
    assert not child.running
    assert time.monotonic() - begun < 3


def test_stop_removes_scratch(tmp_path: Path) -> None:
    """The scratch folder is removed with the process, however that ends."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    child = python("", scratch=scratch)
    child.stop()
    assert not scratch.exists()
