"""The code on the pages runs.

Each block of shell or Python on a page is run as a reader would run it, against a service, with the
service's addresses in place of the page's. A comment before a block may say otherwise:
`<!-- serves: URL -->` for a command that goes on until it is stopped, and
`<!-- not run: reason -->`. docs/clients.md has a test of its own, `test_clients.py`.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import requests

from launcher.ports import free_port
from tests.support.servers import CHECKOUT, REPOSITORY, AdapterServer, eventually, triton_server

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

PAGES = [
    CHECKOUT / "README.md",
    *sorted(page for page in (CHECKOUT / "docs").glob("*.md") if page.name != "clients.md"),
]
BLOCK = re.compile(
    r"(?:^<!-- (?P<mark>serves|not run): (?P<why>.+?) -->\n)?"
    r"^```(?P<language>bash|python)\n(?P<code>.*?)^```$",
    re.M | re.S,
)
RUN_SECONDS = 120


class Block(NamedTuple):
    """A block of code on a page."""

    language: str
    code: str
    #: The address that answers once it serves; None: it ends by itself.
    serves: str | None


def blocks(page: Path) -> list[Block]:
    """The blocks of a page that are run."""
    found = BLOCK.finditer(page.read_text())
    return [
        Block(b["language"], b["code"], b["why"] if b["mark"] == "serves" else None)
        for b in found
        if b["mark"] != "not run"
    ]


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A service; by the page's address, the address in its place."""
    folder = tmp_path_factory.mktemp("pages")
    checkpoint = REPOSITORY / "dllm/1/demo_checkpoint"
    with (
        triton_server(checkpoint, log_file=folder / "triton.log") as triton,
        AdapterServer(triton, folder / "jobs.db") as adapter,
    ):
        yield {
            "localhost:8000": adapter.url.removeprefix("http://"),
            "localhost:8010": triton.http_url,
            "127.0.0.1:8011": triton.grpc_url,
            "localhost:8012/metrics": triton.metrics_url.removeprefix("http://"),
        }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder that looks like the checkout, for blocks that write files."""
    for entry in CHECKOUT.iterdir():
        (tmp_path / entry.name).symlink_to(entry)
    return tmp_path


def command_of(block: Block, code: str) -> list[str]:
    """What runs a block."""
    if block.language == "python":
        return [sys.executable, "-c", code]
    return ["bash", "-euo", "pipefail", "-c", code]


def environment(places: dict[str, str]) -> dict[str, str]:
    """The test's environment, with its programs first and its service as the client's."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return os.environ | {"PATH": path, "DLLM_URL": f"http://{places['localhost:8000']}"}


@pytest.mark.parametrize("page", [*filter(blocks, PAGES)], ids=lambda page: page.name)
def test_the_code_on_a_page_runs(page: Path, places: dict[str, str], folder: Path) -> None:
    """Every block ends with exit code 0, or serves at its address until it is stopped."""
    for block in blocks(page):
        code = block.code
        for there, here in places.items():
            code = code.replace(there, here)
        if block.serves is None:
            run_to_its_end(block, code, folder, places)
        else:
            serve(block, code, folder, places)


def run_to_its_end(block: Block, code: str, folder: Path, places: dict[str, str]) -> None:
    """Run a block that ends."""
    run = subprocess.run(
        command_of(block, code),
        cwd=folder,
        env=environment(places),
        capture_output=True,
        text=True,
        timeout=RUN_SECONDS,
        check=False,
    )
    assert run.returncode == 0, f"{block.code}\n{run.stdout}\n{run.stderr}"
    # curl tells of an error only in what it prints, unless it is told otherwise.
    assert "Internal Server Error" not in run.stdout


def serve(block: Block, code: str, folder: Path, places: dict[str, str]) -> None:
    """Run a block that serves, until its address answers."""
    assert block.serves is not None
    match = re.search(r":(\d+)", block.serves)
    assert match is not None
    port = str(free_port())
    address = block.serves.replace(match[1], port)
    log = folder / "serves.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            command_of(block, code.replace(match[1], port)),
            cwd=folder,
            env=environment(places) | {"DLLM_DATABASE_URL": f"sqlite:///{folder}/jobs.db"},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        eventually(lambda: process.poll() is not None or answers(address), f"{address} answers")
        assert process.poll() is None, f"{block.code}\n{log.read_text()}"
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(timeout=60)


def answers(address: str) -> bool:
    """Whether a call there succeeds."""
    try:
        return requests.get(address, timeout=5).ok
    except requests.RequestException:
        return False
