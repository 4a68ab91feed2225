"""How far a fleet carries: measured costs of a request, and a simulation of its parts.

    python -m benchmarks.fleet            # measure on this machine, then simulate
    python -m benchmarks.fleet --again    # simulate with the costs in results/fleet.json

Measured with the real service on PostgreSQL and a tiny model: processor seconds of the adapter and
of PostgreSQL for a job (a submission and a held poll), beyond what they take when idle, and of the
adapter for an event of a stream. The simulation has queues for each adapter worker, the database's
cores and each engine's slots, with these costs. Each worker sends a request to the engine that has
the fewest of its own in flight, as `EnginePool.pick` does; it does not know about the others'. An
engine's speed is an assumption (`ENGINE_SECONDS`, `ENGINE_SLOTS`). The network is not simulated.
"""

from __future__ import annotations

import argparse
import asyncio
import heapq
import json
import math
import random
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil

from benchmarks.common import RESULTS, write_json

JOBS = 1500
STREAMS = 100
STREAM_EVENTS = 32
CONCURRENCY = 32
IDLE_SECONDS = 5.0
RATES = (10, 100, 1_000, 10_000)
#: An engine that answers 32 requests at once, each within 3.2 s: 10 requests a second.
ENGINE_SECONDS = 3.2
ENGINE_SLOTS = 32
#: How busy a part may be on average, so that bursts do not queue for long.
TARGET = 0.6
#: Connections of one worker to PostgreSQL (adapter/db/postgres.py), and PostgreSQL's default.
CONNECTIONS_PER_WORKER = 9
DEFAULT_MAX_CONNECTIONS = 100
#: Simulated time: several times what an engine takes, so that its slots fill.
SIMULATED_SECONDS = 12


@dataclass(frozen=True, slots=True)
class Costs:
    """Processor seconds, measured; and the rate at which they were."""

    adapter_job: float
    database_job: float
    adapter_event: float
    jobs_per_second: float


@dataclass(frozen=True, slots=True)
class Size:
    """A fleet for a rate of requests."""

    rate: int
    workers: int
    database_cores: int
    engines: int

    @property
    def connections(self) -> int:
        """Connections to PostgreSQL."""
        return self.workers * CONNECTIONS_PER_WORKER


def size_for(rate: int, costs: Costs) -> Size:
    """The smallest fleet of which no part is busier than `TARGET`, engines 0.8."""
    return Size(
        rate,
        math.ceil(rate * costs.adapter_job / TARGET),
        math.ceil(rate * costs.database_job / TARGET),
        math.ceil(rate * ENGINE_SECONDS / ENGINE_SLOTS / 0.8),
    )


class Queue:
    """Equal servers with one queue: a request takes the first that is free."""

    def __init__(self, servers: int) -> None:
        self._free = [0.0] * servers

    def serve(self, now: float, seconds: float) -> float:
        """When a request that arrives now is done; arrivals come in the order of time."""
        done = max(now, heapq.heappop(self._free)) + seconds
        heapq.heappush(self._free, done)
        return done


def simulate(size: Size, costs: Costs, *, arrivals: int, seed: int = 0) -> list[float]:
    """Seconds that each job waits beyond its own work, in the order of arrival.

    A job costs the adapter and the database half of their time when it is submitted and claimed,
    and half when it ends. Service times are exponential, arrivals Poisson, an engine's time fixed.
    """
    rng = random.Random(seed)
    workers = [Queue(1) for _ in range(size.workers)]
    database = Queue(size.database_cores)
    engines = [Queue(ENGINE_SLOTS) for _ in range(size.engines)]
    inflight = [[0] * size.engines for _ in range(size.workers)]
    waits = [0.0] * arrivals
    events: list[tuple[float, int, str, int, int]] = []
    now = 0.0
    work = [0.0] * arrivals
    for job in range(arrivals):
        now += rng.expovariate(size.rate)
        waits[job] = -now
        heapq.heappush(events, (now, job, "submit", rng.randrange(size.workers), 0))

    def spend(job: int, mean: float) -> float:
        seconds = rng.expovariate(2 / mean)
        work[job] += seconds
        return seconds

    following = {"submit": "store", "store": "run", "end": "result", "result": "done"}
    while events:
        now, job, what, worker, engine = heapq.heappop(events)
        if what in ("submit", "end"):
            done = workers[worker].serve(now, spend(job, costs.adapter_job))
        elif what in ("store", "result"):
            done = database.serve(now, spend(job, costs.database_job))
        elif what == "run":
            own = inflight[worker]
            start = rng.randrange(size.engines)  # equals take turns
            least = min(own)
            engine = own.index(least, start) if least in own[start:] else own.index(least)
            own[engine] += 1
            work[job] += ENGINE_SECONDS
            done = engines[engine].serve(now, ENGINE_SECONDS)
            following["run"] = "end"
        else:
            waits[job] += now - work[job]
            continue
        if what == "end":
            inflight[worker][engine] -= 1
        heapq.heappush(events, (done, job, following[what], worker, engine))
    return waits


