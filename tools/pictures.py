"""Draw the pictures of docs/decoding.md and docs/caching.md: `python -m tools.pictures`.

Both are drawn from runs of the demo checkpoint: which step committed each position, and which rows
each step sent through the model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from dllm_engine import LLM, SamplingParams

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch

ROOT = Path(__file__).resolve().parents[1]
CHECKPOINT = ROOT / "model_repository/dllm/1/demo_checkpoint"
IMAGES = ROOT / "docs/images"
PROMPT = "Why is the sky blue?"
LENGTH, BLOCK = 48, 16
RULES: dict[str, dict[str, Any]] = {
    "the default: a token a step": {},
    "confidence_threshold 0.9": {"confidence_threshold": 0.9},
    "entropy_bound 0.5": {"entropy_bound": 0.5},
}
POLICIES = ("none", "prefix", "dual", "delayed")


def trajectory(llm: LLM, params: SamplingParams) -> tuple[list[npt.NDArray[np.bool_]], list[int]]:
    """Which positions are committed after each step, and the rows that each step computed."""
    engine = llm.engine
    assert engine.tokenizer is not None
    prompt = llm._encode(PROMPT, chat=True)
    engine.add(engine.make_request(prompt, params, stream_interval=0.0))
    committed, rows, before = [], [], engine.stats.batched_tokens
    while engine.has_work:
        updates = engine.step()
        rows.append(engine.stats.batched_tokens - before)
        before = engine.stats.batched_tokens
        committed += [update.confidence >= 0 for update in updates]
    return committed, rows


def draw_rules(llm: LLM) -> None:
    """Draw when each rule commits each position."""
    figure, axes = plt.subplots(1, len(RULES), figsize=(9, 4), sharey=True, layout="constrained")
    for ax, (name, fields) in zip(axes, RULES.items(), strict=True):
        params = SamplingParams(gen_length=LENGTH, block_length=BLOCK, ignore_eos=True, **fields)
        committed, _ = trajectory(llm, params)
        done = np.array(committed)
        state = done.astype(int) + np.vstack([done[:1], done[1:] & ~done[:-1]])
        draw_grid(ax, state)
        ax.set_title(f"{name}\n{len(done)} steps", fontsize=9)
    axes[0].set_ylabel("denoising step")
    figure.legend(
        handles=[
            Patch(color="#e8e8ee", label="masked"),
            Patch(color="#3b5bdb", label="committed in this step"),
            Patch(color="#b9c6f5", label="committed before"),
        ],
        loc="outside lower center",
        ncols=3,
        fontsize=8,
        frameon=False,
    )
    figure.savefig(IMAGES / "decoding.png", dpi=110)
    plt.close(figure)


def draw_grid(ax: Axes, state: npt.NDArray[Any]) -> None:
    """Draw steps from top to bottom, positions from left to right, and the edges of blocks."""
    colours = ListedColormap(["#e8e8ee", "#b9c6f5", "#3b5bdb"])
    padded = np.full((LENGTH, LENGTH), np.nan)
    padded[: len(state)] = state[:LENGTH]
    ax.imshow(padded, cmap=colours, vmin=0, vmax=2, aspect="auto", interpolation="nearest")
    for edge in range(BLOCK, LENGTH, BLOCK):
        ax.axvline(edge - 0.5, color="#888", linewidth=0.6)
    ax.set_xlabel("position in the canvas")
    ax.tick_params(labelsize=8)


def draw_policies(llm: LLM) -> None:
    """Draw how many rows each step of a policy sends through the model."""
    figure, axes = plt.subplots(
        1, len(POLICIES), figsize=(9, 2.8), sharey=True, layout="constrained"
    )
    for ax, policy in zip(axes, POLICIES, strict=True):
        params = SamplingParams(
            gen_length=LENGTH, block_length=BLOCK, ignore_eos=True, cache=policy
        )
        _, rows = trajectory(llm, params)
        rows = [count for count in rows if count]
        ax.bar(range(1, len(rows) + 1), rows, width=1.0, color="#3b5bdb")
        ax.set_title(f"cache={policy}\n{sum(rows):,} rows in all", fontsize=9)
        ax.set_xlabel("denoising step")
        ax.tick_params(labelsize=8)
    axes[0].set_ylabel("rows through the model")
    figure.savefig(IMAGES / "caching.png", dpi=110)
    plt.close(figure)


def main() -> None:
    """Draw both."""
    IMAGES.mkdir(exist_ok=True)
    llm = LLM(CHECKPOINT, device="cpu")
    draw_rules(llm)
    draw_policies(llm)


if __name__ == "__main__":
    main()
