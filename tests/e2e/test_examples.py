"""The programs in examples/ run."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.servers import CHECKOUT, REPOSITORY, AdapterServer, triton_server

pytestmark = [pytest.mark.slow, pytest.mark.timeout(200)]

EXAMPLES = CHECKOUT / "examples"
CHECKPOINT = REPOSITORY / "dllm/1/demo_checkpoint"


@pytest.fixture(scope="module")
def urls(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Addresses of a service, by who is called."""
    folder = tmp_path_factory.mktemp("examples")
    with (
        triton_server(CHECKPOINT, log_file=folder / "triton.log") as triton,
        AdapterServer(triton, folder / "jobs.db") as adapter,
    ):
        yield {"adapter": adapter.url, "http": triton.http_url, "grpc": triton.grpc_url}


def run(name: str, *arguments: str | Path) -> str:
    """The output of an example."""
    command = [sys.executable, EXAMPLES / name, *arguments]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


@pytest.mark.parametrize(
    ("name", "door", "expected"),
    [
        ("rest_guide.py", "adapter", "is submitted"),
        ("chat_openai.py", "adapter", "42"),
        ("logprobs_openai.py", "adapter", "step"),
        ("infilling.py", "adapter", "Paris."),
        ("triton_http.py", "http", "forward passes"),
        ("triton_grpc_stream.py", "grpc", ""),
    ],
)
def test_an_example_answers(urls: dict[str, str], name: str, door: str, expected: str) -> None:
    """An example that takes an address ends well and prints its answer."""
    printed = run(name, "--url", urls[door])
    assert printed.strip()
    assert expected in printed


def test_a_csv_gets_its_answers(urls: dict[str, str], tmp_path: Path) -> None:
    """Each row has its answer beside it, in the order of the file."""
    questions, answers = tmp_path / "questions.csv", tmp_path / "answers.csv"
    questions.write_text("id,question\na,What is 17 + 25?\nb,What is 34 + 21?\n")
    run("batch_csv.py", questions, answers, "--url", urls["adapter"])
    header, first, second = answers.read_text().splitlines()
    assert header == "id,question,answer"
    assert first.startswith("a,What is 17 + 25?,")
    assert "42" in first
    assert "55" in second


def test_the_engine_answers_without_a_server() -> None:
    """The offline example prints the answer and what it cost."""
    printed = run("offline.py", CHECKPOINT)
    assert "42" in printed
    assert "forward passes" in printed


def test_every_example_is_run() -> None:
    """This file names each program of the folder."""
    here = Path(__file__).read_text()
    assert [file.name for file in EXAMPLES.glob("*.py") if f'"{file.name}"' not in here] == []
