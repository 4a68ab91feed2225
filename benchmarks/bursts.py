"""Measures bursts of requests: `python -m benchmarks.bursts`.

Runs the same model under two configurations of Triton, each in its own tritonserver, in turns:

- Triton's queue: priorities, timeouts and a limit in `dynamic_batching`, with a delay of a
  millisecond. Such a queue hands over one batch at a time. It is not notified when the model is
  ready for the next one: it checks twice a second.
- The engine's queue (ours): Triton passes every request on at once, and it waits in the engine.

The requests are small, so the queue dominates: two at once, three within 5 ms, 256 at once.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import DEMO_CHECKPOINT, RESULTS, write_json
from benchmarks.ways_in import Triton, Work
from tests.support.servers import REPOSITORY, triton_server

TRITONS, OURS = "Triton's queue", "the engine's queue"
QUEUE_POLICY = """dynamic_batching {
  max_queue_delay_microseconds: 1000
  priority_levels: 3
  default_priority_level: 2
  default_queue_policy {
    timeout_action: REJECT
    default_timeout_microseconds: 86400000000
    allow_timeout_override: true
    max_queue_size: 4096
  }
}"""
SMALL = Work(gen_length=4, steps=1)
#: A request this late was stuck in the queue: alone, it takes some milliseconds.
LATE_SECONDS = 0.25


@dataclass(frozen=True)
class Load:
    """A burst: this many requests within this many seconds, repeated."""

    name: str
    requests: int
    spread: float
    repeats: int


LOADS = (
    Load("2 at once", 2, 0.0, 60),
    Load("3 within 5 ms", 3, 0.005, 60),
    Load("256 at once", 256, 0.0, 2),
)


def with_tritons_queue(folder: Path) -> Path:
    """A copy of the model repository in which requests wait in Triton's queue."""
    repository = folder / "repository"
    shutil.copytree(REPOSITORY, repository, ignore=shutil.ignore_patterns("__pycache__"))
    config = repository / "dllm/config.pbtxt"
    ours = config.read_text()
    theirs = ours.replace("dynamic_batching { }", QUEUE_POLICY)
    assert theirs != ours
    config.write_text(theirs)
    return repository


async def burst(way: Triton, load: Load, rng: random.Random) -> list[float]:
    """Run one burst; the seconds that each request took."""

    async def one(offset: float) -> float:
        await asyncio.sleep(offset)
        began = time.perf_counter()
        await way.ask("What is 17 + 25?", SMALL)
        return time.perf_counter() - began

    return await asyncio.gather(*(one(rng.uniform(0, load.spread)) for _ in range(load.requests)))


async def measure(urls: dict[str, str], rounds: int) -> list[dict[str, Any]]:
    """Each load under each configuration, in turns."""
    ways = {name: Triton(url) for name, url in urls.items()}
    rng = random.Random(0)
    for way in ways.values():
        await burst(way, LOADS[-1], rng)
    results = []
    for load in LOADS:
        samples: dict[str, list[list[float]]] = {name: [] for name in ways}
        for number in range(rounds):
            for name in list(ways)[:: 1 if number % 2 else -1]:
                samples[name] += [await burst(ways[name], load, rng) for _ in range(load.repeats)]
        by_queue = {name: summary(bursts) for name, bursts in samples.items()}
        results.append({"load": load.name, "bursts": rounds * load.repeats, "queues": by_queue})
    for way in ways.values():
        await way.close()
    return results


def summary(bursts: list[list[float]]) -> dict[str, float]:
    """Summary of many bursts: time until the last response, and how often it was late."""
    whole = [max(burst) for burst in bursts]
    each = [seconds for burst in bursts for seconds in burst]
    return {
        "median_ms": 1e3 * statistics.median(whole),
        "worst_ms": 1e3 * max(whole),
        "late_requests": sum(seconds > LATE_SECONDS for seconds in each),
        "late_bursts": sum(seconds > LATE_SECONDS for seconds in whole),
        "requests": len(each),
    }


def show(loads: list[dict[str, Any]]) -> None:
    """Print a table."""
    print(f"{'':<16}{'':<22}{'median ms':>11}{'worst ms':>10}{'over 250 ms':>14}")
    for load in loads:
        for name, figures in load["queues"].items():
            late = f"{figures['late_bursts']} of {load['bursts']}"
            print(
                f"{load['load']:<16}{name:<22}{figures['median_ms']:>11.1f}"
                f"{figures['worst_ms']:>10.1f}{late:>14}"
            )
        theirs, ours = load["queues"][TRITONS], load["queues"][OURS]
        print(f"{'':<16}ratio of medians {theirs['median_ms'] / ours['median_ms']:.2f}")


def plot(loads: list[dict[str, Any]]) -> Path:
    """Plot the time until a burst was answered: median and worst."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(loads), figsize=(4.5 * len(loads), 4))
    for panel, load in zip(panels, loads, strict=True):
        names = list(load["queues"])
        for i, kind in enumerate(("median", "worst")):
            values = [load["queues"][name][f"{kind}_ms"] for name in names]
            panel.bar([x + 0.4 * i - 0.2 for x in range(len(names))], values, 0.4, label=kind)
        panel.set_xticks(range(len(names)), names)
        panel.set_title(load["load"])
        panel.set_ylabel("ms until all are answered")
        panel.legend(fontsize=8)
    figure.tight_layout()
    path = RESULTS / "bursts.png"
    figure.savefig(path, dpi=120)
    return path


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, write JSON and plot."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5, help="turns of each configuration")
    options = parser.parse_args(arguments)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="dllm-bursts-")))
        repositories = {TRITONS: with_tritons_queue(folder), OURS: REPOSITORY}
        urls = {
            name: stack.enter_context(
                triton_server(
                    DEMO_CHECKPOINT, repository=repository, log_file=folder / f"{number}.log"
                )
            ).grpc_url
            for number, (name, repository) in enumerate(repositories.items())
        }
        loads = asyncio.run(measure(urls, options.rounds))
    show(loads)
    result = {"rounds": options.rounds, "late_seconds": LATE_SECONDS, "loads": loads}
    print(write_json("bursts", result), plot(loads))


if __name__ == "__main__":
    main()
