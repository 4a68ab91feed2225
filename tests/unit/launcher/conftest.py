"""Model repositories for a real server, and a look at what it leaves behind."""

from pathlib import Path

import pytest

CONFIG = """
backend: "python"
input [ { name: "IN" data_type: TYPE_FP32 dims: [ -1 ] } ]
output [ { name: "OUT" data_type: TYPE_FP32 dims: [ -1 ] } ]
"""

ECHO = """
import os
import sys

import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def initialize(self, args):
        print("echo runs in", sys.prefix, os.environ.get("ECHO_NOTE"), flush=True)

    def execute(self, requests):
        return [self.answer(request) for request in requests]

    def answer(self, request):
        value = pb_utils.get_input_tensor_by_name(request, "IN").as_numpy()
        return pb_utils.InferenceResponse([pb_utils.Tensor("OUT", value)])
"""

STUBBORN = """
import signal
import time

signal.signal(signal.SIGTERM, signal.SIG_IGN)


class TritonPythonModel:
    def execute(self, requests):
        return []

    def finalize(self):
        time.sleep(600)
"""

BROKEN = """
class TritonPythonModel:
    def initialize(self, args):
        raise ValueError("the checkpoint has no tensor 'wte'")
"""


def add_model(repository: Path, name: str, source: str) -> None:
    version = repository / name / "1"
    version.mkdir(parents=True)
    (version / "model.py").write_text(source)
    (repository / name / "config.pbtxt").write_text(CONFIG)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A repository with a model that answers, one that fails to load, one that will not end."""
    folder = tmp_path / "repository"
    add_model(folder, "echo", ECHO)
    add_model(folder, "broken", BROKEN)
    add_model(folder, "stubborn", STUBBORN)
    return folder
