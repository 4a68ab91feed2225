"""The API against its own description."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.conftest import StartAdapter
from tests.support.servers import CHECKOUT

CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
)


@pytest.mark.parametrize(
    ("phases", "examples"),
    [("fuzzing", 5), pytest.param("coverage,fuzzing", 10, marks=pytest.mark.slow)],
)
def test_no_answer_leaves_the_description(
    start_adapter: StartAdapter, phases: str, examples: int
) -> None:
    """Whatever schemathesis sends, valid or not: no 5xx, no answer that is not described."""
    adapter = start_adapter(DLLM_MAX_GEN_LENGTH="32", DLLM_MAX_BATCH_SIZE="4")
    run = subprocess.run(
        [
            *(sys.executable, "-m", "schemathesis.cli", "run", f"{adapter.url}/openapi.json"),
            *("--checks", ",".join(CHECKS), "--phases", phases),
            *("--max-examples", str(examples), "--request-timeout", "60"),
            *("--seed", "1", "--no-color"),
        ],
        cwd=CHECKOUT,
        env={**os.environ, "SCHEMATHESIS_HOOKS": "tests.e2e.described_calls"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
