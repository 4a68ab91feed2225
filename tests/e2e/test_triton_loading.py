"""Loading the model repository."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from launcher.errors import SettingError
from tests.e2e.triton_calls import generate
from tests.support.checkpoints import (
    llada_config,
    llada_shapes,
    random_tensors,
    write_llada,
    write_tensors,
)
from tests.support.repositories import changed_repository
from tests.support.servers import CHECKOUT, REPOSITORY, triton_server

MARK = "this environment holds the engine's requirements only"


def engine_requirements() -> list[str]:
    """The engine's requirements in pyproject.toml."""
    with (CHECKOUT / "pyproject.toml").open("rb") as file:
        project = tomllib.load(file)["project"]
    requirements: list[str] = project["optional-dependencies"]["engine"]
    return requirements


def with_their_own(requirements: list[str]) -> dict[str, metadata.Distribution]:
    """The installed distributions that meet the requirements, and theirs, and so on."""
    found: dict[str, metadata.Distribution] = {}
    todo = [Requirement(text) for text in requirements]
    while todo:
        requirement = todo.pop()
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        distribution = metadata.distribution(requirement.name)
        assert requirement.specifier.contains(distribution.version, prereleases=True)
        if distribution.name not in found:
            found[distribution.name] = distribution
            todo += [Requirement(text) for text in distribution.requires or ()]
    return found


def make_environment(folder: Path) -> Path:
    """A fresh virtual environment with the engine's requirements; its Python.

    They are linked from where they are installed already: torch alone takes gigabytes.
    """
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    python = folder / "bin" / "python"
    ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
    packages = Path(
        subprocess.run([python, "-c", ask], check=True, capture_output=True, text=True).stdout[:-1]
    )
    for distribution in with_their_own(engine_requirements()).values():
        for top in {file.parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}:
            link = packages / top
            if not link.exists():
                link.symlink_to(Path(str(distribution.locate_file(top))))
    (packages / "sitecustomize.py").write_text(f"print({MARK!r}, flush=True)\n")
    return python


def test_repository_needs_the_engines_requirements_only(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy of the model repository serves where only the engine's requirements are installed."""
    python = make_environment(tmp_path / "environment")
    for ours in ("dllm_engine", "dllm_client", "adapter", "launcher", "fastapi", "tritonclient"):
        trial = subprocess.run([python, "-c", f"import {ours}"], capture_output=True, cwd=tmp_path)
        assert trial.returncode != 0, f"{ours} is importable"
    repository = tmp_path / "repository"
    shutil.copytree(REPOSITORY, repository, ignore=shutil.ignore_patterns("__pycache__"))
    log_file = tmp_path / "triton.log"
    # The server runs models with the packages of the interpreter that launches it.
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.chdir(tmp_path)
    with triton_server(checkpoint, repository=repository, log_file=log_file) as server:
        assert generate(server, text_input="hello", gen_length=8).finish_reason
        assert generate(server, model="dllm_unary", text_input="hello", gen_length=8).text
    assert MARK in log_file.read_text()


def test_incomplete_checkpoint_is_not_served(tmp_path: Path) -> None:
    """A checkpoint without one of its tensors fails to load, and the log names the tensor."""
    missing = "model.transformer.blocks.1.attn_out.weight"
    checkpoint = write_llada(tmp_path / "checkpoint")
    tensors = random_tensors(llada_shapes(llada_config()))
    del tensors[missing]
    write_tensors(checkpoint, tensors)
    log_file = tmp_path / "triton.log"
    with (
        pytest.raises(SettingError, match=f"missing {missing}"),
        triton_server(checkpoint, log_file=log_file),
    ):
        pass
    assert f"missing {missing}" in log_file.read_text()


@pytest.mark.slow
def test_paths_that_are_not_ascii_are_served(checkpoint: Path, tmp_path: Path) -> None:
    """Repository and checkpoint may lie in folders with any name, which the log shows."""
    repository, model = tmp_path / "josé" / "models", tmp_path / "modèle"
    shutil.copytree(REPOSITORY, repository, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(checkpoint, model)
    with triton_server(model, repository=repository) as server:
        assert generate(server, text_input="hello", gen_length=8).finish_reason


@pytest.mark.slow
def test_a_checkpoint_in_a_folder_that_is_not_ascii_needs_no_launcher(
    checkpoint: Path, tmp_path: Path
) -> None:
    """Given by config.pbtxt, as with a server of its own, the engine opens it by itself."""
    model, log_file = tmp_path / "modèle", tmp_path / "triton.log"
    shutil.copytree(checkpoint, model)
    repository = changed_repository(tmp_path)
    config = repository / "dllm/config.pbtxt"
    old = 'key: "MODEL_PATH"                  value { string_value: "'
    text = config.read_text()
    assert old in text
    config.write_text(text.replace(old, f"{old}{model}"))
    with triton_server(
        Path(), repository=repository, log_file=log_file, settings={"MODEL_PATH": ""}
    ) as server:
        assert generate(server, text_input="hello", gen_length=8).finish_reason
    # Triton escapes what is not ASCII.
    assert f"loading checkpoint path={tmp_path}/mod" in log_file.read_text()


@pytest.mark.parametrize(
    ("name", "value"), [("DLLM_CACHE", "daul"), ("DLLM_DEVICE", "gpu"), ("DLLM_MAX_NUM_SEQS", "0")]
)
@pytest.mark.slow
def test_a_bad_setting_of_the_engine_is_one_line(checkpoint: Path, name: str, value: str) -> None:
    """The start ends with the engine's words about the setting, not with the server's log."""
    with (
        pytest.raises(SettingError, match=f"^{name}: .*{value}") as caught,
        triton_server(checkpoint, settings={name: value}),
    ):
        pass
    assert not re.search(r"\n|\\n|\bAt:", str(caught.value))
