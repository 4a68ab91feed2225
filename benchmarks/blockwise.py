"""Measures block-wise models: `python -m benchmarks.blockwise`.

Three questions, each in turns between the systems; ratios are ratios of medians:

- Tokens per second of the engine with 1, 16 and 64 requests, beside SDAR's own loop with its cache,
  one by one and over a static batch. All decode a token per step, but what is sure. The engine's
  prefix cache is off here, since the same prompts come again.
- Time to the first committed block in each turn of a conversation, with the prefix cache and
  without.
- Time of a prefill of 4,096 tokens by block length, over the least time of its products and
  attention at the speed of a large product on this machine.

All times are CPU seconds of one thread, which other programs on the machine change little.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from dllm_engine import LLM, Engine, Prompt, Request, SamplingParams

from benchmarks.block_baselines import BlockWork, PlainSdar, sdar
from benchmarks.common import RESULTS, write_json
from tests.support.family_checkpoints import write_family

PROMPT_LENGTH, GEN_LENGTH, BLOCK_LENGTH, THRESHOLD = 128, 32, 4, 0.85
LOADS = (1, 16, 64)
STATIC_BATCH = 16
LOOP, STATIC = "SDAR's loop, one by one", f"SDAR's loop, static batch of {STATIC_BATCH}"
#: The conversation: tokens of the first prompt, of each question, and of each answer.
HISTORY, QUESTION, ANSWER, TURNS = 1500, 24, 16, 10
PREFILL, BLOCK_LENGTHS = 4096, (4, 16, 64)
#: Rows, and the two sides of the weight, of the product that the machine's speed is measured by.
PRODUCT = (2048, 2048, 2048)


def sdar_60m(directory: Path) -> Path:
    """57 million parameters: 8 layers of width 512, vocabulary 32,768."""
    return write_family(
        directory,
        "sdar",
        tokenizer=False,
        scale=0.02,
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        vocab_size=32768,
        max_position_embeddings=8192,
    )


def sdar_1m(directory: Path) -> Path:
    """A million parameters: 4 layers of width 128, vocabulary 1,024; the demo checkpoints' size."""
    return write_family(
        directory,
        "sdar",
        tokenizer=False,
        scale=0.05,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        vocab_size=1024,
        max_position_embeddings=8192,
    )


def throughput(directory: Path, rounds: int) -> dict[str, float]:
    """Median tokens per second of CPU time of every system."""
    plain, llm = PlainSdar(directory), LLM(directory, prefix_cache=False)
    work = BlockWork(GEN_LENGTH, BLOCK_LENGTH, llm.engine.spec.mask_token_id, THRESHOLD)
    generator = torch.Generator().manual_seed(1)
    prompts = torch.randint(0, 400, (max(LOADS), PROMPT_LENGTH), generator=generator)
    params = SamplingParams(
        gen_length=GEN_LENGTH,
        block_length=BLOCK_LENGTH,
        remasking="low_confidence_dynamic",
        confidence_threshold=THRESHOLD,
        ignore_eos=True,
    )
    expected = sdar(plain, prompts[:2], work).tolist()
    answers = llm.generate(prompts[:2].tolist(), params, progress=False)
    same = [answer.token_ids.tolist() for answer in answers] == expected
    print(f"same tokens as the loop: {same}")

    def engine(count: int) -> None:
        llm.generate(prompts[:count].tolist(), params, progress=False)

    systems: dict[str, tuple[int, Callable[[], Any]]] = {
        LOOP: (1, functools.partial(sdar, plain, prompts[:1], work)),
        STATIC: (STATIC_BATCH, functools.partial(sdar, plain, prompts[:STATIC_BATCH], work)),
    }
    for load in LOADS:
        systems[engine_name(load)] = load, functools.partial(engine, load)
    seconds = in_turns({name: run for name, (_, run) in systems.items()}, rounds)
    return {name: count * GEN_LENGTH / seconds[name] for name, (count, _) in systems.items()}


def engine_name(load: int) -> str:
    """The engine's name in tables."""
    return f"engine, {load} at once"


