"""Compiles every kernel for real cards, whose compiler rejects more than the interpreter does."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
KERNELS = ROOT / "model_repository/dllm/1/dllm_engine/ops/kernels"


def defined_kernels() -> set[str]:
    """Names of the functions that the kernels' modules launch."""
    launched = set()
    for path in KERNELS.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):
                launched.add(ast.unparse(node.func.value))
    return launched


@pytest.mark.slow
@pytest.mark.parametrize(("capability", "shared"), [(89, 99), (90, 227)])
def test_every_kernel_compiles(capability: int, shared: int, tmp_path: Path) -> None:
    """Every kernel compiles to machine code of an L40 and an H100.

    It does so at the sizes of LLaDA-8B and Dream-7B, for the H100 in every form. A program fits
    into the `shared` KiB of the card and spills next to no registers, kernels that multiply
    load ahead, and the head computes nothing in double precision.
    """
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(KERNELS.parents[2])])
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.compile_kernels", str(capability)],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    compiled = [json.loads(line) for line in done.stdout.splitlines()]
    assert {found["kernel"] for found in compiled} == defined_kernels()
    for found in compiled:
        assert found["stack"] < 1024, found
        assert found["shared"] <= shared * 1024, found
        if found["kernel"] == "_reduce":  # also with noise, of which each token needs a number
            assert found["double_arithmetic"] == 0, found
        if found["kernel"] in ("_attend", "_linear", "_reduce"):
            assert found["async_copies"] > 0, found
