"""How settings are read and lines are written inside Triton's stub, which takes text for ASCII."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

MODEL = Path(__file__).parents[3] / "model_repository/dllm/1"

#: Triton's module, whose logger refuses surrogates as the real one does.
PB_UTILS = """
class Logger:
    @staticmethod
    def log_info(message):
        import os
        os.write(1, message.encode("utf-8") + b"\\n")
    log_warn = log_error = log_info
"""

SCRIPT = """
import json, logging, sys
from pathlib import Path

import dllm_settings
assert sys.getfilesystemencoding() == "ascii"
dllm_settings.log_to_triton()
path = sys.argv[1].encode("utf-8", "surrogateescape").decode()
config = json.dumps({"parameters": {"MODEL_PATH": {"string_value": path}}})
args = {"model_config": config, "model_instance_kind": "CPU"}
settings = dllm_settings.read_settings(args)
log = logging.getLogger("dllm_engine.test")
log.info("path=%s", settings["MODEL_PATH"])
log.warning("lone surrogate %s, escaped byte %s", chr(0xD800), chr(0xDCFF))
with dllm_settings.openable(settings) as opened:
    print(Path(opened["MODEL_PATH"], "config.json").read_text(), flush=True)
    link = opened["MODEL_PATH"]
assert not Path(link).exists()
"""


@pytest.mark.parametrize("by", ["environment", "config"])
def test_a_path_that_is_not_ascii_is_opened_and_logged(tmp_path: Path, by: str) -> None:
    """The path reaches the engine by a link and the log as it is; no line of the log raises."""
    (tmp_path / "triton_python_backend_utils.py").write_text(PB_UTILS)
    checkpoint = tmp_path / "modèle"
    checkpoint.mkdir()
    (checkpoint / "config.json").write_text("found")
    ascii_only = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    path = {"MODEL_PATH": str(checkpoint)} if by == "environment" else {}
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(checkpoint) if by == "config" else ""],
        env={**os.environ, **ascii_only, **path, "PYTHONPATH": f"{MODEL}:{tmp_path}"},
        capture_output=True,
        encoding="utf-8",
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines() == [
        f"[dllm] path={checkpoint}",
        "[dllm] lone surrogate ?, escaped byte ?",
        "found",
    ]


def test_the_demo_checkpoint_is_opened_in_a_repository_that_is_not_ascii(tmp_path: Path) -> None:
    """The interpreter gives this file's own place with surrogates, too."""
    (tmp_path / "triton_python_backend_utils.py").write_text(PB_UTILS)
    version = tmp_path / "modèle"
    version.symlink_to(MODEL)
    ascii_only = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0", "MODEL_PATH": ""}
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, ""],
        env={**os.environ, **ascii_only, "PYTHONPATH": f"{version}:{tmp_path}"},
        capture_output=True,
        encoding="utf-8",
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith(f"[dllm] path={version / 'demo_checkpoint'}\n")
