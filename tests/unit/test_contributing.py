"""The worked examples of CONTRIBUTING.md work."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
#: An indented block of code whose first line is a comment that says where the rest goes.
BLOCK = re.compile(
    r'^ {3}```python\n {3}# (\S+), (?:(above|below) "([^\n]+)"|a new file)\n(.*?)^ {3}```$',
    re.M | re.S,
)


def place(code: str, file: Path, side: str, mark: str) -> None:
    """Insert code above or below the only line of a file that contains the mark."""
    lines = file.read_text().splitlines(keepends=True)
    (index,) = (i for i, line in enumerate(lines) if mark in line)
    lines.insert(index + (side == "below"), code)
    file.write_text("".join(lines))


def carry_out(page: str, tree: Path) -> list[Path]:
    """Make every change that the page describes; returns the new files."""
    created = []
    for name, side, mark, block in BLOCK.findall(page):
        # Not textwrap.dedent: what is inserted may be indented.
        code = re.sub(r"^ {3}", "", block, flags=re.M)
        file = tree / name
        if side:
            place(code, file, side, mark)
        else:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(code)
            created.append(file)
    return created


@pytest.mark.slow
def test_the_worked_examples_work(tmp_path: Path) -> None:
    """A rule and a family, added as the page says, pass the tests that the page writes."""
    engine = ROOT / "model_repository/dllm/1/dllm_engine"
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(engine, tmp_path / "dllm_engine", ignore=ignored)
    shutil.copytree(ROOT / "tests/support", tmp_path / "tests/support", ignore=ignored)
    created = carry_out((ROOT / "CONTRIBUTING.md").read_text(), tmp_path)
    tests = [file for file in created if file.name.startswith("test_")]
    assert len(tests) == 2
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *map(str, tests)],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    assert "2 passed" in run.stdout
