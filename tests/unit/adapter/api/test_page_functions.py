"""The page's functions without a DOM, where node is installed."""

import shutil
import subprocess
from pathlib import Path

import pytest

from adapter.api.page import STATIC

TESTS = Path(__file__).parents[3] / "page"


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
def test_functions_of_the_page(tmp_path: Path) -> None:
    """tests/page/functions.test.js passes; node takes files beside that package.json as modules."""
    for file in (*STATIC.glob("page/*.js"), *TESTS.glob("*.js*")):
        shutil.copy(file, tmp_path)
    run = subprocess.run(
        ["node", "--test", "functions.test.js"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
