"""Find a tritonserver: the one of NVIDIA's container, or the one in the nvidia-pytriton wheel."""

import os
import shutil
import sys
import sysconfig
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

from launcher.errors import ServerMissingError

WHEEL = "nvidia-pytriton"
BACKEND_FILES = ("libtriton_python.so", "triton_python_backend_utils.py")
STUB = "triton_python_backend_stub"


@dataclass(frozen=True)
class Installation:
    """A server binary, with what it needs to find its Python backend."""

    binary: Path
    backend_files: tuple[Path, ...] = ()
    library_path: tuple[Path, ...] = field(default=())

    def make_backend_directory(self, scratch: Path) -> Path | None:
        """Lay out `backends/python/` under `scratch`; None when the server has its own."""
        if not self.backend_files:
            return None
        backends = scratch / "backends"
        target = backends / "python"
        target.mkdir(parents=True)
        for source in self.backend_files:
            _link_or_copy(source, target / source.name)
        return backends

    def environment(self, base: Mapping[str, str], scratch: Path) -> dict[str, str]:
        """`base`, changed so that the server's stub runs this interpreter's packages.

        `scratch` is for links to what has no ASCII path.
        """
        env = dict(base)
        # The stub takes its site-packages from the first `python3` in PATH.
        executable = Path(sys.executable)
        if not str(executable).isascii():
            executable = ascii_path(Path(sys.prefix), scratch / "python") / "bin" / executable.name
        _prepend(env, "PATH", (executable.parent,))
        _prepend(env, "LD_LIBRARY_PATH", self.library_path)
        return env


def find_installation() -> Installation:
    """The tritonserver in PATH if there is one, else the wheel's.

    Raises ServerMissingError when neither is there, or when the wheel does not support this Python.
    """
    in_path = shutil.which("tritonserver")
    if in_path is not None:
        return Installation(Path(in_path))
    try:
        # Importing pytriton takes a second and patches things; its files are all we need.
        located = metadata.distribution(WHEEL).locate_file("pytriton")
    except metadata.PackageNotFoundError:
        message = (
            "no tritonserver in PATH, and the wheel that brings one is not installed: "
            "pip install 'dllm-serve[server]'"
        )
        raise ServerMissingError(message) from None
    return _from_wheel(Path(str(located)))


def make_scratch() -> Path:
    """A new temporary folder whose path is ASCII."""
    folder = tempfile.gettempdir()
    return Path(tempfile.mkdtemp(prefix="dllm-triton-", dir=folder if folder.isascii() else "/tmp"))


def ascii_path(path: Path, link: Path) -> Path:
    """The path itself if it is ASCII, else `link`, which then leads there.

    The interpreter inside Triton's stub decodes paths as ASCII whatever the locale is.
    """
    if str(path).isascii():
        return path
    link.symlink_to(path.absolute(), target_is_directory=True)
    return link


def _from_wheel(package: Path) -> Installation:
    root = package / "tritonserver"
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    stubs = root / "python_backend_stubs"
    stub = stubs / version / STUB
    if not stub.is_file():
        known = ", ".join(sorted(path.parent.name for path in stubs.glob(f"*/{STUB}")))
        raise ServerMissingError(
            f"{WHEEL} has no stub for Python {version}, only for: {known or '-'}"
        )
    files = tuple(root / "backends" / "python" / name for name in BACKEND_FILES)
    libraries = [package.parent / "nvidia_pytriton.libs"]
    # The stub links libpython3.X.so, which sits outside the loader's path in most builds.
    libdir = sysconfig.get_config_var("LIBDIR")
    if libdir:
        libraries.append(Path(libdir))
    return Installation(root / "bin" / "tritonserver", (*files, stub), tuple(libraries))


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        target.symlink_to(source)
    except OSError:  # a file system without links
        shutil.copy2(source, target)


def _prepend(env: dict[str, str], name: str, paths: tuple[Path, ...]) -> None:
    parts = [str(path) for path in paths]
    if env.get(name):
        parts.append(env[name])
    if parts:
        env[name] = os.pathsep.join(parts)
