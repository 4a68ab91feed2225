"""Measures tokens per second against baselines: `python -m benchmarks.throughput`.

Baselines and engine do the same work in one process, in turns, so that a noisy machine affects all
of them; ratios are ratios of medians. Every system decodes one token per step and request.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from dllm_engine import LLM, SamplingParams

from benchmarks.baselines import LibraryLlama, PlainLlama, Work, fast_dllm, reference
from benchmarks.checkpoints import llada_60m
from benchmarks.common import DEMO_CHECKPOINT, RESULTS, speed_table, write_json

POLICIES: dict[str, dict[str, Any]] = {
    "none": {"cache": "none"},
    "prefix": {"cache": "prefix"},
    "dual": {"cache": "dual"},
    "sparse": {"cache": "sparse", "retention_ratio": 0.5},
    "delayed": {"cache": "delayed"},
}
PROMPT_LENGTH = 128
BLOCK_LENGTH = 32
STATIC_BATCH = 16
REFERENCE, FAST_DLLM = "reference, one by one", "Fast-dLLM dual cache, one by one"
STATIC_FAST_DLLM = f"Fast-dLLM dual cache, static batch of {STATIC_BATCH}"


class Bench:
    """One checkpoint, loaded for the engine and for the baselines."""

    def __init__(self, name: str, checkpoint: Path, gen_length: int, vocabulary: int) -> None:
        self.name = name
        self.plain, self.library = PlainLlama(checkpoint), LibraryLlama(checkpoint)
        self.llm = LLM(checkpoint)
        self.work = Work(gen_length, BLOCK_LENGTH, self.llm.engine.spec.mask_token_id)
        generator = torch.Generator().manual_seed(1)
        # Ids below the special tokens.
        self.prompts = torch.randint(0, vocabulary, (64, PROMPT_LENGTH), generator=generator)

    def baseline(self, generate: Callable[..., Any], model: Any, requests: int) -> float:
        """Tokens per second of a batch of equal requests."""
        began = time.perf_counter()
        generate(model, self.prompts[:requests], self.work)
        return requests * self.work.gen_length / (time.perf_counter() - began)

    def engine(self, policy: str, requests: int) -> float:
        """Tokens per second of the engine with this many concurrent requests."""
        params = SamplingParams(
            gen_length=self.work.gen_length,
            block_length=BLOCK_LENGTH,
            ignore_eos=True,
            **POLICIES[policy],
        )
        began = time.perf_counter()
        self.llm.generate(self.prompts[:requests].tolist(), params, progress=False)
        return requests * self.work.gen_length / (time.perf_counter() - began)


#: Concurrent requests by policy. Without a cache, more of them gain little and take long.
SMALL_PLAN = {
    "none": [1, 8],
    "prefix": [1, 8, 32, 64],
    "dual": [1, 8, 32, 64],
    "sparse": [1, 8, 32, 64],
    "delayed": [1, 8, 32, 64],
}
LARGE_PLAN = {
    "none": [1],
    "prefix": [1, 8],
    "dual": [1, 8, 32, 64],
    "sparse": [1, 8, 32, 64],
    "delayed": [1, 8, 32, 64],
}


def measure(bench: Bench, plan: dict[str, list[int]], rounds: int) -> dict[str, Any]:
    """Medians of several rounds; every system has one turn per round."""
    systems: dict[str, Callable[[], float]] = {
        REFERENCE: lambda: bench.baseline(reference, bench.plain, 1),
        FAST_DLLM: lambda: bench.baseline(fast_dllm, bench.plain, 1),
        STATIC_FAST_DLLM: lambda: bench.baseline(fast_dllm, bench.plain, STATIC_BATCH),
        "reference on transformers, one by one": lambda: bench.baseline(
            reference, bench.library, 1
        ),
    }
    for policy, concurrency in plan.items():
        for requests in concurrency:
            name = f"{policy}, {requests} request{'s' * (requests > 1)}"
            systems[name] = functools.partial(bench.engine, policy, requests)
    samples: dict[str, list[float]] = {name: [] for name in systems}
    for round_number in range(rounds):
        for name, run in systems.items():
            samples[name].append(run())
            print(f"{bench.name} round={round_number} {name}: {samples[name][-1]:.1f} tok/s")
    medians = {name: statistics.median(values) for name, values in samples.items()}
    return {
        "model": bench.name,
        "prompt_length": PROMPT_LENGTH,
        "gen_length": bench.work.gen_length,
        "block_length": BLOCK_LENGTH,
        "rounds": rounds,
        "tokens_per_second": medians,
    }


def table(result: dict[str, Any]) -> str:
    """The figures of one model as a Markdown table."""
    return speed_table(
        result["tokens_per_second"],
        unit="tokens/s",
        reference=REFERENCE,
        fast_dllm=FAST_DLLM,
        title=result["model"],
    )


def plot(results: list[dict[str, Any]]) -> Path:
    """Plot the speed-up over the reference, one panel per checkpoint."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(results), figsize=(6.5 * len(results), 4.5), squeeze=False)
    for axis, result in zip(axes[0], results, strict=True):
        speeds: dict[str, float] = result["tokens_per_second"]
        ratios = {name: speed / speeds[REFERENCE] for name, speed in speeds.items()}
        for policy in POLICIES:
            points = [
                (int(name.split(", ")[1].split()[0]), ratio)
                for name, ratio in ratios.items()
                if name.startswith(f"{policy}, ")
            ]
            axis.plot(*zip(*sorted(points), strict=True), marker="o", label=policy)
        for name, style in ((FAST_DLLM, "--"), (STATIC_FAST_DLLM, ":")):
            axis.axhline(ratios[name], color="gray", linestyle=style, label=name)
        axis.set_xscale("log", base=2)
        axis.set_title(result["model"])
        axis.set_xlabel("requests at once")
        axis.set_ylabel("throughput over the reference, one by one")
        axis.legend(fontsize=7)
    figure.tight_layout()
    path = RESULTS / "throughput.png"
    figure.savefig(path, dpi=120)
    return path


def main() -> None:
    """Measure, print, write JSON and plot."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="rounds of the small model")
    parser.add_argument("--large-rounds", type=int, default=1)
    parser.add_argument("--threads", type=int, help="default: all cores")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        demo = Bench("demo checkpoint, 1M parameters", DEMO_CHECKPOINT, 128, 1000)
        results = [measure(demo, SMALL_PLAN, options.rounds)]
        large = Bench("random LLaDA, 59M parameters", llada_60m(Path(folder)), 128, 32000)
        results.append(measure(large, LARGE_PLAN, options.large_rounds))
    for result in results:
        print(f"\n{table(result)}")
    threads = torch.get_num_threads()
    print(write_json("throughput", {"threads": threads, "models": results}), plot(results))


if __name__ == "__main__":
    main()
