"""Reads the engine's settings inside Triton's stub, and writes its log there.

The stub's interpreter takes the environment and paths for ASCII, whatever the locale is: bytes
beyond it become surrogates, which Triton's logger refuses, and a path with `è` cannot be opened.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import triton_python_backend_utils as pb_utils
from dllm_engine import EngineConfig, InvalidConfig
from dllm_setting_names import misspelt

logger = logging.getLogger("dllm_engine.triton")

#: The setting that lets the server outlive its engine.
EXIT_ON_ENGINE_DEATH = "DLLM_EXIT_ON_ENGINE_DEATH"
#: A parameter of models that `dllm-serve add` makes: their config.pbtxt comes before the
#: environment, which all models of a server share.
CONFIG_FIRST = "CONFIG_FIRST"


def read_settings(args: Mapping[str, str]) -> dict[str, str]:
    """Parameters of config.pbtxt, overridden by the environment; defaults for this instance.

    With the parameter `CONFIG_FIRST` the environment overrides only those that are not given.
    """
    for warning in misspelt(os.environ):
        logger.warning("%s", warning)
    parameters = json.loads(args["model_config"])["parameters"]
    settings = {name: value["string_value"] for name, value in parameters.items()}
    config_first = parse_switch(CONFIG_FIRST, settings.pop(CONFIG_FIRST, "off"))
    given = {name: value for name, value in settings.items() if value}
    names = [*EngineConfig.settings(), EXIT_ON_ENGINE_DEATH]
    settings |= {name: readable(os.environ[name]) for name in names if os.environ.get(name)}
    if config_first:
        settings |= given
    if not settings.get("MODEL_PATH"):
        settings["MODEL_PATH"] = readable(str(Path(__file__).parent / "demo_checkpoint"))
    if args["model_instance_kind"] == "GPU" and settings.get("DLLM_DEVICE") in ("", "auto"):
        settings["DLLM_DEVICE"] = f"cuda:{args['model_instance_device_id']}"
    return settings


def parse_switch(name: str, text: str) -> bool:
    """`on`, the default, or `off`. Raises `InvalidConfig`."""
    if text not in ("", "on", "off"):
        raise InvalidConfig(f"{name}: must be on or off, got {text!r}")
    return text != "off"


def readable(text: str) -> str:
    """The text with its surrogates decoded as UTF-8; what is no UTF-8 becomes `�`."""
    try:
        raw = text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # a surrogate that stands for no byte
        raw = text.encode("utf-8", "replace")
    return raw.decode("utf-8", "replace")


@contextmanager
def openable(settings: Mapping[str, str]) -> Iterator[dict[str, str]]:
    """The settings with a MODEL_PATH that this interpreter can open: a link to it, if need be."""
    path = settings["MODEL_PATH"].encode()
    try:
        os.fsencode(settings["MODEL_PATH"])
        needs_link = False
    except UnicodeEncodeError:
        needs_link = os.path.isdir(path)
    if not needs_link:
        yield dict(settings)
        return
    folder = tempfile.mkdtemp(prefix="dllm-checkpoint-")
    try:
        link = f"{folder}/checkpoint"
        os.symlink(os.path.abspath(path), link.encode())
        yield {**settings, "MODEL_PATH": link}
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class _TritonLogHandler(logging.Handler):
    """Writes the engine's log lines into the server's log."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            message = readable(f"[dllm] {self.format(record)}")
            if record.levelno >= logging.ERROR:
                pb_utils.Logger.log_error(message)
            elif record.levelno >= logging.WARNING:
                pb_utils.Logger.log_warn(message)
            else:
                pb_utils.Logger.log_info(message)
        except Exception:  # noqa: BLE001 - a line that cannot be written must not fail the work
            self.handleError(record)


def log_to_triton() -> None:
    """Send the engine's log lines to the server's log."""
    root = logging.getLogger("dllm_engine")
    root.handlers = [_TritonLogHandler()]
    root.setLevel(logging.INFO)
