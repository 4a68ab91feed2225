"""Kernels run on a GPU where there is one, and in the Triton language's interpreter elsewhere.

Property tests know no deadline: a busy machine is no fault of the code's.
"""

import os
from pathlib import Path

from hypothesis import settings

settings.register_profile("patient", deadline=None)
settings.load_profile("patient")

if not Path("/dev/nvidiactl").exists():
    # Read when the package triton is imported for the first time, which transformers may do.
    os.environ["TRITON_INTERPRET"] = "1"
