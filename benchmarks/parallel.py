"""Measures parallel decoding under load: `python -m benchmarks.parallel`.

Asks held-out questions of the demo checkpoint's tasks, 64 tokens each, at several loads; each step
commits every position that is sure enough. Baselines are LLaDA's loop (one token per step) and
Fast-dLLM's dual cache with the same threshold, both one question after another. All systems take
turns in each round; ratios are ratios of medians. Baselines decode the whole canvas; only rows that
say so end an answer at its end-of-text token.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from dllm_engine import LLM, Prompt, SamplingParams

from benchmarks.baselines import PlainLlama, Work, fast_dllm, reference
from benchmarks.common import DEMO_CHECKPOINT, RESULTS, speed_table, write_json
from demo import corpus

GEN_LENGTH, BLOCK_LENGTH, THRESHOLD = 64, 32, 0.9
#: Concurrent requests.
LOADS = (1, 8, 32, 64)
#: Questions that a baseline answers in a turn.
ONE_BY_ONE = 16
PARALLEL: dict[str, Any] = {"confidence_threshold": THRESHOLD, "ignore_eos": True}
ENGINE: dict[str, dict[str, Any]] = {
    "dual, a token per step": {"cache": "dual", "ignore_eos": True},
    f"none, τ = {THRESHOLD}": PARALLEL,
    f"dual, τ = {THRESHOLD}": {"cache": "dual", **PARALLEL},
    f"dual, τ = {THRESHOLD}, ends at end of text": {
        "cache": "dual",
        "confidence_threshold": THRESHOLD,
    },
}
REFERENCE = "reference, one by one"
FAST_DLLM = f"Fast-dLLM dual cache, τ = {THRESHOLD}, one by one"


class Bench:
    """The checkpoint and its questions, for the engine and the baselines."""

    def __init__(self, count: int) -> None:
        self.plain = PlainLlama(DEMO_CHECKPOINT)
        self.engines = {load: LLM(DEMO_CHECKPOINT, max_num_seqs=load).engine for load in LOADS}
        engine = self.engines[1]
        assert engine.tokenizer is not None
        each = -(-count // len(corpus.TASKS))
        examples = [e for task in corpus.TASKS for e in corpus.held_out_set(task, each)][:count]
        self.prompts = [engine.tokenizer.encode_chat(example.question) for example in examples]
        self.mask = engine.spec.mask_token_id

    def baseline(self, generate: Callable[..., Any], threshold: float | None) -> float:
        """Answers per second, one after another."""
        work = Work(GEN_LENGTH, BLOCK_LENGTH, self.mask, threshold)
        chosen = self.prompts[:: len(self.prompts) // ONE_BY_ONE][:ONE_BY_ONE]
        began = time.perf_counter()
        for prompt in chosen:
            generate(self.plain, torch.tensor([prompt]), work)
        return len(chosen) / (time.perf_counter() - began)

    def engine(self, rule: dict[str, Any], load: int) -> float:
        """Answers per second of the engine with `load` slots."""
        engine = self.engines[load]
        params = SamplingParams(gen_length=GEN_LENGTH, block_length=BLOCK_LENGTH, **rule)
        prompts = self.prompts if load > 1 else self.prompts[:ONE_BY_ONE]
        began = time.perf_counter()
        for prompt in prompts:
            engine.add(engine.make_request(Prompt(prompt), params))
        while engine.has_work:
            engine.step()
        return len(prompts) / (time.perf_counter() - began)


def measure(bench: Bench, rounds: int) -> dict[str, float]:
    """Median answers per second of every system."""
    systems: dict[str, Callable[[], float]] = {
        REFERENCE: lambda: bench.baseline(reference, None),
        FAST_DLLM: lambda: bench.baseline(fast_dllm, THRESHOLD),
    }
    for name, rule in ENGINE.items():
        for load in LOADS:
            systems[f"{name}, {load} at once"] = functools.partial(bench.engine, rule, load)
    samples: dict[str, list[float]] = {name: [] for name in systems}
    for _ in range(rounds):
        for name, run in systems.items():
            samples[name].append(run())
    return {name: statistics.median(values) for name, values in samples.items()}


def table(answers: dict[str, float]) -> str:
    """The figures as a Markdown table."""
    return speed_table(answers, unit="answers/s", reference=REFERENCE, fast_dllm=FAST_DLLM)


def plot(answers: dict[str, float]) -> Path:
    """Plot answers per second over concurrent requests, a curve per rule."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 4.5))
    for rule in ENGINE:
        speeds = [answers[f"{rule}, {load} at once"] for load in LOADS]
        axis.plot(LOADS, speeds, marker="o", label=rule)
    for name, style in ((REFERENCE, "--"), (FAST_DLLM, ":")):
        axis.axhline(answers[name], color="gray", linestyle=style, label=name)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log", base=2)
    axis.set_xlabel("requests at once")
    axis.set_ylabel("answers per second")
    axis.set_title("Demo checkpoint, 64 tokens")
    axis.legend(fontsize=7)
    figure.tight_layout()
    path = RESULTS / "parallel.png"
    figure.savefig(path, dpi=120)
    return path


def main() -> None:
    """Measure, print, write JSON and plot."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--count", type=int, default=192, help="number of questions")
    options = parser.parse_args()
    answers = measure(Bench(options.count), options.rounds)
    print(table(answers))
    result = {
        "gen_length": GEN_LENGTH,
        "block_length": BLOCK_LENGTH,
        "questions": options.count,
        "rounds": options.rounds,
        "threads": torch.get_num_threads(),
        "answers_per_second": answers,
    }
    print(write_json("parallel", result), plot(answers))


if __name__ == "__main__":
    main()
