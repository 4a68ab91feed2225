"""How large SQLite's log gets under sustained writes, and whom moving it into the file holds up.

`python -m benchmarks.writes`: processes that do nothing but submit, claim, finish and remove jobs.
Measured are the log, the time of transactions (`waits`, with the wait for others' locks) and of
reads, and how late the event loop wakes who sleeps for a millisecond (`lags`). Prints JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import tempfile
import time
from pathlib import Path
from typing import Any

from adapter.database import Database
from adapter.generation import Event
from adapter.jobs.store import JobStore

MIB = 2**20
#: Statements are made when they first run, which takes some ten milliseconds.
WARM_UP_SECONDS = 2.0


def percentile(values: list[float], share: float) -> float:
    """The value that this share of the values does not exceed."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


async def load(
    url: str, seconds: float, owner: str, chars: int, pause: float
) -> dict[str, list[float]]:
    """One worker's writes; how many seconds everything took."""
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

    async with Database.open(url) as database:
        store = JobStore(database, max_attempts=3)
        await asyncio.gather(write(store), read(store), lag())
    return {"waits": waits, "reads": reads, "lags": lags}


def process(out: Any, *arguments: Any) -> None:
    """The same in a process of its own."""
    out.put(asyncio.run(load(*arguments)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--chars", type=int, default=200, help="of a prompt, and of a text")
    parser.add_argument("--pause", type=float, default=0.0, help="seconds after each job")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="dllm-writes-") as folder:
        url = f"sqlite:///{folder}/jobs.db"
        out: Any = multiprocessing.Queue()
        workers = [
            multiprocessing.Process(
                target=process,
                args=(out, url, options.seconds, f"w{n}", options.chars, options.pause),
            )
            for n in range(options.processes)
        ]
        for worker in workers:
            worker.start()
        sizes, log = [], Path(f"{folder}/jobs.db-wal")
        over = time.monotonic() + WARM_UP_SECONDS + options.seconds
        while time.monotonic() < over:
            time.sleep(0.02)
            if log.exists():
                sizes.append(log.stat().st_size)
        parts = [out.get(timeout=60) for _ in workers]
        for worker in workers:
            worker.join()
    result: dict[str, Any] = {
        "processes": options.processes,
        "log_mib": {"max": round(max(sizes) / MIB, 1), "last": round(sizes[-1] / MIB, 1)},
        "transactions_per_s": round(sum(len(part["waits"]) for part in parts) / options.seconds),
    }
    for name in ("waits", "reads", "lags"):
        values = [1000 * value for part in parts for value in part[name]]
        result[f"{name}_ms"] = {
            "median": round(percentile(values, 0.5), 2),
            "p99": round(percentile(values, 0.99), 2),
            "p999": round(percentile(values, 0.999), 2),
            "max": round(max(values), 1),
        }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
