"""Kernels run on a GPU where there is one, and in the Triton language's interpreter elsewhere."""

import os
from pathlib import Path

if not Path("/dev/nvidiactl").exists():
    # Read when the package triton is imported for the first time, which transformers may do.
    os.environ["TRITON_INTERPRET"] = "1"
