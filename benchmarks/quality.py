"""Measures exact match and forward passes of every decoding rule: `python -m benchmarks.quality`.

Asks held-out questions of the demo checkpoint's tasks greedily; the baseline is one token per
forward pass. Writes JSON and a plot, and prints the table of docs/quality.md. Nothing is timed:
forward passes are exact counts. `--model dream` scores the Dream-format twin, `--model sdar` the
block-wise one, whose keys and values are exact, so that there is no cache to score.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
from dllm_engine import LLM, SamplingParams

from benchmarks.common import (
    DEMO_CHECKPOINT,
    DREAM_CHECKPOINT,
    RESULTS,
    SDAR_CHECKPOINT,
    write_json,
)
from demo import corpus

GEN_LENGTH = 64
PARAGRAPH_LENGTH = 128
#: A canvas so long that a ratio keeps more than the minimum of `sparse`.
LONG = 256

#: (family of the curve, label of the point, parameters).
Rule = tuple[str, str, dict[str, Any]]

RULES: list[Rule] = [
    ("one token per pass", "low_confidence", {}),
    ("one token per pass", "entropy", {"remasking": "entropy"}),
    ("one token per pass", "margin", {"remasking": "margin"}),
    ("one token per pass", "random", {"remasking": "random"}),
    *(("fewer steps", f"steps ÷ {n}", {"steps": n}) for n in (2, 4, 8)),
    *(
        ("threshold", f"τ = {tau}", {"confidence_threshold": tau})
        for tau in (0.99, 0.95, 0.9, 0.8, 0.7, 0.5)
    ),
    *(("factor", f"f = {f}", {"factor": f}) for f in (0.1, 0.5, 1.0, 1.5)),
    *(("entropy bound", f"γ = {g}", {"entropy_bound": g}) for g in (0.01, 0.05, 0.15, 0.5, 1.0)),
    *(
        ("hierarchical", f"τ_low = {low}", {"confidence_threshold": 0.9, "low_threshold": low})
        for low in (0.4, 0.6)
    ),
    ("credit", "τ = 0.9", {"confidence_threshold": 0.9, "credit": True}),
    (
        "LocalLeap",
        "κ = 0.9, τ = 0.75",
        {"anchor_threshold": 0.9, "neighbor_threshold": 0.75},
    ),
    *(("Dream", alg, {"alg": alg}) for alg in ("origin", "maskgit_plus", "topk_margin", "entropy")),
    ("Dream", "entropy, alg_temp 0.1", {"alg": "entropy", "alg_temp": 0.1}),
    *(("cache", policy, {"cache": policy}) for policy in ("prefix", "dual", "delayed")),
    *(
        ("cache", f"sparse, ρ = {ratio}", {"cache": "sparse", "retention_ratio": ratio})
        for ratio in (1.0, 0.75, 0.5, 0.25)  # at 0.25 the minimum applies, as at 0.1
    ),
    *(
        (
            "cache",
            f"sparse, ρ = {ratio}, pool 1",
            {"cache": "sparse", "retention_ratio": ratio, "pool_kernel": 1},
        )
        for ratio in (0.75, 0.5, 0.25)
    ),
    *(
        ("cache", f"sparse, ρ = 0.5, {label}", {"cache": "sparse", "retention_ratio": 0.5, **more})
        for label, more in (("delay 1", {"delay_steps": 1}), ("refresh 8", {"refresh_interval": 8}))
    ),
    ("cache, longer canvas", "dual", {"cache": "dual", "gen_length": LONG}),
    *(
        (
            "cache, longer canvas",
            f"sparse, ρ = {ratio}",
            {"cache": "sparse", "retention_ratio": ratio, "gen_length": LONG},
        )
        for ratio in (0.5, 0.25, 0.1)
    ),
    *(
        (
            "cache and threshold",
            f"{policy}, τ = 0.9",
            {"cache": policy, "confidence_threshold": 0.9},
        )
        for policy in ("prefix", "dual", "sparse", "delayed")
    ),
]


#: Without a rule, SDAR decodes by its own, which commits what is sure enough.
SDAR_RULES: list[Rule] = [
    ("SDAR", "low_confidence_dynamic, τ = 0.85", {}),
    *(
        ("one token per pass", rule, {"remasking": rule})
        for rule in ("low_confidence", "sequential", "entropy", "margin", "random")
    ),
    *(
        ("fewer steps", f"steps ÷ {n}", {"remasking": "low_confidence", "steps": n})
        for n in (2, 4, 8)
    ),
    *(rule for rule in RULES if rule[0] in ("threshold", "factor", "entropy bound")),
]


@dataclass(frozen=True)
class Model:
    """A checkpoint to score, its rules, and the name of its results."""

    checkpoint: Path
    #: Name of the files in `RESULTS`.
    name: str
    title: str
    rules: list[Rule]


MODELS = {
    "llada": Model(DEMO_CHECKPOINT, "quality", "Demo checkpoint", RULES),
    "dream": Model(DREAM_CHECKPOINT, "quality_dream", "Dream-format twin", RULES),
    "sdar": Model(SDAR_CHECKPOINT, "quality_sdar", "Block-wise checkpoint", SDAR_RULES),
}


@dataclass(frozen=True)
class Score:
    """One rule over all tasks."""

    family: str
    label: str
    params: dict[str, Any]
    exact_match: float
    passes_per_answer: float
    tokens_per_pass: float
    by_task: dict[str, float]


def params_for(task: str, rule: dict[str, Any]) -> SamplingParams:
    """Parameters of a rule for this task's canvas; `steps` of a rule divides one step per token."""
    values = dict(rule)
    usual = PARAGRAPH_LENGTH if task == "paragraph" else GEN_LENGTH
    length = values.pop("gen_length", usual)
    steps = length // values.pop("steps", 1)
    return SamplingParams(gen_length=length, steps=steps, seed=0, **values)


