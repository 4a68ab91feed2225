"""Checks the documentation against code, settings and results."""

import importlib.util
import json
import re
import tomllib
from pathlib import Path

import pytest
from dllm_engine import EngineConfig

from adapter.settings import Settings as AdapterSettings
from benchmarks import blockwise, parallel, precision, quality, throughput
from launcher.settings import Settings as LauncherSettings
from tests.unit.test_layering import LAYERS

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "benchmarks/README.md",
    *(ROOT / "docs").rglob("*.md"),
    *(ROOT / "model_repository").rglob("README.md"),
]


def test_every_setting_is_documented_with_its_default() -> None:
    """docs/settings.md has a row for each setting of launcher, adapter and engine."""
    rows = dict(
        re.findall(r"^\| `(\w+)` \|.*\| (.+) \|$", (ROOT / "docs/settings.md").read_text(), re.M)
    )
    for settings in (LauncherSettings, AdapterSettings):
        for name, field in settings.model_fields.items():
            shown = rows[f"DLLM_{name.upper()}"]
            if isinstance(field.default, float):
                assert float(shown) == field.default, name
            elif isinstance(field.default, int) and not isinstance(field.default, bool):
                documented_elsewhere = name == "max_gen_length"
                assert documented_elsewhere or int(shown) == field.default, name
    assert {*EngineConfig.settings(), "DLLM_EXIT_ON_ENGINE_DEATH"} <= set(rows)


def test_the_triton_model_has_every_setting_as_a_parameter() -> None:
    """config.pbtxt lists exactly the settings of the engine and of its process."""
    config = (ROOT / "model_repository/dllm/config.pbtxt").read_text()
    settings = [*EngineConfig.settings(), "DLLM_EXIT_ON_ENGINE_DEATH"]
    assert re.findall(r'key: "(\w+)"', config) == settings


def test_links_between_pages_lead_somewhere() -> None:
    """Every relative link on every page leads to an existing file."""
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_commands_on_the_pages_can_be_run() -> None:
    """Every module and make target that a page names exists."""
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.M))
    for page in PAGES:
        text = page.read_text()
        # Only in code: "make" is also a word.
        for target in re.findall(r"(?:^|`)make ([a-z0-9-]+)", text, re.M):
            assert target in targets, f"{page.name}: make {target}"
        for module in re.findall(r"python3? -m ((?:benchmarks|demo|launcher|adapter)[\w.]*)", text):
            assert importlib.util.find_spec(module), f"{page.name}: {module}"


def test_the_block_wise_figures_on_the_page_are_those_of_the_results() -> None:
    """Its tables are the ones that benchmarks/blockwise.py makes from its results."""
    page = (ROOT / "docs/performance.md").read_text()
    result = json.loads((ROOT / "benchmarks/results/blockwise.json").read_text())
    for block in blockwise.table(result).split("\n\n"):
        assert block in page


def test_the_latencies_on_the_page_are_those_of_the_results() -> None:
    """docs/performance.md has a row for each system and load of latency.json, with its figures."""
    page = (ROOT / "docs/performance.md").read_text()
    result = json.loads((ROOT / "benchmarks/results/latency.json").read_text())
    for load in result["loads"]:
        for system, figures in load["systems"].items():
            real = [f"{figures['real'][q]:.2f} s" for q in ("p50", "p95", "p99")]
            row = [load["name"], system, *real, f"{figures['simulated']['p99']:.2f} s"]
            assert f"| {' | '.join(row)} |" in page


def test_the_performance_page_shows_throughput_as_measured() -> None:
    """Its tables are the ones that benchmarks/throughput.py makes from its results."""
    page = (ROOT / "docs/performance.md").read_text()
    result = json.loads((ROOT / "benchmarks/results/throughput.json").read_text())
    for model in result["models"]:
        assert f"\n\n{throughput.table(model)}\n\n" in page


def test_the_performance_page_shows_parallel_decoding_as_measured() -> None:
    """Its table is the one that benchmarks/parallel.py makes from its results."""
    result = json.loads((ROOT / "benchmarks/results/parallel.json").read_text())
    table = parallel.table(result["answers_per_second"])
    assert f"\n\n{table}\n\n" in (ROOT / "docs/performance.md").read_text()


def test_the_performance_page_shows_where_a_step_goes_as_measured() -> None:
    """Every share in step_profile.json has its row."""
    page = (ROOT / "docs/performance.md").read_text()
    shares = json.loads((ROOT / "benchmarks/results/step_profile.json").read_text())["shares"]
    shown = re.findall(r"^\| .+ \| (\d+\.\d%) \|$", page.partition("## Throughput")[0], re.M)
    assert shown == [f"{share:.1%}" for share in shares.values()]


def test_the_first_release_of_the_changelog_is_the_packages() -> None:
    """CHANGELOG.md begins with the version in pyproject.toml, or with Unreleased."""
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    heading = re.search(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert heading is not None
    assert heading[1] in (version, "Unreleased")


@pytest.mark.parametrize("root", LAYERS, ids=lambda root: root.name)
def test_the_architecture_page_draws_the_layers(root: Path) -> None:
    """docs/architecture.md has the layers that tests/unit/test_layering.py checks."""
    page = (ROOT / "docs/architecture.md").read_text()
    chains = re.findall(r"^`\w+`(?:, `\w+`)* →[^\n]*(?:\n.+)*", page, re.M)
    layers = [[" ".join(re.findall(r"`(\w+)`", part)) for part in c.split("→")] for c in chains]
    assert LAYERS[root] in layers


def test_every_decision_is_listed() -> None:
    """docs/decisions/README.md links every decision."""
    index = (ROOT / "docs/decisions/README.md").read_text()
    for page in (ROOT / "docs/decisions").glob("0*.md"):
        assert f"({page.name})" in index


@pytest.mark.parametrize(
    ("folder", "architecture"),
    [
        ("demo_checkpoint", "LLaDAModelLM"),
        ("demo_checkpoint_dream", "DreamModel"),
        ("demo_checkpoint_sdar", "SDARForCausalLM"),
    ],
)
def test_a_demo_checkpoint_is_small_and_whole(folder: str, architecture: str) -> None:
    """It has at most 8 MB, the layout that the engine reads, and its card."""
    directory = ROOT / "model_repository/dllm/1" / folder
    size = sum(file.stat().st_size for file in directory.iterdir())
    assert size <= 8 * 10**6
    config = json.loads((directory / "config.json").read_text())
    assert config["architectures"] == [architecture]
    assert (directory / "README.md").exists()


@pytest.mark.parametrize("model", quality.MODELS)
def test_the_quality_page_shows_what_was_measured(model: str) -> None:
    """Its tables are the ones that benchmarks/quality.py makes from its results."""
    table = quality.table(quality.stored(quality.MODELS[model].name))
    assert f"\n\n{table}\n\n" in (ROOT / "docs/quality.md").read_text()


def test_the_quality_page_shows_the_precisions_that_were_measured() -> None:
    """Its tables are the ones that benchmarks/precision.py makes from its results."""
    page = (ROOT / "docs/quality.md").read_text()
    precisions, parts = precision.stored()
    for table in (precision.precision_table(precisions), precision.part_table(parts)):
        assert f"\n\n{table}\n\n" in page
