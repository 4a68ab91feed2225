"""The GPU benchmark: its counts, and every section of it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from dllm_engine import LLM

from benchmarks import gpu
from benchmarks import gpu_arithmetic as arithmetic
from benchmarks.checkpoints import random_bf16
from benchmarks.common import RESULTS
from benchmarks.gpu_arithmetic import DREAM, LLADA, Ceilings, Cost, Sequences, Shape
from benchmarks.gpu_cases import Case
from benchmarks.gpu_compile import measure_compiled
from benchmarks.gpu_engine import Load, Point, further_points, important_points
from benchmarks.gpu_kernels import TINY, measure_case
from benchmarks.gpu_report import Record, plot, table
from benchmarks.gpu_timing import Timer
from benchmarks.throughput import POLICIES

#: Heads of width 2; two query heads for each KV head.
SMALL = Shape(
    "small",
    num_layers=2,
    hidden_size=8,
    num_heads=4,
    num_kv_heads=2,
    intermediate_size=6,
    vocab_size=10,
)
POINT = Point(requests=2, prompt_length=6, gen_length=4, block_length=2)


def test_bytes_and_operations_are_those_counted_by_hand() -> None:
    """Costs count each input and each output once, at two bytes per number."""
    # A sequence: 5 rows of 8 in, 8 out, a key and a value of 4; 5 × 5 products of 8, twice.
    assert arithmetic.attention(SMALL, [Sequences(3, 5)]) == Cost(3 * 2 * 5 * 24, 3 * 4 * 8 * 25)
    # 2 rows in and out, 7 stored keys and values read, 2 fresh ones read and written.
    reuse = Cost(2 * (2 * 16 + 7 * 8 + 2 * 2 * 8), 4 * 8 * 2 * 7)
    assert arithmetic.attention(SMALL, [Sequences(1, 2, 7)]) == reuse
    both = arithmetic.attention(SMALL, [Sequences(3, 5), Sequences(1, 2, 7)])
    assert both == Cost(720 + 240, 2400 + 448)
    # 3 queries of 8; 6 keys of 4; 4 keys and values moved; a float32 for each key and KV head.
    selection = arithmetic.selection(SMALL, count=2, candidates=6, block=3, keep=4)
    assert selection == Cost(2 * (2 * (24 + 24 + 4 * 16) + 2 * 4 * 12), 2 * 2 * 24 * 6)
    assert arithmetic.rms_norm(3, 8) == Cost(2 * (24 + 24 + 8), 4 * 24)
    # 3 rows of 6 heads, in and out; a float32 cosine and sine for each number of a head.
    # 3 rows of 8 gates and 8 numbers that they gate in, 8 out.
    assert arithmetic.silu_mul(3, 8) == Cost(2 * 72, 4 * 24)
    assert arithmetic.rotary(3, 6, 2) == Cost(2 * 72 + 4 * 12, 3 * 36)
    assert arithmetic.head(SMALL, 5) == Cost(2 * (10 + 5) * 8 + 5 * 36, 2 * 5 * 80)
    # A layer: 8 × 16 for queries, keys and values, 8 × 8 out, three of 8 × 6.
    assert arithmetic.linear(SMALL, 3) == Cost(2 * 2 * 336, 2 * 3 * 2 * 336)
    parts = arithmetic.step_parts(SMALL, [Sequences(3, 5)], masked=5)
    assert parts["attention"] == Cost(2 * 720, 2 * 2400)
    assert parts["linear"].flops == 2 * 15 * 672


def test_the_shapes_have_the_parameters_of_the_real_models() -> None:
    """Matrices, norms and biases add up to the checkpoints' parameters."""
    norms = (2 * LLADA.num_layers + 1) * LLADA.hidden_size
    ends = 2 * LLADA.vocab_size * LLADA.hidden_size
    layers = LLADA.num_layers * LLADA.layer_parameters
    assert layers + ends + norms == 8_015_581_184
    biases = DREAM.num_layers * (DREAM.num_heads + 2 * DREAM.num_kv_heads) * DREAM.head_dim
    norms = (2 * DREAM.num_layers + 1) * DREAM.hidden_size
    ends = 2 * DREAM.vocab_size * DREAM.hidden_size
    assert DREAM.num_layers * DREAM.layer_parameters + ends + norms + biases == 7_615_616_512


