"""Imports run one way, as docs/architecture.md draws them."""

from __future__ import annotations

import ast
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ADAPTER = ROOT / "adapter"
ENGINE = ROOT / "model_repository/dllm/1/dllm_engine"

#: Inside a package, each layer may import the layers after it, never one before it.
LAYERS = {
    ADAPTER: ["__main__", "check connection migrate", "app", "api", "auth jobs", "engine", "db",
              "periodic", "telemetry", "settings shutdown types", "rates setting_names shares",
              "errors"],
    ENGINE: ["describe llm", "loop", "execution", "state", "memory", "models sampling", "parallel",
             "decisions scores", "readings", "ops config request tokenizer",
             "messages sampling_params", "structured",
             "decoding watchdog errors"],
}  # fmt: skip

FORBIDDEN = {
    ENGINE: {"adapter", "launcher", "dllm_client", "fastapi", "tritonclient", "pb_utils",
             "triton_python_backend_utils"},
    ROOT / "model_repository/dllm_unary": {"torch", "dllm_engine", "adapter"},
    ADAPTER: {"torch", "transformers", "dllm_engine", "dllm_client", "launcher"},
    ROOT / "client/dllm_client": {"torch", "dllm_engine", "adapter", "launcher", "fastapi"},
    ROOT / "launcher": {"torch", "dllm_engine", "adapter"},
}  # fmt: skip


def imports(path: Path) -> set[str]:
    """Modules that a file imports, by their full names."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            found |= {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def packages(path: Path) -> set[str]:
    """The top-level packages that a file imports."""
    return {name.split(".")[0] for name in imports(path)}


@pytest.mark.parametrize("root", FORBIDDEN, ids=lambda root: root.name)
def test_packages_import_only_what_they_may(root: Path) -> None:
    """No package reaches into another that the architecture keeps it apart from."""
    files = list(root.rglob("*.py"))
    assert files
    for path in files:
        assert not packages(path) & FORBIDDEN[root], path


@pytest.mark.parametrize("root", LAYERS, ids=lambda root: root.name)
def test_imports_go_down(root: Path) -> None:
    """Every part of a package has a layer, and imports only from lower ones."""
    level = {name: i for i, names in enumerate(LAYERS[root]) for name in names.split()}
    parts = set()
    for path in root.rglob("*.py"):
        part = path.relative_to(root).parts[0].removesuffix(".py")
        parts.add(part)
        for target in imports(path):
            package, _, inner = target.partition(".")
            layer = inner.split(".")[0]
            if package == root.name and part not in ("__init__", layer):
                assert level[part] < level[layer], f"{path} imports {target}"
    assert parts - {"__init__"} == set(level)


@pytest.mark.parametrize("root", LAYERS, ids=lambda root: root.name)
def test_no_modules_form_a_circle(root: Path) -> None:
    """No chain of imports leads back to the module where it begins."""
    graph = {}
    for path in root.rglob("*.py"):
        parts = path.relative_to(root.parent).with_suffix("").parts
        name = ".".join(parts).removesuffix(".__init__")
        graph[name] = imports(path) - {name}
    TopologicalSorter(graph).prepare()


def test_the_engine_needs_nothing_of_the_servers() -> None:
    """The engine's own requirements are all that it imports from outside."""
    allowed = {"torch", "safetensors", "transformers", "numpy", "jinja2", "tqdm", "triton"}
    allowed |= {"torchao", "outlines_core"}  # where they are asked for
    for path in ENGINE.rglob("*.py"):
        outside = packages(path) - {ENGINE.name}
        assert outside - set(sys.stdlib_module_names) <= allowed, path