def in_turns(systems: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median CPU seconds of every system."""
    samples: dict[str, list[float]] = {name: [] for name in systems}
    for _ in range(rounds):
        for name, run in systems.items():
            began = time.process_time()
            run()
            samples[name].append(time.process_time() - began)
    return {name: statistics.median(values) for name, values in samples.items()}


def conversation(directory: Path) -> dict[str, list[float]]:
    """Seconds to the first committed block of each turn, with the prefix cache and without."""
    engines = {
        name: LLM(directory, prefix_cache=on, max_num_seqs=1).engine
        for name, on in (("with", True), ("without", False))
    }
    generator = torch.Generator().manual_seed(2)

    def words(count: int) -> list[int]:
        found: list[int] = torch.randint(0, 400, (count,), generator=generator).tolist()
        return found

    params = SamplingParams(gen_length=ANSWER, block_length=BLOCK_LENGTH, ignore_eos=True)
    said = words(HISTORY)
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    for _ in range(TURNS):
        said = said + words(QUESTION)
        answers = []
        for name, engine in engines.items():
            first, tokens = _first_block(engine, said, params)
            seconds[name].append(first)
            answers.append(tokens)
        assert answers[0] == answers[1], "the prefix cache changed an answer"
        said = said + answers[0]
    return seconds


def _first_block(
    engine: Engine, prompt: Sequence[int], params: SamplingParams
) -> tuple[float, list[int]]:
    """Seconds from submission to the first committed block, and the answer."""
    began = time.process_time()
    request = _submit(engine, prompt, params)
    first, tokens = 0.0, []
    while engine.has_work:
        for update in engine.step():
            if not first and update.num_ready >= BLOCK_LENGTH - request.prompt.num_tokens % 4:
                first = time.process_time() - began
            tokens = update.token_ids.tolist()
    return first, tokens


def _submit(engine: Engine, prompt: Sequence[int], params: SamplingParams) -> Request:
    request = engine.make_request(Prompt(list(prompt)), params, stream_interval=0.0)
    engine.add(request)
    return request


def prefill(directory: Path, rounds: int) -> dict[str, float]:
    """Median seconds of a prefill by block length, and of its arithmetic."""
    engine = LLM(directory, prefix_cache=False, max_num_seqs=1).engine
    generator = torch.Generator().manual_seed(3)
    prompt = torch.randint(0, 400, (PREFILL,), generator=generator).tolist()

    def run(block_length: int) -> None:
        # One step decodes the block, and it is the one that prefills the last chunk.
        params = SamplingParams(
            gen_length=block_length,
            block_length=block_length,
            confidence_threshold=1e-6,
            ignore_eos=True,
        )
        _submit(engine, prompt, params)
        while engine.has_work:
            engine.step()

    rows, inner, outer = PRODUCT
    left, right = torch.rand(rows, inner), torch.rand(inner, outer)
    systems: dict[str, Callable[[], Any]] = {
        f"blocks of {size}": functools.partial(run, size) for size in BLOCK_LENGTHS
    }
    seconds = in_turns(systems | {"product": lambda: torch.mm(left, right)}, rounds)
    per_second = 2 * rows * inner * outer / seconds.pop("product")
    return {"arithmetic": prefill_operations(engine) / per_second} | seconds


def prefill_operations(engine: Engine) -> float:
    """Multiplications and additions of a prefill: the layers' products, and half of attention."""
    spec = engine.spec
    heads, kv, width = spec.num_heads, spec.num_kv_heads, spec.head_dim
    projections = spec.hidden_size * width * (2 * heads + 2 * kv)
    layer = projections + 3 * spec.hidden_size * spec.intermediate_size
    attention = 2 * heads * width * PREFILL / 2
    return 2.0 * PREFILL * spec.num_layers * (layer + attention)


def table(result: dict[str, Any]) -> str:
    """The figures as Markdown tables."""
    lines = []
    for model, speeds in result["tokens_per_second"].items():
        lines += [f"| {model} | tokens/s | × loop | × static batch |", "|---|--:|--:|--:|"]
        lines += [
            f"| {name} | {value:.0f} | {value / speeds[LOOP]:.2f} | {value / speeds[STATIC]:.2f} |"
            for name, value in speeds.items()
        ]
        lines.append("")
    lines += ["| turn | with | without | ratio |", "|--:|--:|--:|--:|"]
    turns = zip(result["first_block"]["with"], result["first_block"]["without"], strict=True)
    lines += [
        f"| {i} | {a * 1000:.0f} ms | {b * 1000:.0f} ms | {a / b:.2f} |"
        for i, (a, b) in enumerate(turns, 1)
    ]
    least = result["prefill"]["arithmetic"]
    lines += ["", "| prefill of 4,096 tokens | seconds | × arithmetic |", "|---|--:|--:|"]
    lines += [
        f"| {name} | {value:.2f} | {value / least:.2f} |"
        for name, value in result["prefill"].items()
    ]
    return "\n".join(lines)


def plot(result: dict[str, Any]) -> Path:
    """Plot throughput over the loop, and the turns of the conversation."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4))
    for model, speeds in result["tokens_per_second"].items():
        ratios = [speeds[engine_name(load)] / speeds[LOOP] for load in LOADS]
        (line,) = left.plot(LOADS, ratios, marker="o", label=f"engine, {model}")
        static = speeds[STATIC] / speeds[LOOP]
        left.axhline(static, color=line.get_color(), linestyle=":", label=f"{STATIC}, {model}")
    left.set_xscale("log", base=2)
    left.set_xlabel("requests at once")
    left.set_ylabel("throughput over SDAR's loop, one by one")
    left.legend(fontsize=7)
    for name, seconds in result["first_block"].items():
        turns = range(1, len(seconds) + 1)
        right.plot(turns, seconds, marker="o", label=f"{name} prefix cache")
    right.set_yscale("log")
    right.set_xlabel("turn of a conversation over 1,500 tokens")
    right.set_ylabel("seconds to the first block")
    right.legend(fontsize=7)
    figure.tight_layout()
    path = RESULTS / "blockwise.png"
    figure.savefig(path, dpi=120)
    return path


def main() -> None:
    """Measure, print, write JSON and plot."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3, help="rounds of the small model")
    parser.add_argument("--large-rounds", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        small, large = sdar_1m(Path(folder) / "small"), sdar_60m(Path(folder) / "large")
        result = {
            "prompt_length": PROMPT_LENGTH,
            "gen_length": GEN_LENGTH,
            "block_length": BLOCK_LENGTH,
            "rounds": options.rounds,
            "large_rounds": options.large_rounds,
            "threads": torch.get_num_threads(),
            "tokens_per_second": {
                "random SDAR, 1M parameters": throughput(small, options.rounds),
                "random SDAR, 57M parameters": throughput(large, options.large_rounds),
            },
            "first_block": conversation(large),
            "prefill": prefill(large, options.large_rounds),
        }
    print(table(result))
    print(write_json("blockwise", result), plot(result))


if __name__ == "__main__":
    main()