def test_the_roofline_is_the_slower_of_memory_and_arithmetic() -> None:
    """The roofline is the longer of memory time and arithmetic time."""
    ceilings = Ceilings(bandwidth=100.0, rate=1000.0)
    assert (ceilings.seconds(Cost(50, 100)), ceilings.limit(Cost(50, 100))) == (0.5, "memory")
    assert (ceilings.seconds(Cost(10, 1000)), ceilings.limit(Cost(10, 1000))) == (1.0, "compute")
    # Two bytes and 2 × rows operations a parameter.
    assert arithmetic.turning_rows(SMALL, ceilings) == 11


def test_points_are_different_and_cover_every_policy() -> None:
    """No load is measured twice, and every policy is measured."""
    points = important_points() + further_points()
    assert len(points) == len(set(points))
    for policy in POLICIES:
        assert {p.requests for p in points if p.policy == policy} == {1, 8, 32, 64, 128}


def test_what_a_load_commits_is_counted(tmp_path: Path) -> None:
    """A load counts the canvas of finished requests and the committed tokens of aborted ones, and
    leaves no request."""
    checkpoint = random_bf16(tmp_path, "llada", n_layers=1)
    engine = LLM(checkpoint, kernels="torch", max_num_seqs=4, max_num_batched_tokens=64).engine
    load = Load(engine, POINT)
    for outcome in (load.closed(3, 60.0), load.open([0.0, 0.01, 0.02], 60.0)):
        assert (outcome.tokens, len(outcome.latencies), outcome.cut) == (12, 3, False)
        assert 0 < min(outcome.latencies) <= outcome.seconds
    cut = load.closed(2, 0.0)
    assert (cut.tokens, cut.latencies, cut.cut) == (0, [], True)
    assert not engine.has_work


def test_a_case_that_fails_is_recorded() -> None:
    """A failing case is recorded, and the others are still measured."""

    def fail() -> None:
        raise RuntimeError("no such kernel")

    works = {"theirs": list}
    case = Case("head", "m", "c", Cost(1, 1), fail, list, agreement=lambda: 1.0, libraries=works)
    row = measure_case(case, Timer("cpu"), Ceilings(1.0, 1.0))
    assert row["error"] == "RuntimeError: no such kernel"
    assert set(row["library_seconds"]) == {"theirs"}


@pytest.mark.slow
def test_compiled_parts_stand_beside_torch_s() -> None:
    """Compiled parts are measured with a compiler that changes nothing and reported for one that is
    missing."""
    for backend, ways in (("eager", {"torch", "compiled"}), ("none such", {"torch"})):
        saved: list[list[dict[str, Any]]] = []

        def done(found: list[dict[str, Any]], saved: list[Any] = saved) -> bool:
            saved.append(found)
            return True

        measure_compiled("cpu", [(3, 16)], done, backend=backend)
        rows = saved[-1]
        assert [row["part"] for row in rows] == ["norm", "silu · up", "rotary", "MLP"]
        for row in rows:
            assert set(row["seconds"]) == ways
            assert set(row["seconds"]) | set(row["errors"]) == {"torch", "compiled"}
            assert min(row["seconds"].values()) > 0


@pytest.mark.slow
def test_every_section_runs_at_toy_sizes(tmp_path: Path) -> None:
    """Every section except checkouts runs at toy sizes and writes nothing to the published
    results."""
    before = {path.name: path.stat().st_mtime_ns for path in RESULTS.iterdir()}
    sections = ["ceilings", "kernels", "engine", "torch", "dream", "baselines"]
    folders = ["--results", str(tmp_path), "--checkpoints", str(tmp_path / "checkpoints")]
    for section in sections:
        gpu.main(["--tiny", "--minutes", "60", *folders, "--only", section])
    assert {path.name: path.stat().st_mtime_ns for path in RESULTS.iterdir()} == before
    result = Record(tmp_path, tiny=True).read()
    assert result["measured"] is False
    assert list(result["sections"]) == sections
    _check_kernels(result["sections"])
    for section, count in {"engine": 2, "torch": len(POLICIES) + 1, "dream": 1}.items():
        found = result["sections"][section]
        assert found["memory_plan"]["num_pages"] > 0
        assert len(found["rows"]) == count
        for row in found["rows"]:
            assert not row["cut"]
            assert 0 < row["p50_seconds"] <= row["p99_seconds"]
            assert row["tokens_per_second"] > 0
    assert [row["tokens_per_second"] > 0 for row in result["sections"]["baselines"]] == 4 * [True]
    lines = table(result)
    assert "times mean nothing" in lines[0]
    assert len([line for line in lines if line.startswith("attention")]) == 4
    assert plot(result, tmp_path).exists()


