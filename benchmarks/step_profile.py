"""Profiles a step: `python -m benchmarks.step_profile`.

Profiles 32 requests on the 59M-parameter model with `dual`, operation by operation. Time outside
tensor operations is the engine's own: scheduling, layout, bookkeeping. Layout is also timed alone,
in both forms: packed, as on a CPU, and flat, as kernels need it.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import torch
from dllm_engine import LLM, Engine, Prompt, SamplingParams
from dllm_engine.execution.runner import ModelRunner
from dllm_engine.ops.transfer import Upload
from dllm_engine.state.batch import build_batch
from torch.profiler import ProfilerActivity, profile

from benchmarks.checkpoints import llada_60m
from benchmarks.common import write_json

#: Operations by the beginning of their names.
KINDS = {
    "linear": ("mkldnn::", "aten::mm", "aten::addmm", "aten::linear"),
    "attention": ("aten::_scaled_dot_product", "aten::scaled_dot"),
    "moving rows": ("aten::index", "aten::copy_", "aten::cat", "aten::gather", "aten::_index"),
}


def kind_of(name: str) -> str:
    """The kind of an operation."""
    found = [kind for kind, starts in KINDS.items() if name.startswith(starts)]
    return found[0] if found else "other operations"


def layout_seconds(engine: Engine, block_m: int | None, repeats: int = 300) -> float:
    """Median time of laying out the next step of all that runs, on the host."""
    runner = engine.runner
    assert isinstance(runner, ModelRunner)
    pages = runner.rank.pages
    page_size = pages.page_size if block_m is None else None
    slots = [r.slot for r in engine.scheduler.running if r.slot is not None]
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        plan = runner.table.plan_step(slots, page_size=page_size)
        build_batch(plan, pages, Upload("cpu"), block_m)
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def main() -> None:
    """Measure, print, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--cache", default="dual")
    parser.add_argument("--threads", type=int, help="default: all cores")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        engine = LLM(llada_60m(Path(folder))).engine
    params = SamplingParams(gen_length=128, block_length=32, ignore_eos=True, cache=options.cache)
    generator = torch.Generator().manual_seed(1)
    for _ in range(options.requests):
        ids = torch.randint(0, 32000, (128,), generator=generator).tolist()
        engine.add(engine.make_request(Prompt(ids), params))
    for _ in range(12):  # skip the first block's Refreshes
        engine.step()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        began = time.perf_counter()
        for _ in range(options.steps):
            engine.step()
        wall = time.perf_counter() - began
    seconds: defaultdict[str, float] = defaultdict(float)
    for event in profiler.key_averages():
        seconds[kind_of(event.key)] += event.self_cpu_time_total / 1e6
    seconds["outside operations"] = wall - sum(seconds.values())
    most = sorted(seconds.items(), key=lambda item: -item[1])
    shares = {kind: value / wall for kind, value in most}
    print(f"{wall / options.steps * 1e3:.0f} ms per step")
    for kind, share in shares.items():
        print(f"{kind:<20}{share:6.1%}")
    layouts = {"grouped": layout_seconds(engine, None), "flat": layout_seconds(engine, 32)}
    for form, each in layouts.items():
        print(f"laying out, {form:<9}{each * 1e3:5.2f} ms")
    result = {
        "requests": options.requests,
        "cache": options.cache,
        "threads": torch.get_num_threads(),
        "seconds_per_step": wall / options.steps,
        "shares": shares,
        "layout_seconds": layouts,
    }
    print(write_json("step_profile", result))


if __name__ == "__main__":
    main()
