"""Measures latency under load: `python -m benchmarks.latency`.

Requests of mixed lengths arrive as a Poisson process and in bursts, at a share of the engine's
capacity. The engine (phase-multiplexed, requests join at every step) is compared with the same
engine under first come, first served, with batches that run to completion, and with static batches.
Static batches run to completion too, and all requests of a batch get its longest canvas, as in one
call of a reference `generate`.

Every step is a real step of a real engine. Each system has its own engine and its own clock, which
advances by the time of its steps. The systems take turns of a second, so that a machine that
changes its speed changes it for all. Capacity is measured before and after each load. The simulator
runs the same arrivals, with the cost of a step fitted to these steps.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from dllm_engine import LLM, Prompt
from dllm_engine.loop.scheduler import Scheduler

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
#: Seconds on its own clock that a system runs per turn.
TURN_SECONDS = 1.0


def arrivals(rate: float, count: int, *, burst: int, seed: int) -> list[Arrival]:
    """`count` requests at `rate` per second, in groups of `burst` that arrive together."""
    rng = np.random.default_rng(seed)
    gaps = rng.exponential(burst / rate, size=-(-count // burst))
    times = np.repeat(gaps.cumsum() - gaps[0], burst)[:count]
    prompts = rng.choice(PROMPT_LENGTHS, count)
    lengths = rng.choice(GEN_LENGTHS, count, p=GEN_SHARES)
    return [
        Arrival(float(t), int(p), int(n)) for t, p, n in zip(times, prompts, lengths, strict=True)
    ]


class System:
    """An engine with the scheduler of one of `SYSTEMS`, and a clock that only its steps advance."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.engine = LLM(DEMO_CHECKPOINT, memory_limit="2GiB").engine
        self._scheduler = scheduler_of(
            name,
            self.engine.config.max_num_seqs,
            self.engine.runner.token_budget,
            self.engine.allocator,
        )
        #: (rows, seconds) of every step since `begin`.
        self.steps: list[tuple[int, float]] = []
        self.begin([])

    def begin(self, load: Sequence[Arrival]) -> None:
        """Set the clock to 0 before a load."""
        self.engine.scheduler = self._scheduler
        self.steps = []
        self.clock = 0.0
        #: Latencies in seconds, in the order of arrival.
        self.latencies = [0.0] * len(load)
        self._load = load
        self._added = 0
        self._place: dict[int, int] = {}

    @property
    def done(self) -> bool:
        """Whether every request of the load is answered."""
        return self._added == len(self._load) and not self.engine.has_work

    def run_until(self, seconds: float) -> None:
        """Take steps until the clock shows `seconds`, or all is done."""
        while self.clock < seconds and not self.done:
            self._take_arrivals()
            if self.engine.has_work:
                self._step()
            else:
                self.clock = self._load[self._added].seconds

    def _take_arrivals(self) -> None:
        wave = wave_of(self.name)
        if wave is not None and self.engine.has_work:
            return
        batch = [a for a in self._load[self._added :][:wave] if a.seconds <= self.clock]
        longest = max((a.gen_length for a in batch), default=0)
        for arrival in batch:
            length = longest if self.name == SYSTEMS[3] else arrival.gen_length
            params = dataclasses.replace(arrival, gen_length=length).params()
            request = self.engine.make_request(Prompt([1] * arrival.prompt_length), params)
            self.engine.add(request)
            self._place[request.request_id] = self._added
            self._added += 1

    def _step(self) -> None:
        rows, began = self.engine.stats.batched_tokens, time.perf_counter()
        updates = self.engine.step()
        seconds = time.perf_counter() - began
        self.steps.append((self.engine.stats.batched_tokens - rows, seconds))
        self.clock += seconds
        for update in updates:
            i = self._place[update.request_id]
            self.latencies[i] = self.clock - self._load[i].seconds