def walls(costs: Costs) -> dict[str, float]:
    """The rate of jobs at which each limit is met, the lowest first."""
    worker = TARGET / costs.adapter_job
    found = {
        "one adapter worker": worker,
        "PostgreSQL's default of 100 connections": DEFAULT_MAX_CONNECTIONS
        // CONNECTIONS_PER_WORKER
        * worker,
        "PostgreSQL on 32 cores": 32 * TARGET / costs.database_job,
    }
    return dict(sorted(found.items(), key=lambda item: item[1]))


def table(costs: Costs) -> str:
    """The sizing table of docs/operate.md."""
    lines = [
        "| jobs a second | adapter workers | connections | database cores | engines | wait at the "
        "median, 99% |",
        "|--:|--:|--:|--:|--:|--:|",
    ]
    for rate in RATES:
        size = size_for(rate, costs)
        waits = sorted(simulate(size, costs, arrivals=max(2_000, rate * SIMULATED_SECONDS)))
        median, late = statistics.median(waits), waits[int(0.99 * len(waits))]
        lines.append(
            f"| {rate:,} | {size.workers} | {size.connections} | {size.database_cores} "
            f"| {size.engines:,} | {median * 1000:.0f} ms, {late * 1000:,.0f} ms |"
        )
    return "\n".join(lines)


def cpu_seconds(word: str) -> float:
    """Processor time of this process's descendants with a word in their command."""
    total = 0.0
    for process in psutil.Process().children(recursive=True):
        try:
            if word in " ".join(process.cmdline()):
                times = process.cpu_times()
                total += times.user + times.system
        except psutil.NoSuchProcess:
            continue
    return total


async def drive(count: int, call: Callable[[httpx.AsyncClient, int], Awaitable[None]]) -> None:
    """Make so many calls, `CONCURRENCY` at a time."""
    numbers = iter(range(count))
    async with httpx.AsyncClient(timeout=120, trust_env=False) as client:

        async def one_after_the_other() -> None:
            for number in numbers:
                await call(client, number)

        await asyncio.gather(*(one_after_the_other() for _ in range(CONCURRENCY)))


def measure() -> Costs:
    """Run the real service on this machine."""
    from tests.support.checkpoints import write_llada
    from tests.support.postgres import postgres_server
    from tests.support.servers import AdapterServer, triton_server

    with tempfile.TemporaryDirectory() as name, postgres_server() as postgres:
        folder = Path(name)
        settings = {"DLLM_DATABASE_URL": postgres.fresh_database()}
        with (
            triton_server(write_llada(folder / "model", max_sequence_length=256)) as triton,
            AdapterServer(triton, folder / "jobs.db", settings=settings) as adapter,
        ):

            async def job(client: httpx.AsyncClient, number: int) -> None:
                body = {"prompt": f"job {number}", "gen_length": 4}
                answer = await client.post(f"{adapter.url}/v1/generate", json=body)
                request_id = answer.json()["request_ids"][0]
                result = await client.get(f"{adapter.url}/v1/result/{request_id}?wait=60")
                assert result.json()["status"] == "finished", result.text

            async def stream(client: httpx.AsyncClient, number: int) -> None:
                body = {"prompt": f"stream {number}", "gen_length": STREAM_EVENTS}
                body["ignore_eos"] = True
                answer = await client.post(f"{adapter.url}/v1/generate/stream", json=body)
                assert "event: done" in answer.text

            asyncio.run(drive(100, job))
            idle = spent(lambda: time.sleep(IDLE_SECONDS))
            jobs = spent(lambda: asyncio.run(drive(JOBS, job)))
            streams = spent(lambda: asyncio.run(drive(STREAMS, stream)))
    rest = [part / idle[2] for part in idle[:2]]
    return Costs(
        adapter_job=(jobs[0] - jobs[2] * rest[0]) / JOBS,
        database_job=(jobs[1] - jobs[2] * rest[1]) / JOBS,
        adapter_event=(streams[0] - streams[2] * rest[0]) / (STREAMS * STREAM_EVENTS),
        jobs_per_second=JOBS / jobs[2],
    )


def spent(work: Callable[[], object]) -> tuple[float, float, float]:
    """Processor seconds of adapter and database, and seconds, while something is done."""
    adapter, database, began = cpu_seconds("-m adapter"), cpu_seconds("postgres"), time.monotonic()
    work()
    seconds = time.monotonic() - began
    return cpu_seconds("-m adapter") - adapter, cpu_seconds("postgres") - database, seconds


def stored(directory: Path = RESULTS) -> Costs:
    """The costs that were measured last."""
    return Costs(**json.loads((directory / "fleet.json").read_text())["costs"])


def main() -> None:
    """Measure, simulate, and print the table and the walls."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fleet", description=__doc__)
    parser.add_argument("--again", action="store_true", help="use the costs measured last")
    options = parser.parse_args()
    costs = stored() if options.again else measure()
    result: dict[str, Any] = {"costs": asdict(costs), "walls": walls(costs), "table": table(costs)}
    write_json("fleet", result)
    print(json.dumps(result["costs"] | result["walls"], indent=2))
    print(result["table"])


if __name__ == "__main__":
    main()
