"""Measures real sizes of checkpoints on a CPU: `python -m benchmarks.cpu_checkpoints`.

For each size and number type: seconds to load a checkpoint with random bfloat16 weights, seconds of
a step of 64 rows, and the peak of resident memory. Each runs in a process of its own. Baseline:
float32, whose packed products are torch's fastest without quantisation. Weights of 8B take 16 GB of
disk, and are written once. Times are CPU time of one thread (`--threads`): other work on the
machine hardly changes it, and where nothing else runs it is what a clock shows.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from dllm_engine import LLM, SamplingParams

from benchmarks.checkpoints import LLADA_8B, random_bf16
from benchmarks.common import RESULTS, write_json

SIZES: dict[str, dict[str, Any]] = {
    "60M": {
        **{"d_model": 512, "n_heads": 8, "n_kv_heads": 8, "n_layers": 8},
        **{"mlp_hidden_size": 1376, "vocab_size": 32768, "embedding_size": 32768},
    },
    "1B": {
        **{"d_model": 2048, "n_heads": 16, "n_kv_heads": 16, "n_layers": 16},
        **{"mlp_hidden_size": 5632, "vocab_size": 126464, "embedding_size": 126464},
    },
    "8B": LLADA_8B,
}
#: Settings by label.
PRECISIONS: dict[str, dict[str, str]] = {
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "int8": {"dtype": "float32", "quantization": "int8"},
    "w8a8": {"dtype": "float32", "quantization": "w8a8"},
}
#: float32 and bfloat16 of 8B take more memory than most of these machines have.
DEFAULT = ["60M", "1B"]
PROMPT_LENGTH, GEN_LENGTH = 32, 32


def measure(checkpoint: Path, precision: str, steps: int, threads: int) -> dict[str, float]:
    """Load a checkpoint and run some steps of one request, without a cache."""
    torch.set_num_threads(threads)
    began = time.process_time()
    llm = LLM(checkpoint, device="cpu", max_num_seqs=1, max_model_len=256, **PRECISIONS[precision])
    load = (time.process_time() - began) / threads
    params = SamplingParams(gen_length=GEN_LENGTH, cache="none", ignore_eos=True)
    times: list[float] = []
    last = None
    # The engine runs on a thread of this process.
    for _ in llm.stream(list(range(PROMPT_LENGTH)), params):
        now = time.process_time()
        if last is not None:
            times.append((now - last) / threads)
        last = now
        if len(times) == steps:
            break
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"load": load, "step": statistics.median(times), "peak_bytes": peak}


def table(results: list[dict[str, Any]]) -> str:
    """A Markdown table; steps beside those of float32 of the same size, where it was measured."""
    base = {one["size"]: one["step"] for one in results if one["precision"] == "float32"}
    lines = ["| size | numbers | load | step of 64 rows | × float32 | peak memory |",
             "|---|---|--:|--:|--:|--:|"]  # fmt: skip
    for one in results:
        reference = base.get(one["size"])
        ratio = f"{reference / one['step']:.2f}" if reference else "—"
        lines.append(
            f"| {one['size']} | {one['precision']} | {one['load']:.1f} s | {one['step']:.3f} s "
            f"| {ratio} | {one['peak_bytes'] / 2**30:.1f} GiB |"
        )
    return "\n".join(lines)


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """Draw the seconds of a step by size and number type."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 3))
    labels = [f"{one['size']} {one['precision']}" for one in results]
    axes.barh(labels, [one["step"] for one in results])
    axes.set(xscale="log", xlabel="seconds of a step of 64 rows")
    axes.invert_yaxis()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Run each measurement in a process of its own; print a table, write JSON and a plot."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=DEFAULT)
    parser.add_argument("--only", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--checkpoints", type=Path, help="folder to keep the weights in")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        checkpoint, precision = options.measure
        found = measure(Path(checkpoint), precision, options.steps, options.threads)
        sys.stdout.write(json.dumps(found) + "\n")
        return
    results = []
    with tempfile.TemporaryDirectory() as temporary:
        for size in options.sizes:
            folder = (options.checkpoints or Path(temporary)) / size
            random_bf16(folder, "llada", **SIZES[size])
            for precision in options.only:
                command = [sys.executable, "-m", "benchmarks.cpu_checkpoints"]
                command += ["--measure", str(folder), precision, "--steps", str(options.steps)]
                command += ["--threads", str(options.threads)]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                found = json.loads(done.stdout.splitlines()[-1])
                results.append({"size": size, "precision": precision, **found})
                print(table(results[-1:]).splitlines()[-1], flush=True)
    print(table(results))
    path = write_json(
        "cpu_checkpoints", {"threads": options.threads, "results": results}, options.out
    )
    plot(results, path.with_suffix(".png"))
    print(f"written {path}")


if __name__ == "__main__":
    main()