def score(llm: LLM, family: str, label: str, rule: dict[str, Any], count: int) -> Score:
    """Ask every task's held-out questions in one batch."""
    asked = [(task, e) for task in corpus.TASKS for e in corpus.held_out_set(task, count)]
    answers = llm.generate(
        [example.question for _, example in asked],
        [params_for(task, rule) for task, _ in asked],
        chat=True,
        progress=False,
    )
    right: dict[str, list[bool]] = {}
    for (task, example), answer in zip(asked, answers, strict=True):
        right.setdefault(task, []).append(answer.text.strip() == example.answer)
    by_task = {task: sum(hits) / len(hits) for task, hits in right.items()}
    passes = sum(answer.usage.forward_passes for answer in answers)
    tokens = sum(answer.usage.completion_tokens for answer in answers)
    return Score(
        family=family,
        label=label,
        params=rule,
        exact_match=sum(by_task.values()) / len(by_task),
        passes_per_answer=passes / len(answers),
        tokens_per_pass=tokens / passes,
        by_task=by_task,
    )


def table(scores: list[Score]) -> str:
    """The scores as a Markdown table."""
    lines = [
        "| rule | point | exact match | forward passes per answer | tokens per pass |",
        "|---|---|--:|--:|--:|",
    ]
    lines += [
        f"| {s.family} | {s.label} | {s.exact_match:.1%} | {s.passes_per_answer:.1f} "
        f"| {s.tokens_per_pass:.2f} |"
        for s in scores
    ]
    return "\n".join(lines)


def stored(name: str) -> list[Score]:
    """Read the scores from a results file."""
    result = json.loads((RESULTS / f"{name}.json").read_text())
    return [Score(**score) for score in result["scores"]]


def plot(scores: list[Score], title: str, path: Path) -> None:
    """Plot exact match over forward passes, a curve per family of rules, without long canvases."""
    scores = [s for s in scores if "gen_length" not in s.params]
    figure, axes = plt.subplots(figsize=(8, 5))
    for family in dict.fromkeys(s.family for s in scores):
        points = sorted((s.passes_per_answer, s.exact_match) for s in scores if s.family == family)
        axes.plot(*zip(*points, strict=True), marker="o", label=family)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("forward passes per answer")
    axes.set_ylabel("exact match, mean over tasks")
    axes.set_title(f"{title}, held-out questions, temperature 0")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Score every rule, print the table, write JSON and plot."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=MODELS, default="llada")
    parser.add_argument("--checkpoint", type=Path, help="folder (default: the model's)")
    parser.add_argument("--count", type=int, default=40, help="questions per task at most")
    parser.add_argument(
        "--table", action="store_true", help="only print the table of the results file"
    )
    parser.add_argument(
        "--missing", action="store_true", help="keep the scores in the results file"
    )
    options = parser.parse_args()
    model = MODELS[options.model]
    if options.table:
        print(table(stored(model.name)))
        return
    llm = LLM(options.checkpoint or model.checkpoint)
    kept = {(s.family, s.label): s for s in stored(model.name)} if options.missing else {}
    scores = []
    for family, label, rule in model.rules:
        found = kept.get((family, label)) or score(llm, family, label, rule, options.count)
        scores.append(found)
        print(f"{family}, {label}: {scores[-1].exact_match:.1%}", flush=True)
    print(table(scores))
    result = {"questions_per_task": options.count, "scores": [asdict(s) for s in scores]}
    print("written", write_json(model.name, result))
    plot(scores, model.title, RESULTS / f"{model.name}.png")


if __name__ == "__main__":
    main()
