"""Imports run one way, as docs/architecture.md draws them."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ENGINE = ROOT / "model_repository/dllm/1/dllm_engine"

#: Inside the engine, each layer may import the layers after it, never one before it.
LAYERS = [
    {"llm"},
    {"loop"},
    {"execution"},
    {"state"},
    {"memory"},
    {"models", "sampling"},
    {"parallel"},
    {"ops", "tokenizer"},
    {"config", "request"},
    {"sampling_params"},
    {"decoding", "watchdog"},
    {"errors"},
]

FORBIDDEN = {
    ENGINE: {"adapter", "launcher", "dllm_client", "fastapi", "tritonclient", "pb_utils",
             "triton_python_backend_utils"},
    ROOT / "model_repository/dllm_unary": {"torch", "dllm_engine", "adapter"},
    ROOT / "adapter": {"torch", "transformers", "dllm_engine", "dllm_client", "launcher"},
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
            found.add(node.module or "")
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


def test_the_engine_imports_downwards_only() -> None:
    """Every import inside the engine goes to the same layer or a lower one."""
    level = {name: i for i, names in enumerate(LAYERS) for name in names}
    for path in ENGINE.rglob("*.py"):
        place = path.relative_to(ENGINE).parts[0].removesuffix(".py")
        if place == "__init__":
            continue
        for target in imports(path):
            package, _, inner = target.partition(".")
            layer = inner.split(".")[0]
            if package == ENGINE.name and layer != place:
                assert level[place] < level[layer], f"{path} imports {target}"


def test_every_engine_module_has_its_layer() -> None:
    """A new module must be given a place in the picture."""
    modules = {p.name.removesuffix(".py") for p in ENGINE.iterdir() if not p.name.startswith("_")}
    known = {name for names in LAYERS for name in names}
    assert modules - {"py.typed"} == known


def test_the_engine_needs_nothing_of_the_servers() -> None:
    """The engine's own requirements are all that it imports from outside."""
    allowed = {"torch", "safetensors", "transformers", "numpy", "jinja2", "tqdm", "triton"}
    allowed |= {"torchao"}  # where it is asked for
    for path in ENGINE.rglob("*.py"):
        outside = packages(path) - {ENGINE.name}
        assert outside - set(sys.stdlib_module_names) <= allowed, path
