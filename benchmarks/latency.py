"""Latency under load: `python -m benchmarks.latency`.

Requests of mixed lengths arrive as a Poisson process and in bursts, at a share of what the engine
can take. The engine (phase-multiplexed, requests join at every step) is compared with the same
engine under first come, first served, with batches that run to completion, and with static batches:
these run to completion too, and all of a batch have its longest canvas, as one call of a reference
`generate` would give them. All run in real time, one after another, on the same arrivals; the
simulator runs them too.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from pathlib import Path
from typing import Any

import numpy as np
from dllm_engine import LLM, Engine, Prompt
from dllm_engine.scheduler import Scheduler

from benchmarks.common import DEMO_CHECKPOINT, RESULTS, write_json
from benchmarks.simulator import (
    Arrival,
    CostModel,
    FcfsScheduler,
    Outcome,
    simulate,
    without_pages,
)

STATIC_BATCH = 16
BURST = 8
PROMPT_LENGTHS = (16, 48, 96, 160)
GEN_LENGTHS = (32, 64, 128, 256)
#: Shares of the canvas lengths: most answers are short.
GEN_SHARES = (0.4, 0.3, 0.2, 0.1)
SYSTEMS = ("phase-multiplexed", "first come, first served", "run to completion", "static batches")


def arrivals(rate: float, count: int, *, burst: int, seed: int) -> list[Arrival]:
    """`count` requests at `rate` per second, in groups of `burst` that come together."""
    rng = np.random.default_rng(seed)
    gaps = rng.exponential(burst / rate, size=-(-count // burst))
    times = np.repeat(gaps.cumsum() - gaps[0], burst)[:count]
    prompts = rng.choice(PROMPT_LENGTHS, count)
    lengths = rng.choice(GEN_LENGTHS, count, p=GEN_SHARES)
    return [
        Arrival(float(t), int(p), int(n)) for t, p, n in zip(times, prompts, lengths, strict=True)
    ]


class Driver:
    """Runs arrivals on a real engine in real time."""

    def __init__(self, llm: LLM) -> None:
        self.engine: Engine = llm.engine
        #: (rows, seconds) of every step.
        self.steps: list[tuple[int, float]] = []
        config = self.engine.config
        self._schedulers = {
            name: _kind(name)(config.max_num_seqs, self.engine.token_budget, self.engine.allocator)
            for name in SYSTEMS
        }

    def run(self, system: str, load: list[Arrival]) -> list[float]:
        """Latencies in seconds, in the order of the arrivals."""
        engine = self.engine
        engine.scheduler = self._schedulers[system]
        wave = _wave(system)
        place: dict[int, int] = {}
        latencies = [0.0] * len(load)
        began = time.perf_counter()
        added = 0
        while added < len(load) or engine.has_work:
            now = time.perf_counter() - began
            if wave is None or not engine.has_work:
                batch = [a for a in load[added:][:wave] if a.seconds <= now]
                longest = max((a.gen_length for a in batch), default=0)
                for arrival in batch:
                    length = longest if system == SYSTEMS[3] else arrival.gen_length
                    params = dataclasses.replace(arrival, gen_length=length).params()
                    request = engine.make_request(Prompt([1] * arrival.prompt_length), params)
                    engine.add(request)
                    place[request.request_id] = added
                    added += 1
            if not engine.has_work:
                time.sleep(max(0.0, load[added].seconds - now))
                continue
            rows, start = engine.stats.batched_tokens, time.perf_counter()
            updates = engine.step()
            end = time.perf_counter()
            self.steps.append((engine.stats.batched_tokens - rows, end - start))
            for update in updates:
                i = place[update.request_id]
                latencies[i] = end - began - load[i].seconds
        return latencies


def _kind(system: str) -> type[Scheduler]:
    return FcfsScheduler if system == SYSTEMS[1] else Scheduler


def _wave(system: str) -> int | None:
    """How many requests run to completion together; None: they join at every step."""
    return STATIC_BATCH if system in SYSTEMS[2:] else None


def simulated(system: str, load: list[Arrival], cost: CostModel, driver: Driver) -> Outcome:
    """The same in the simulator."""
    config = driver.engine.config
    scheduler = _kind(system)(config.max_num_seqs, driver.engine.token_budget, without_pages())
    padded = system == SYSTEMS[3]
    return simulate(scheduler, load, cost, run_to_completion=_wave(system), padded=padded)


def percentiles(latencies: list[float]) -> dict[str, float]:
    """p50, p95, p99 in seconds."""
    return {f"p{q}": float(np.percentile(latencies, q)) for q in (50, 95, 99)}


def plot(result: dict[str, Any]) -> Path:
    """p50 and p99 of each system and load, real beside simulated."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    loads = result["loads"]
    figure, axes = plt.subplots(1, len(loads), figsize=(6.5 * len(loads), 4.5), squeeze=False)
    for axis, load in zip(axes[0], loads, strict=True):
        columns = [
            (f"{kind} {q}", kind, q) for q in ("p50", "p99") for kind in ("real", "simulated")
        ]
        for i, (label, kind, q) in enumerate(columns):
            values = [load["systems"][system][kind][q] for system in SYSTEMS]
            axis.bar(np.arange(len(SYSTEMS)) + 0.2 * i - 0.3, values, width=0.2, label=label)
        axis.set_xticks(range(len(SYSTEMS)), SYSTEMS, fontsize=8)
        axis.set_ylabel("latency in seconds")
        axis.set_title(f"{load['name']}, {load['share']:.0%} of capacity")
        axis.legend(fontsize=8)
    figure.tight_layout()
    path = RESULTS / "latency.png"
    figure.savefig(path, dpi=120)
    return path


def main() -> None:
    """Measure, print, write JSON and plot."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=200, help="requests per run")
    parser.add_argument("--share", type=float, default=0.8, help="of the engine's capacity")
    parser.add_argument("--threads", type=int, help="default: all cores")
    options = parser.parse_args()
    if options.threads:
        import torch

        torch.set_num_threads(options.threads)
    driver = Driver(LLM(DEMO_CHECKPOINT))
    everything = arrivals(1e9, options.count, burst=1, seed=1)
    began = time.perf_counter()
    driver.run(SYSTEMS[0], everything)
    capacity = options.count / (time.perf_counter() - began)
    cost = CostModel.fit(driver.steps)
    print(f"capacity {capacity:.1f} requests/s; a step costs {cost.base * 1e3:.1f} ms + "
          f"{cost.per_row * 1e6:.1f} µs per row")  # fmt: skip
    loads = []
    for name, burst in (("Poisson", 1), (f"bursts of {BURST}", BURST)):
        load = arrivals(options.share * capacity, options.count, burst=burst, seed=2)
        systems = {}
        for system in SYSTEMS:
            real = percentiles(driver.run(system, load))
            outcome = simulated(system, load, cost, driver)
            systems[system] = {"real": real, "simulated": percentiles(outcome.latencies)}
            print(name, system, systems[system])
        ratios = {
            system: systems[system]["real"]["p99"] / systems[SYSTEMS[0]]["real"]["p99"]
            for system in SYSTEMS[1:]
        }
        print(f"{name}: p99 of the others over ours: {ratios}")
        loads.append(
            {"name": name, "share": options.share, "systems": systems, "p99_over_ours": ratios}
        )
    result = {
        "count": options.count,
        "capacity_requests_per_second": capacity,
        "cost_model": {"base_seconds": cost.base, "seconds_per_row": cost.per_row},
        "loads": loads,
    }
    print(write_json("latency", result), plot(result))


if __name__ == "__main__":
    main()
