"""Measures the quality cost of fewer bits: `python -m benchmarks.precision`.

Asks the demo checkpoint's held-out questions, as in `benchmarks.quality`, in every number type and
with quantised weights; then quantises each part of the model alone, to see which matters. Prints
two tables and writes JSON. Nothing is timed.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from dllm_engine import LLM, SamplingParams
from dllm_engine.models import llada
from dllm_engine.models.loader import read_spec
from dllm_engine.ops.quantization import make_quantizer
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from benchmarks.common import DEMO_CHECKPOINT, RESULTS, write_json
from benchmarks.quality import GEN_LENGTH, Score, score
from demo import corpus

#: Engine settings by label.
PRECISIONS: dict[str, dict[str, str]] = {
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "float16": {"dtype": "float16"},
    "int8, float32": {"dtype": "float32", "quantization": "int8"},
    "int8, bfloat16": {"dtype": "bfloat16", "quantization": "int8"},
    "fp8, float32": {"dtype": "float32", "quantization": "fp8"},
    "fp8, bfloat16": {"dtype": "bfloat16", "quantization": "fp8"},
    "w8a8, float32": {"dtype": "float32", "quantization": "w8a8"},
    "w8a8, bfloat16": {"dtype": "bfloat16", "quantization": "w8a8"},
}
RULES: dict[str, dict[str, Any]] = {
    "one token per pass": {},
    "threshold 0.9": {"confidence_threshold": 0.9},
}
#: Parts of the model, by the endings of their parameters' names in the engine.
PARTS: dict[str, tuple[str, ...]] = {
    "qkv": (".qkv.weight",),
    "out": (".out.weight",),
    "gate_up": (".gate_up.weight",),
    "down": (".down.weight",),
    "these four": (".qkv.weight", ".out.weight", ".gate_up.weight", ".down.weight"),
    "embedding": ("embedding",),
    "head": ("head_weight",),
}


@dataclass(frozen=True)
class Precision:
    """One precision with one decoding rule."""

    label: str
    weight_bytes: int
    score: Score


@dataclass(frozen=True)
class PartShift:
    """Effect of quantising one part alone on a forward pass over masked canvases."""

    kind: str
    part: str
    #: Share of the model's numbers in this part.
    share: float
    #: Mean |confidence − confidence in float32| over the positions of answers, without padding.
    confidence_shift: float
    #: Share of positions whose most likely token changes.
    changed_tokens: float


def score_precisions(checkpoint: Path, count: int) -> list[Precision]:
    """Score every precision with every rule, on up to `count` questions a task."""
    results = []
    for label, settings in PRECISIONS.items():
        llm = LLM(checkpoint, **settings)
        for family, rule in RULES.items():
            scored = score(llm, family, label, rule, count)
            results.append(Precision(label, llm.engine.runner.plan.weights, scored))
            print(f"{label}, {family}: {scored.exact_match:.1%}", flush=True)
    return results


def measure_parts(checkpoint: Path, count: int) -> list[PartShift]:
    """Round each part alone, with everything else and all products in float32; LLaDA's layout."""
    tokens, confidence, answer = one_pass(checkpoint, count)
    results = []
    for kind in ("int8", "fp8"):
        for part, endings in PARTS.items():
            with tempfile.TemporaryDirectory() as folder:
                rounded = Path(folder) / "checkpoint"
                share = write_rounded(checkpoint, rounded, endings, kind)
                other_tokens, other_confidence, _ = one_pass(rounded, count)
            shift = np.abs(other_confidence - confidence)[answer].mean()
            changed = (other_tokens != tokens)[answer].mean()
            results.append(PartShift(kind, part, share, float(shift), float(changed)))
    return results


def one_pass(
    checkpoint: Path, count: int
) -> tuple[NDArray[np.int32], NDArray[np.float32], NDArray[np.bool_]]:
    """Decode held-out questions from a fully masked canvas in one pass.

    Returns:
        Tokens, confidences, and a mask of the positions before the end of the answer: each
        [questions, GEN_LENGTH].
    """
    params = SamplingParams(
        gen_length=GEN_LENGTH, block_length=GEN_LENGTH, steps=1, ignore_eos=True, seed=0
    )
    questions = [e.question for t in corpus.TASKS for e in corpus.held_out_set(t, count)]
    llm = LLM(checkpoint, dtype="float32")
    answers = llm.generate(questions, params, chat=True, progress=False)
    tokens = np.stack([answer.token_ids for answer in answers])
    confidence = np.stack([answer.confidence for answer in answers])
    ended = np.isin(tokens, llm.engine.stop_token_ids).cumsum(axis=1) > 0
    return tokens, confidence, ~ended


def write_rounded(source: Path, target: Path, endings: tuple[str, ...], kind: str) -> float:
    """Copy a checkpoint with some weights rounded to 8 bits and back; returns their share."""
    shutil.copytree(source, target)
    file = target / "model.safetensors"
    tensors = load_file(file)
    quantize = make_quantizer(kind)
    numbers = 0
    for name, sources in llada.tensors(read_spec(source)).items():
        if name.endswith(endings):
            for tensor in sources:
                weight = tensors[tensor].float()
                tensors[tensor] = quantize(weight).dequantize()
                numbers += weight.numel()
    save_file(tensors, file)
    return numbers / sum(tensor.numel() for tensor in tensors.values())


def stored() -> tuple[list[Precision], list[PartShift]]:
    """Read the results file."""
    result = json.loads((RESULTS / "precision.json").read_text())
    precisions = [Precision(**p | {"score": Score(**p["score"])}) for p in result["precisions"]]
    return precisions, [PartShift(**part) for part in result["parts"]]


def precision_table(results: list[Precision]) -> str:
    """The scores as a Markdown table, a line for each precision."""
    lines = [
        "| precision | weights | " + " | ".join(RULES) + " | passes per answer, threshold 0.9 |",
        "|---|--:|" + "--:|" * (len(RULES) + 1),
    ]
    for label in PRECISIONS:
        mine = [result for result in results if result.label == label]
        matches = " | ".join(f"{result.score.exact_match:.1%}" for result in mine)
        lines.append(
            f"| {label} | {mine[0].weight_bytes / 2**20:.2f} MiB | {matches} "
            f"| {mine[-1].score.passes_per_answer:.2f} |"
        )
    return "\n".join(lines)


def part_table(results: list[PartShift]) -> str:
    """The shifts as a Markdown table, a line for each part."""
    lines = [
        "| quantised alone | share of the weights | int8: confidence moves by | tokens change "
        "| fp8: confidence moves by | tokens change |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for part in PARTS:
        mine = [result for result in results if result.part == part]
        cells = [f"{r.confidence_shift:.5f} | {r.changed_tokens:.2%}" for r in mine]
        lines.append(f"| {part} | {mine[0].share:.0%} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Score, print the tables, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, default=DEMO_CHECKPOINT)
    parser.add_argument("--count", type=int, default=30, help="questions per task at most")
    options = parser.parse_args()
    parts = measure_parts(options.checkpoint, options.count)
    print(part_table(parts), flush=True)
    precisions = score_precisions(options.checkpoint, options.count)
    print(precision_table(precisions))
    result = {
        "questions_per_task": options.count,
        "precisions": [asdict(p) for p in precisions],
        "parts": [asdict(p) for p in parts],
    }
    print("written", write_json("precision", result))


if __name__ == "__main__":
    main()
