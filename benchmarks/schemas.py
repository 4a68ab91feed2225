"""Measures structured outputs: `python -m benchmarks.schemas`.

A step of 32 requests, each under a schema of some 500 states, beside the same step without: a
random model of 59 million parameters whose 32,768 tokens are words of a tokenizer made here. Both
engines take turns, step by step. And on the demo checkpoint: share of correct answers and forward
passes per answer, as plain text and under a form.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from dllm_engine import LLM, Prompt, SamplingParams
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from benchmarks.checkpoints import llada_60m
from benchmarks.common import DEMO_CHECKPOINT, RESULTS, machine, write_json
from tests.support.checkpoints import LLADA_SPECIALS

#: The first steps store keys and values.
FIRST = 4
VOCABULARY, REQUESTS, PROMPT, CANVAS, BLOCK, STEPS = 32768, 32, 32, 96, 32, 8


def write_words(directory: Path) -> None:
    """Write a tokenizer of 256 bytes and random words."""
    rng = random.Random(0)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = {token: name for name, token in LLADA_SPECIALS.items()}
    vocabulary: dict[str, int] = {}
    for token in range(VOCABULARY):
        name = special.get(token) or (alphabet[token] if token < 256 else "")
        while not name or (token >= 256 and name in vocabulary):
            letters = "".join(rng.choices("etaoinshrdlu", k=rng.randint(2, 7)))
            name = rng.choice(("", "\u0120")) + letters + rng.choice(("", "", "", '"', '",'))
        vocabulary[name] = token
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in LLADA_SPECIALS])
    tokenizer.save(str(directory / "tokenizer.json"))


def schema(number: int) -> dict[str, Any]:
    """A schema of some 500 states; no two are equal."""
    names = [f"{name}{number}" for name in ("size", "place", "title", "owner", "notes")]
    text = {"type": "string"}
    short = {"type": "string", "minLength": 1, "maxLength": 16}
    number_kind = {"type": "number", "minimum": 0, "maximum": 1000}
    kinds: list[Any] = [text, short, short, number_kind, {"type": "array", "items": text}]
    return {"type": "object", "properties": dict(zip(names, kinds, strict=True)), "required": names}


def step_times(directory: Path, *, shared: bool) -> dict[str, Any]:
    """Milliseconds of steps with and without schemas."""
    engines = [LLM(directory, dtype="float32", max_num_seqs=REQUESTS).engine for _ in range(2)]
    states, compiling = [], []
    for i in range(REQUESTS):
        prompt = Prompt(np.random.default_rng(i).integers(600, VOCABULARY, PROMPT).tolist())
        for engine, form in zip(engines, (None, {"json": schema(0 if shared else i)}), strict=True):
            began = time.perf_counter()
            params = SamplingParams(
                gen_length=CANVAS,
                block_length=BLOCK,
                cache="dual",
                structured_outputs=form,
                ignore_eos=True,
            )
            request = engine.make_request(prompt, params)
            if request.form is not None:
                compiling.append(time.perf_counter() - began)
                states.append(request.form.num_states)
            engine.add(request)
    seconds: list[list[float]] = [[], []]
    for step in range(STEPS + FIRST):
        for which, engine in enumerate(engines):
            began = time.perf_counter()
            engine.step()
            if step >= FIRST:
                seconds[which].append(time.perf_counter() - began)
    plain, held = (1000 * statistics.median(values) for values in seconds)
    return {
        "schemas": "one for all" if shared else "one each",
        "states": round(statistics.mean(states)),
        "compile_s": round(max(compiling), 2),
        "plain_ms": round(plain, 1),
        "held_ms": round(held, 1),
        "ratio": round(held / plain, 3),
    }


def demo_quality(count: int) -> list[dict[str, Any]]:
    """Share of correct sums, and passes per answer, as text and under a form."""
    rng = random.Random(1)
    pairs = [(rng.randint(0, 49), rng.randint(0, 49)) for _ in range(count)]
    llm = LLM(DEMO_CHECKPOINT, dtype="float32")
    texts = [f"What is {a} + {b}?" for a, b in pairs]
    rows = []
    for threshold in (None, 0.9):
        for name, form in (("text", None), ("form", {"regex": r"\d{1,2}\.?"})):
            params = SamplingParams(
                gen_length=16, confidence_threshold=threshold, structured_outputs=form
            )
            answers = llm.generate(texts, params, chat=True, progress=False)
            right = sum(
                answer.text.strip().rstrip(".") == str(a + b)
                for answer, (a, b) in zip(answers, pairs, strict=True)
            )
            passes = statistics.mean(answer.usage.forward_passes for answer in answers)
            rows.append(
                {
                    "answer": name,
                    "confidence_threshold": threshold,
                    "correct": round(right / count, 3),
                    "passes": round(passes, 2),
                    "example": answers[0].text,
                }
            )
    return rows


def plot(result: dict[str, Any], path: Path) -> None:
    """Draw the steps as bars."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3))
    for i, row in enumerate(result["steps"]):
        axes.bar(
            i - 0.2, row["plain_ms"], 0.4, color="tab:gray", label="without" if not i else None
        )
        axes.bar(i + 0.2, row["held_ms"], 0.4, color="tab:blue", label="with" if not i else None)
    axes.set_xticks(range(len(result["steps"])), [row["schemas"] for row in result["steps"]])
    axes.set_ylabel("ms per step of 32 requests")
    axes.legend(title="schema")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Run everything once."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=100, help="sums of the demo checkpoint")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        directory = llada_60m(Path(folder))
        write_words(directory)
        steps = [step_times(directory, shared=False)]
    result = {"machine": machine(), "steps": steps, "demo": demo_quality(options.count)}
    for row in [*steps, *result["demo"]]:
        print(row)
    write_json("schemas", result)
    plot(result, RESULTS / "schemas.png")


if __name__ == "__main__":
    main()
