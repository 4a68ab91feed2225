"""Compares orders of the scheduler: `python -m benchmarks.scheduling`.

Everything is simulated (`benchmarks.simulator`), so it gives the same figures anywhere. It covers a
CPU with a measured cost of a step; a GPU with an assumed cost, at its token budget and at an eighth
of it; every cache but `sparse`, whose steps are those of `dual`; single arrivals and bursts;
several shares of capacity. Our scheduler is compared with

- the same order without holding Refreshes back;
- longest wait for a step first, instead of oldest first;
- first come, first served, where a request that does not fit waits without a limit;
- batches that run to completion.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from dllm_engine.loop.scheduler import Scheduler
from dllm_engine.request import Request

from benchmarks.common import RESULTS, write_json
from benchmarks.latency import STATIC_BATCH, arrivals
from benchmarks.simulator import Arrival, CostModel, FcfsScheduler, simulate, without_pages

NUM_SLOTS = 64
#: Cost and largest rows of a step. The CPU's are those of docs/performance.md.
GPU = CostModel(0.0042, 14e-6, free_rows=295)
DEVICES = {
    "CPU": (CostModel(0.0037, 20.8e-6), 2048),
    "GPU, assumed": (GPU, 16384),
    "GPU, small budget": (GPU, 2048),
}
POLICIES = ("none", "prefix", "dual", "delayed")
BURSTS = (1, 8, 64)
SHARES = (0.5, 0.8, 0.95)


class NothingHeld(Scheduler):
    """Our order without even steps: a Refresh waits only for room in the budget."""

    def _even_load(self, ready: list[Request]) -> float:
        del ready
        # Each step has the whole budget, whatever earlier steps overspent.
        return 2 * self._token_budget


class LongestWaitFirst(Scheduler):
    """Requests take turns, so that all are slow when the budget binds."""

    def _order(self, request: Request) -> tuple[bool, int]:
        return True, request.ready_since


SYSTEMS: dict[str, tuple[type[Scheduler], int | None]] = {
    "ours": (Scheduler, None),
    "no Refresh held": (NothingHeld, None),
    "longest wait first": (LongestWaitFirst, None),
    "first come, first served": (FcfsScheduler, None),
    "run to completion": (Scheduler, STATIC_BATCH),
}


def load_of(cache: str, rate: float, count: int, burst: int, seed: int) -> list[Arrival]:
    """Arrivals as in `benchmarks.latency`, with this cache."""
    load = arrivals(rate, count, burst=burst, seed=seed)
    return [dataclasses.replace(one, cache=cache) for one in load]


def capacity_of(cost: CostModel, cache: str, count: int) -> float:
    """Requests per second when all arrive at once, at the better of the budgets."""
    everything = load_of(cache, 1e9, count, 1, seed=1)
    budgets = [budget for same, budget in DEVICES.values() if same == cost]
    schedulers = [Scheduler(NUM_SLOTS, budget, without_pages()) for budget in budgets]
    return max(count / max(simulate(s, everything, cost).latencies) for s in schedulers)


def measure(device: str, cache: str, burst: int, share: float, count: int, seeds: int) -> Any:
    """Run the same loads on each system: medians over the seeds."""
    cost, budget = DEVICES[device]
    capacity = capacity_of(cost, cache, count)
    found: dict[str, list[list[float]]] = {name: [] for name in SYSTEMS}
    for seed in range(2, 2 + seeds):
        load = load_of(cache, share * capacity, count, burst, seed)
        for name, (kind, wave) in SYSTEMS.items():
            scheduler = kind(NUM_SLOTS, budget, without_pages())
            outcome = simulate(scheduler, load, cost, run_to_completion=wave)
            p50, p99 = np.percentile(outcome.latencies, (50, 99)).tolist()
            heavy = float(np.percentile(outcome.rows, 99))
            found[name].append([p50, p99, heavy, outcome.longest_idle])
    columns = ("p50", "p99", "p99_rows_of_a_step", "longest_idle")
    return {
        name: dict(zip(columns, np.median(values, axis=0).tolist(), strict=True))
        for name, values in found.items()
    }


def print_table(results: list[dict[str, Any]]) -> None:
    """Print a line per system: p50 / p99 in seconds; steps skipped; rows of a step."""
    for result in results:
        load = "single" if result["burst"] == 1 else f"bursts of {result['burst']}"
        print(f"{result['device']}, {result['cache']}, {load}, {result['share']:.0%}")
        for name, got in result["systems"].items():
            print(f"    {name:26} {got['p50']:7.2f} / {got['p99']:7.2f} s"
                  f"    left out of {got['longest_idle']:4.0f} steps"
                  f"    p99 of rows {got['p99_rows_of_a_step']:6.0f}")  # fmt: skip


def plot(results: list[dict[str, Any]], share: float) -> Path:
    """Plot each system's p99 over ours, by cache, for each device and kind of load."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        len(DEVICES), len(BURSTS), figsize=(15, 3.7 * len(DEVICES)), squeeze=False
    )
    others = list(SYSTEMS)[1:]
    for row, device in zip(axes, DEVICES, strict=True):
        for axis, burst in zip(row, BURSTS, strict=True):
            for i, name in enumerate(others):
                ratios = [
                    r["systems"][name]["p99"] / r["systems"]["ours"]["p99"]
                    for r in results
                    if (r["device"], r["burst"], r["share"]) == (device, burst, share)
                ]
                axis.bar(np.arange(len(POLICIES)) + 0.2 * i - 0.3, ratios, width=0.2, label=name)
            axis.axhline(1, color="black", linewidth=0.8)
            axis.set_xticks(range(len(POLICIES)), POLICIES)
            axis.set_ylabel("p99 over ours")
            load = "single arrivals" if burst == 1 else f"bursts of {burst}"
            axis.set_title(f"{device}: {load}, {share:.0%} of capacity", fontsize=10)
    axes[0][0].legend(fontsize=8)
    figure.tight_layout()
    path = RESULTS / "scheduling.png"
    figure.savefig(path, dpi=120)
    return path


def main() -> None:
    """Simulate, print, write JSON and plot."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=500, help="requests per run")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each load")
    options = parser.parse_args()
    results = []
    for device in DEVICES:
        for cache in POLICIES:
            for burst in BURSTS:
                for share in SHARES:
                    where: dict[str, Any] = {
                        "device": device,
                        "cache": cache,
                        "burst": burst,
                        "share": share,
                    }
                    systems = measure(**where, **vars(options))
                    results.append(where | {"systems": systems})
                    print_table(results[-1:])
    result = {"simulated": True, **vars(options), "loads": results}
    print(write_json("scheduling", result), plot(results, SHARES[1]))


if __name__ == "__main__":
    main()
