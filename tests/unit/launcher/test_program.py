"""The command `dllm` as a program: what it loads, its help, completion and exit codes."""

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from launcher.program import MODULES

DLLM = Path(sys.executable).with_name("dllm")


def dllm(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run the installed command."""
    environment = {**os.environ, "COLUMNS": "100", **env}
    return subprocess.run(
        [DLLM, *arguments], capture_output=True, text=True, env=environment, timeout=60, check=False
    )


def test_the_version_needs_nothing_heavy() -> None:
    """`--version` prints the package's version, and loads neither the client nor the launcher."""
    code = (
        "import sys; from launcher.program import app; "
        "app(['--version'], standalone_mode=False); "
        "print(*sorted({'httpx', 'rich', 'pydantic', 'dllm_client', 'torch'} & sys.modules.keys()))"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout == f"dllm {version('dllm-serve')}\n\n"


def test_help_lists_every_command() -> None:
    """Each command has a line in `dllm --help`, and help of its own."""
    shown = dllm("--help")
    assert shown.returncode == 0
    for name in MODULES:
        assert f" {name} " in shown.stdout
    assert "130 after Ctrl-C" in shown.stdout


def test_a_command_that_is_misspelt() -> None:
    """The exit code is 2, and the command that was probably meant is named."""
    outcome = dllm("generat")
    assert outcome.returncode == 2
    assert "Did you mean 'generate'?" in outcome.stderr


def test_completion() -> None:
    """A shell gets the commands, and the options of a command, by their beginnings."""
    words = {"_DLLM_COMPLETE": "complete_bash", "COMP_CWORD": "1", "COMP_WORDS": "dllm ge"}
    assert dllm(**words).stdout.split() == ["generate"]
    words |= {"COMP_CWORD": "2", "COMP_WORDS": "dllm generate --conf"}
    assert set(dllm(**words).stdout.split()) == {
        "--confidence-threshold",
        "--confidence-eos-eot-inf",
    }


@pytest.mark.parametrize(("name", "extra"), [("chat", "client"), ("serve", "server")])
def test_a_command_without_its_packages(tmp_path: Path, name: str, extra: str) -> None:
    """It says which extra to install; the other commands and the help still work."""
    for package in ("httpx", "pydantic_settings"):
        (tmp_path / f"{package}.py").write_text(f"raise ModuleNotFoundError(name={package!r})")
    outcome = dllm(name, "--anything", PYTHONPATH=str(tmp_path))
    assert outcome.returncode == 1
    assert f"pip install 'dllm-serve[{extra}]'" in outcome.stderr
    assert dllm("--help", PYTHONPATH=str(tmp_path)).returncode == 0


def test_closed_files_are_empty_ones() -> None:
    """A command whose input and output the shell closed reads nothing and writes to no file."""
    command = f"'{DLLM}' chat <&- >&-"
    done = subprocess.run(["sh", "-c", command], capture_output=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