def _check_kernels(sections: dict[str, Any]) -> None:
    rows, ceilings = sections["kernels"], Ceilings(**sections["ceilings"])
    costs = {("RMSNorm", "5 rows"): arithmetic.rms_norm(5, TINY.shapes[0].hidden_size)}
    costs["attention", "1 × 40 rows"] = arithmetic.attention(TINY.shapes[0], [Sequences(1, 40)])
    kinds = {row["kernel"] for row in rows}
    assert kinds == {"attention", "selection", "RMSNorm", "rotary", "gate", "head"}
    assert {row["model"] for row in rows} == {shape.name for shape in TINY.shapes}
    for row in rows:
        # Which positions are kept is decided by scores that torch rounds to bfloat16.
        assert row["agreement"] >= (0.8 if row["kernel"] == "selection" else 1.0), row
        assert row["torch_seconds"] > 0
        cost = Cost(row["bytes"], row["flops"])
        assert row["roofline_seconds"] == ceilings.seconds(cost)
        assert row["share_of_roofline"] == row["roofline_seconds"] / row["seconds"]
        if row["model"] == TINY.shapes[0].name:
            assert costs.get((row["kernel"], row["case"]), cost) == cost


@pytest.mark.slow
def test_the_command_needs_nothing_installed(tmp_path: Path) -> None:
    """Run from the repository root, the command and its sections find the engine; a failing section
    is named and the others run."""
    program = (
        "import sys; from benchmarks import gpu; gpu.main(sys.argv[1:])\n"
        "import dllm_engine; print(dllm_engine.__file__)"
    )
    (tmp_path / "no folder").touch()
    options = ["--tiny", "--only", "engine", "ceilings", "--results", str(tmp_path)]
    options += ["--checkpoints", str(tmp_path / "no folder")]
    root = RESULTS.parents[1]
    ran = subprocess.run(
        [sys.executable, "-c", program, *options],
        cwd=root,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        capture_output=True,
        text=True,
        check=True,
    )
    lines = ran.stdout.splitlines()
    assert Path(lines[-1]).is_relative_to(root / "model_repository")
    result = json.loads((tmp_path / "gpu.json").read_text())
    assert list(result["sections"]) == ["ceilings"]
    assert result["failed"] == {"engine": "ended with status 1"}
    assert "engine failed: ended with status 1" in lines
    assert "NotADirectoryError" in ran.stderr or "FileExistsError" in ran.stderr


def test_a_run_that_finds_nothing_is_no_measurement(tmp_path: Path) -> None:
    """A file without results says so with the reason, until a section has results."""
    record = Record(tmp_path, tiny=False)
    record.begin()
    assert record.read()["measured"] is False
    record.fail("kernels", "ended with status 1")
    record.fail("engine", "took more than 30 s")
    why = ["kernels failed: ended with status 1", "engine failed: took more than 30 s"]
    result = record.read()
    assert (result["measured"], result["why"]) == (False, "; ".join(why))
    assert table(result) == why
    record.write("kernels", [])
    result = record.read()
    assert result["measured"] is True
    assert "why" not in result
    assert table(result) == why[1:]
    assert Record(tmp_path, tiny=True).read()["sections"] == {}


def test_the_published_file_claims_no_measurement_that_is_not_in_it() -> None:
    """The published file has sections, or says that nothing was measured."""
    published = json.loads((RESULTS / "gpu.json").read_text())
    assert published["measured"] == bool(published.get("sections"))
    assert published["measured"] or published["why"]


def test_a_section_of_a_checkout_needs_one(capsys: pytest.CaptureFixture[str]) -> None:
    """A section of a checkout without a checkout says how to name one."""
    with pytest.raises(SystemExit):
        gpu.parse(["--only", "fast-dllm"])
    assert "name it with --fast-dllm DIR" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_file_says_why_nothing_was_measured(tmp_path: Path) -> None:
    """Without a GPU the file says why there are no results, and keeps existing ones."""
    gpu.main(["--results", str(tmp_path)])
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert (found["measured"], found["why"]) == (
        False,
        "no CUDA device is visible to torch on this machine",
    )
    measured = json.dumps(found | {"measured": True})
    (tmp_path / "gpu.json").write_text(measured)
    gpu.main(["--results", str(tmp_path)])
    assert (tmp_path / "gpu.json").read_text() == measured


def test_sections_can_be_left_out() -> None:
    """`--without` runs the other sections, in their order."""
    everything = gpu.wanted(gpu.parse([]))
    assert gpu.wanted(gpu.parse(["--without", *everything[:2]])) == everything[2:]
