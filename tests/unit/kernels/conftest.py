"""Makes the interpreter multiply matrices like a GPU: a row's result depends on that row alone.

The interpreter gives `tl.dot` to numpy's BLAS. On some processors its kernels round a row
differently by its place in the matrix, which tensor cores never do. In float64, rounded once, the
place makes no difference.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest


@pytest.fixture(autouse=True, scope="session")
def products_of_rows_alone() -> Iterator[None]:
    """Replace the interpreter's product if the interpreter runs."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        yield
        return
    from triton.runtime import interpreter

    def dot(_: Any, a: Any, b: Any, d: Any, *_precision: Any) -> Any:
        assert a.data.dtype.kind == b.data.dtype.kind == "f"
        product = np.matmul(a.data.astype(np.float64), b.data.astype(np.float64))
        total = product.astype(d.data.dtype) + d.data
        return interpreter.TensorHandle(total, d.dtype.scalar)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.InterpreterBuilder, "create_dot", dot)
        yield
