"""Measures the cost of Triton and of the adapter: `python -m benchmarks.serving`.

The same questions go to the same checkpoint in four ways (`benchmarks.ways_in`): to the engine in
this process, by tritonclient to a real tritonserver, and through the adapter in front of it as jobs
(submit, then a held poll) and as OpenAI's chat completions. The ways take turns in each round, so
that a noisy machine affects all of them, and must give the same answers.

- Throughput with 1, 8 and 32 clients, each of which sends its next request after a response: ratios
  of medians to the engine in this process.
- Latency of one small request at a time: medians of the differences within a turn.
- Streams: time per step of a streamed request, and of one without a stream.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp

from benchmarks.common import DEMO_CHECKPOINT, RESULTS, write_json
from benchmarks.ways_in import Chat, InProcess, Jobs, Triton, Way, Work
from tests.support.servers import AdapterServer, triton_server

QUESTIONS = (
    "What is 17 + 25?",
    "Sort these numbers: 5 3 9 1",
    "What is the capital of France?",
    "Tell me about AI",
)
ENGINE, TRITON, JOBS, CHAT = "engine", "Triton", "adapter, jobs", "adapter, chat"
#: Clients, and the number of requests that they make together in a turn.
LOADS = {1: 6, 8: 56, 32: 192}
LONG = Work(gen_length=64, steps=64)
#: One forward pass: the way dominates.
SMALL = Work(gen_length=8, steps=1)

Ways = dict[str, Way]
Samples = dict[str, list[float]]


@asynccontextmanager
async def all_ways(folder: Path) -> AsyncIterator[Ways]:
    """Engine, tritonserver and adapter, warm."""
    server = triton_server(DEMO_CHECKPOINT, log_file=folder / "triton.log")
    with server, AdapterServer(server, folder / "jobs.db") as adapter:
        # Shorter than the server's keep-alive, or a connection may close as it is used again.
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=3)
        async with aiohttp.ClientSession(adapter.url, connector=connector) as session:
            engine, triton = InProcess(), Triton(server.grpc_url)
            ways: Ways = {
                ENGINE: engine,
                TRITON: triton,
                JOBS: Jobs(session),
                CHAT: Chat(session),
            }
            for way in ways.values():
                await asyncio.gather(*(way.ask(question, LONG) for question in QUESTIONS * 8))
            yield ways
            engine.close()
            await triton.close()


async def check_answers(ways: Ways) -> list[str]:
    """Check that the answers do not depend on the way; returns them."""
    answers = {
        name: [await way.ask(question, LONG) for question in QUESTIONS]
        for name, way in ways.items()
    }
    for name, texts in answers.items():
        assert texts == answers[ENGINE], f"{name}: {texts}; {ENGINE}: {answers[ENGINE]}"
    return answers[ENGINE]


async def tokens_per_second(way: Way, callers: int, requests: int) -> float:
    """Throughput of `callers` clients, one request at a time each, until `requests` are answered.

    Counted from the end of the first round of responses to the beginning of the last, while all
    clients are busy: in this process a round arrives at once, elsewhere a little apart.
    """
    questions = iter([QUESTIONS[i % len(QUESTIONS)] for i in range(requests)])
    answered: list[float] = []

    async def call() -> None:
        for question in questions:
            await way.ask(question, LONG)
            answered.append(time.perf_counter())

    await asyncio.gather(*(call() for _ in range(callers)))
    first, last = callers - 1, requests - callers - 1
    return (last - first) * LONG.gen_length / (answered[last] - answered[first])


async def _timed(work: Awaitable[Any]) -> tuple[float, Any]:
    began = time.perf_counter()
    result = await work
    return time.perf_counter() - began, result


async def in_turns(
    ways: Ways, rounds: int, measure: Callable[[str, Way], Awaitable[float]]
) -> Samples:
    """`rounds` samples of each way; each round begins with another way."""
    samples: Samples = {name: [] for name in ways}
    names = list(ways)
    for number in range(rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            samples[name].append(await measure(name, ways[name]))
    return samples


def _medians(samples: Samples) -> dict[str, float]:
    return {name: statistics.median(values) for name, values in samples.items()}


async def measure_throughput(ways: Ways, rounds: int) -> list[dict[str, Any]]:
    """Tokens per second by way and number of clients."""
    results = []
    for callers, requests in LOADS.items():

        async def measure(
            _: str, way: Way, callers: int = callers, requests: int = requests
        ) -> float:
            return await tokens_per_second(way, callers, requests)

        samples = await in_turns(ways, rounds, measure)
        medians = _medians(samples)
        results.append(
            {
                "callers": callers,
                "requests": requests,
                "tokens_per_second": medians,
                "of_engine": {name: value / medians[ENGINE] for name, value in medians.items()},
                "samples": samples,
            }
        )
        print(f"{callers} callers: {_row(medians)}", flush=True)
    return results


async def measure_latency(ways: Ways, rounds: int) -> dict[str, Any]:
    """Milliseconds of one small request at a time, and what each way adds within a round."""

    async def measure(_: str, way: Way) -> float:
        return 1e3 * (await _timed(way.ask(QUESTIONS[0], SMALL)))[0]

    samples = await in_turns(ways, rounds, measure)

    def added(name: str, before: str) -> float:
        pairs = zip(samples[name], samples[before], strict=True)
        return statistics.median(more - less for more, less in pairs)

    return {
        "gen_length": SMALL.gen_length,
        "steps": SMALL.steps,
        "rounds": rounds,
        "median_ms": _medians(samples),
        "p95_ms": {n: statistics.quantiles(s, n=20)[-1] for n, s in samples.items()},
        "added_ms": {
            f"{TRITON} over {ENGINE}": added(TRITON, ENGINE),
            f"{JOBS} over {TRITON}": added(JOBS, TRITON),
            f"{CHAT} over {TRITON}": added(CHAT, TRITON),
        },
    }


async def measure_streams(ways: Ways, rounds: int) -> dict[str, Any]:
    """Milliseconds per step of one request at a time, streamed and not."""
    events: dict[str, int] = {}

    async def watched(name: str, way: Way) -> float:
        seconds, events[name] = await _timed(way.watch(QUESTIONS[3], LONG))
        return 1e3 * seconds / LONG.steps

    async def whole(_: str, way: Way) -> float:
        return 1e3 * (await _timed(way.ask(QUESTIONS[3], LONG)))[0] / LONG.steps

    watching = await in_turns(ways, rounds, watched)
    waiting = await in_turns(ways, rounds, whole)
    return {
        "steps": LONG.steps,
        "rounds": rounds,
        "events": events,
        "watched_ms_per_step": _medians(watching),
        "whole_ms_per_step": _medians(waiting),
    }


def _row(values: dict[str, float], digits: int = 1) -> str:
    return "  ".join(f"{name} {value:.{digits}f}" for name, value in values.items())


def show(result: dict[str, Any]) -> None:
    """Print a table."""
    names = list(result["latency"]["median_ms"])

    def line(label: str, values: dict[str, Any], digits: int) -> None:
        cells = "".join(f"{values[name]:>15.{digits}f}" for name in names)
        print(f"{label:<34}{cells}")

    print(f"\n{'':<34}" + "".join(f"{name:>15}" for name in names))
    for load in result["throughput"]:
        line(f"tokens/s, {load['callers']} callers", load["tokens_per_second"], 1)
        line("  of the engine's", load["of_engine"], 3)
    latency, streams = result["latency"], result["streams"]
    line("small request, median ms", latency["median_ms"], 2)
    line("small request, p95 ms", latency["p95_ms"], 2)
    line("stream, ms per step", streams["watched_ms_per_step"], 2)
    line("  in one piece, ms per step", streams["whole_ms_per_step"], 2)
    line("  events", streams["events"], 0)
    for name, milliseconds in latency["added_ms"].items():
        print(f"{name} adds {milliseconds:.2f} ms at the median")


def plot(result: dict[str, Any]) -> Path:
    """Plot the share of the engine's throughput, small requests' latency and a stream's steps."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(17, 4.5))
    names = list(result["latency"]["median_ms"])
    loads = [str(load["callers"]) for load in result["throughput"]]
    for i, name in enumerate(names[1:]):
        shares = [load["of_engine"][name] for load in result["throughput"]]
        left.bar([x + 0.25 * i - 0.25 for x in range(len(loads))], shares, width=0.25, label=name)
    left.axhline(0.95, color="gray", linestyle="--", label="aimed at")
    left.set_xticks(range(len(loads)), loads)
    left.set_xlabel("callers at once")
    left.set_title("tokens per second over the engine's in this process")
    left.legend(fontsize=8, loc="lower right")
    middle.bar(names, [result["latency"]["median_ms"][name] for name in names])
    middle.set_ylabel("ms")
    middle.set_title("one small request at a time, median")
    for i, (kind, label) in enumerate((("watched", "watched"), ("whole", "in one piece"))):
        values = [result["streams"][f"{kind}_ms_per_step"][name] for name in names]
        right.bar([x + 0.4 * i - 0.2 for x in range(len(names))], values, width=0.4, label=label)
    right.set_xticks(range(len(names)), names)
    right.set_ylabel("ms")
    right.set_title("one stream: time per step, median")
    right.legend(fontsize=8)
    figure.tight_layout()
    path = RESULTS / "serving.png"
    figure.savefig(path, dpi=120)
    return path


async def measure(rounds: int, small: int, folder: Path) -> dict[str, Any]:
    """Measure everything, with `rounds` turns of each way and `small` of the small request."""
    async with all_ways(folder) as ways:
        return {
            "answers": dict(zip(QUESTIONS, await check_answers(ways), strict=True)),
            "gen_length": LONG.gen_length,
            "cache": LONG.cache,
            "rounds": rounds,
            "throughput": await measure_throughput(ways, rounds),
            "latency": await measure_latency(ways, small),
            "streams": await measure_streams(ways, 2 * rounds),
        }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, write JSON and plot."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5, help="turns of each way and load")
    parser.add_argument("--small", type=int, default=200, help="turns of the small request")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="dllm-serving-") as folder:
        result = asyncio.run(measure(options.rounds, options.small, Path(folder)))
    show(result)
    print(write_json("serving", result), plot(result))


if __name__ == "__main__":
    main()
