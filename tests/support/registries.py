"""Packages that single tests need, installed from their registries and kept for the next run."""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

INSTALL_SECONDS = 400
#: What pip and npm print if they cannot reach a registry.
UNREACHABLE = re.compile(
    r"name resolution|NewConnectionError|ConnectTimeout|ProxyError|Max retries exceeded"
    r"|ENOTFOUND|EAI_AGAIN|ECONNREFUSED|ETIMEDOUT|ENETUNREACH"
)


def node_packages(config: pytest.Config, wanted: Path) -> Path:
    """A folder with the packages of this `package.json`; skip if npm is not installed."""
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip("node and npm are not installed")
    folder = scratch(config, wanted)
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(wanted, folder)
    npm = ["npm", "install", "--no-audit", "--no-fund", "--fetch-retries=1", "--prefix", folder]
    install(folder, [npm])
    return folder


def scratch(config: pytest.Config, wanted: Path) -> Path:
    """The folder for these versions; it is kept for the next run."""
    assert config.cache is not None
    digest = hashlib.sha256(wanted.read_bytes()).hexdigest()[:12]
    return config.cache.mkdir("clients") / f"{wanted.stem}-{digest}"


def install(folder: Path, commands: Sequence[Sequence[str | Path]]) -> None:
    """Run the commands, unless they were run before; skip if no registry can be reached."""
    done = folder / "installed"
    if done.exists():
        return
    for command in commands:
        try:
            subprocess.run(
                command, check=True, capture_output=True, text=True, timeout=INSTALL_SECONDS
            )
        except subprocess.TimeoutExpired:
            pytest.skip(f"{command[0]} did not install its packages in {INSTALL_SECONDS} s")
        except subprocess.CalledProcessError as error:
            if UNREACHABLE.search(error.stderr):
                pytest.skip(f"the registry cannot be reached: {error.stderr[-300:]}")
            pytest.fail(error.stderr[-3000:])
    done.touch()
