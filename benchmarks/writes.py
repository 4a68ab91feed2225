"""Measures SQLite's log under sustained writes, and the delays that checkpoints cause.

`python -m benchmarks.writes`: processes only submit, claim, finish and remove jobs, first with
SQLite's own checkpoints, which never empty the log while others write, then with the adapter's.
It measures the log's size, the time of transactions (`waits`, including the wait for others'
locks) and of reads, and how late the event loop wakes a task that sleeps for a millisecond
(`lags`).
"""

from __future__ import annotations

import argparse
import asyncio
import math
import multiprocessing
import tempfile
import time
from pathlib import Path
from typing import Any

from adapter.db import database, sqlite
from adapter.jobs.store import JobStore
from adapter.types import Event
from benchmarks.common import RESULTS, write_json

MIB = 2**20
#: Statements are compiled at their first run, which takes some ten milliseconds.
WARM_UP_SECONDS = 2.0
#: Seconds between two measurements of the log.
LOOK_SECONDS = 0.02
BASELINE, OURS = "checkpoints alone", "emptied when large"


def percentile(values: list[float], share: float) -> float:
    """The value that this share of the values does not exceed."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


async def load(
    url: str, seconds: float, owner: str, chars: int, pause: float
) -> dict[str, list[float]]:
    """One worker's writes; the times of each operation."""
    waits: list[float] = []
    reads: list[float] = []
    lags: list[float] = []
    over = time.monotonic() + WARM_UP_SECONDS + seconds
    warm = time.monotonic() + WARM_UP_SECONDS

    def took(times: list[float], began: float) -> None:
        if time.monotonic() > warm:
            times.append(time.perf_counter() - began)

    async def lag() -> None:
        while time.monotonic() < over:
            began = time.perf_counter()
            await asyncio.sleep(0.001)
            took(lags, began + 0.001)

    async def read(store: JobStore) -> None:
        while time.monotonic() < over:
            began = time.perf_counter()
            await store.get(0)
            took(reads, began)
            await asyncio.sleep(0.01)

    async def write(store: JobStore) -> None:
        async def timed(call: Any) -> Any:
            began = time.perf_counter()
            result = await call
            took(waits, began)
            await asyncio.sleep(0)
            return result

        while time.monotonic() < over:
            await timed(store.add([{"text_input": "x" * chars}], max_queued=10**6))
            for job in await timed(store.claim(owner, limit=1, lease=30)):
                await timed(store.finish(owner, job.id, Event("y" * chars, "stop")))
            await timed(store.purge(ttl=2, limit=500))
            await asyncio.sleep(pause)

    async with database.Database.open(url) as opened:
        store = JobStore(opened, max_attempts=3)
        await asyncio.gather(write(store), read(store), lag())
    return {"waits": waits, "reads": reads, "lags": lags}


def process(out: Any, log_limit: float, *arguments: Any) -> None:
    """Run `load` in a process of its own; the log is emptied above `log_limit` bytes."""
    sqlite.LOG_LIMIT_BYTES = log_limit  # type: ignore[assignment]
    out.put(asyncio.run(load(*arguments)))


def measure(options: argparse.Namespace, log_limit: float) -> dict[str, Any]:
    """Run all processes once."""
    with tempfile.TemporaryDirectory(prefix="dllm-writes-") as folder:
        url = f"sqlite:///{folder}/jobs.db"
        out: Any = multiprocessing.Queue()
        workers = [
            multiprocessing.Process(
                target=process,
                args=(out, log_limit, url, options.seconds, f"w{n}", options.chars, options.pause),
            )
            for n in range(options.processes)
        ]
        for worker in workers:
            worker.start()
        sizes, log = [], Path(f"{folder}/jobs.db-wal")
        over = time.monotonic() + WARM_UP_SECONDS + options.seconds
        while time.monotonic() < over:
            time.sleep(LOOK_SECONDS)
            sizes.append(log.stat().st_size / MIB if log.exists() else 0.0)
        parts = [out.get(timeout=60) for _ in workers]
        for worker in workers:
            worker.join()
    result: dict[str, Any] = {
        "log_mib": {"max": round(max(sizes), 1), "last": round(sizes[-1], 1)},
        "transactions_per_s": round(sum(len(part["waits"]) for part in parts) / options.seconds),
        "log_mib_over_time": [round(size, 1) for size in sizes[::10]],
    }
    for name in ("waits", "reads", "lags"):
        values = [1000 * value for part in parts for value in part[name]]
        result[f"{name}_ms"] = {
            "median": round(percentile(values, 0.5), 2),
            "p99": round(percentile(values, 0.99), 2),
            "p999": round(percentile(values, 0.999), 2),
            "max": round(max(values), 1),
        }
    return result


def show(results: dict[str, dict[str, Any]]) -> None:
    """Print both variants, and the ratio of the largest logs."""
    for name, result in results.items():
        print(f"{name}: {result['transactions_per_s']} transactions/s, log {result['log_mib']} MiB")
        for kind in ("waits", "reads", "lags"):
            print(f"  {kind}, ms: {result[f'{kind}_ms']}")
    before, ours = (results[name]["log_mib"]["max"] for name in (BASELINE, OURS))
    print(f"largest log, ratio {before / ours:.1f}")


def plot(results: dict[str, dict[str, Any]]) -> Path:
    """Plot the log over time."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4))
    for name, result in results.items():
        sizes = result["log_mib_over_time"]
        axes.plot([10 * LOOK_SECONDS * i for i in range(len(sizes))], sizes, label=name)
    axes.set_yscale("symlog")
    axes.set_xlabel("seconds")
    axes.set_ylabel("MiB of SQLite's log")
    axes.legend()
    figure.tight_layout()
    path = RESULTS / "writes.png"
    figure.savefig(path, dpi=120)
    return path


def main() -> None:
    """Measure both, print, write JSON and plot."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--chars", type=int, default=200, help="length of prompts and texts")
    parser.add_argument("--pause", type=float, default=0.0, help="seconds after each job")
    options = parser.parse_args()
    results = {
        BASELINE: measure(options, math.inf),
        OURS: measure(options, sqlite.LOG_LIMIT_BYTES),
    }
    show(results)
    print(write_json("writes", {"options": vars(options), "results": results}), plot(results))


if __name__ == "__main__":
    main()