def scheduler_of(system: str, *args: Any) -> Scheduler:
    """The scheduler of one of `SYSTEMS`."""
    kind = FcfsScheduler if system == SYSTEMS[1] else Scheduler
    return kind(*args)


def wave_of(system: str) -> int | None:
    """Batch size of systems that run to completion; None: requests join at every step."""
    return STATIC_BATCH if system in SYSTEMS[2:] else None


def simulated(system: System, load: list[Arrival], cost: CostModel) -> Outcome:
    """Latencies of the same arrivals in the simulator."""
    engine = system.engine
    scheduler = scheduler_of(
        system.name, engine.config.max_num_seqs, engine.runner.token_budget, without_pages()
    )
    padded = system.name == SYSTEMS[3]
    return simulate(scheduler, load, cost, run_to_completion=wave_of(system.name), padded=padded)


def percentiles(latencies: list[float]) -> dict[str, float]:
    """p50, p95, p99 in seconds."""
    return {f"p{q}": float(np.percentile(latencies, q)) for q in (50, 95, 99)}


def capacity(system: System, count: int) -> float:
    """Requests per second when `count` requests arrive at once."""
    system.begin(arrivals(1e9, count, burst=1, seed=1))
    system.run_until(float("inf"))
    return count / system.clock


def measure(systems: list[System], load: list[Arrival]) -> dict[str, Any]:
    """Latencies of all systems under one load, real and simulated."""
    for system in systems:
        system.begin(load)
    turn = 0.0
    while not all(system.done for system in systems):
        turn += TURN_SECONDS
        for system in systems:
            system.run_until(turn)
    cost = CostModel.fit([step for system in systems for step in system.steps])
    outcomes = {system.name: simulated(system, load, cost) for system in systems}
    latencies = {
        system.name: {
            "real": percentiles(system.latencies),
            "simulated": percentiles(outcomes[system.name].latencies),
        }
        for system in systems
    }
    ours = latencies[SYSTEMS[0]]["real"]["p99"]
    return {
        "systems": latencies,
        "p99_over_ours": {name: latencies[name]["real"]["p99"] / ours for name in SYSTEMS[1:]},
        "cost_model": {"base_seconds": cost.base, "seconds_per_row": cost.per_row},
        "rows_per_second": sum(outcomes[SYSTEMS[0]].rows) / load[-1].seconds,
    }


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
    parser.add_argument("--share", type=float, default=0.8, help="share of the engine's capacity")
    parser.add_argument("--threads", type=int, help="default: all cores")
    options = parser.parse_args()
    if options.threads:
        import torch

        torch.set_num_threads(options.threads)
    systems = [System(name) for name in SYSTEMS]
    capacity(systems[0], STATIC_BATCH)  # warm-up: the first run is slower
    before = capacity(systems[0], options.count)
    loads = []
    for name, burst in (("Poisson", 1), (f"bursts of {BURST}", BURST)):
        load = arrivals(options.share * before, options.count, burst=burst, seed=2)
        measured = measure(systems, load)
        after = capacity(systems[0], options.count)
        print(f"{name}: capacity {before:.1f} requests/s before, {after:.1f} after")
        for system, latencies in measured["systems"].items():
            print(name, system, latencies)
        print(f"{name}: p99 of the others over ours: {measured['p99_over_ours']}")
        cost = CostModel(*measured["cost_model"].values())
        step = cost.sustainable_step(measured["rows_per_second"])
        print(f"{name}: to keep up with this load, a step takes {step * 1e3:.1f} ms and "
              f"{max(GEN_LENGTHS)} steps at least {max(GEN_LENGTHS) * step:.2f} s")  # fmt: skip
        loads.append(
            {
                "name": name,
                "share": options.share,
                "capacity_before": before,
                "capacity_after": after,
            }
            | measured
        )
        before = after
    result = {"count": options.count, "loads": loads}
    print(write_json("latency", result), plot(result))


if __name__ == "__main__":
    main()
