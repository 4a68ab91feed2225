"""Computes the bytes and operations that a kernel or a step needs at least.

It counts from shapes: every input is read once, every output written once; a multiplication and an
addition are two operations. With a device's bandwidth and rate this gives the least possible time,
the roofline (Williams et al., 2009). `python -m benchmarks.gpu_arithmetic` prints the figures of
docs/performance.md for an H100.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from benchmarks.checkpoints import DREAM_7B, LLADA_8B

#: Bytes of a bfloat16.
ELEMENT = 2


@dataclasses.dataclass(frozen=True)
class Cost:
    """Bytes moved and operations computed."""

    bytes: int
    flops: int

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.bytes + other.bytes, self.flops + other.flops)

    def times(self, count: int) -> Cost:
        """The same work done `count` times."""
        return Cost(self.bytes * count, self.flops * count)


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """Maximum bandwidth and rate of a device."""

    #: Bytes per second, reads and writes together.
    bandwidth: float
    #: bfloat16 operations per second.
    rate: float

    def seconds(self, cost: Cost) -> float:
        """Least time for `cost`."""
        return max(cost.bytes / self.bandwidth, cost.flops / self.rate)

    def limit(self, cost: Cost) -> str:
        """Which of the two limits `cost`."""
        memory = cost.bytes / self.bandwidth >= cost.flops / self.rate
        return "memory" if memory else "compute"


#: NVIDIA's data sheet: H100 SXM, dense bfloat16. A card reaches less; see `gpu_timing`.
H100 = Ceilings(bandwidth=3.35e12, rate=989e12)


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of a model."""

    name: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    intermediate_size: int
    vocab_size: int

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_heads

    @property
    def layer_parameters(self) -> int:
        """Numbers in the matrices of one layer."""
        qkv = (self.num_heads + 2 * self.num_kv_heads) * self.head_dim
        return self.hidden_size * (qkv + self.hidden_size + 3 * self.intermediate_size)

    @classmethod
    def llada(cls, name: str, config: dict[str, Any]) -> Shape:
        """The shape in a LLaDA's config.json."""
        return cls(
            name,
            config["n_layers"],
            config["d_model"],
            config["n_heads"],
            config["n_kv_heads"],
            config["mlp_hidden_size"],
            config["vocab_size"],
        )

    @classmethod
    def dream(cls, name: str, config: dict[str, Any]) -> Shape:
        """The shape in a Dream's config.json."""
        return cls(
            name,
            config["num_hidden_layers"],
            config["hidden_size"],
            config["num_attention_heads"],
            config["num_key_value_heads"],
            config["intermediate_size"],
            config["vocab_size"],
        )


LLADA = Shape.llada("LLaDA-8B", LLADA_8B)
DREAM = Shape.dream("Dream-7B", DREAM_7B)


@dataclasses.dataclass(frozen=True)
class Sequences:
    """Equal sequences of a step."""

    count: int
    #: Rows that go through the model.
    rows: int
    #: Reuse: rows in its pages that it attends to, including its own. 0: a Refresh, which
    #: attends to its own fresh rows.
    kv_len: int = 0

    @property
    def keys(self) -> int:
        """Rows that each row attends to."""
        return self.kv_len or self.rows


def attention(shape: Shape, sequences: Sequence[Sequences], element: int = ELEMENT) -> Cost:
    """Attention of one layer: queries, keys and values of each sequence, the result.

    A Reuse also writes its fresh keys and values to its pages.
    """
    queries = shape.num_heads * shape.head_dim
    stored = 2 * shape.num_kv_heads * shape.head_dim  # a key and a value
    moved = flops = 0
    for group in sequences:
        own = 2 * stored * group.rows if group.kv_len else 0
        moved += group.count * (2 * queries * group.rows + stored * group.keys + own)
        flops += group.count * 4 * queries * group.rows * group.keys
    return Cost(moved * element, flops)


def selection(
    shape: Shape, *, count: int, candidates: int, block: int, keep: int, element: int = ELEMENT
) -> Cost:
    """Selection of one layer for `count` sequences: score all candidates, move the kept ones.

    Scores are float32, written by one launch and read by the next.
    """
    wide = shape.num_kv_heads * shape.head_dim
    queries = block * shape.num_heads * shape.head_dim
    moved = (queries + candidates * wide + 4 * keep * wide) * element
    moved += 2 * 4 * candidates * shape.num_kv_heads
    return Cost(moved, 2 * queries * candidates).times(count)


def rms_norm(rows: int, width: int, element: int = ELEMENT) -> Cost:
    """RMSNorm: square, sum, scale and weight of each number."""
    return Cost((2 * rows * width + width) * element, 4 * rows * width)


def rotary(rows: int, heads: int, head_dim: int, element: int = ELEMENT) -> Cost:
    """Rotary embedding: each number times a cosine and times a sine (float32, per row)."""
    numbers = rows * heads * head_dim
    return Cost(2 * numbers * element + 2 * 4 * rows * head_dim, 3 * numbers)


def silu_mul(rows: int, width: int, element: int = ELEMENT) -> Cost:
    """silu · up: two numbers read for each written; exponential, sum, quotient and product."""
    return Cost(3 * rows * width * element, 4 * rows * width)


def head(shape: Shape, rows: int, element: int = ELEMENT) -> Cost:
    """Head: logits of every word, never written, and seven statistics per row (36 bytes)."""
    moved = (shape.vocab_size + rows) * shape.hidden_size * element + 36 * rows
    return Cost(moved, 2 * rows * shape.vocab_size * shape.hidden_size)


def linear(shape: Shape, rows: int, element: int = ELEMENT) -> Cost:
    """The matrices of all layers, without the far smaller activations between them."""
    parameters = shape.num_layers * shape.layer_parameters
    return Cost(parameters * element, 2 * rows * parameters)


def step_parts(
    shape: Shape, sequences: Sequence[Sequences], masked: int, element: int = ELEMENT
) -> dict[str, Cost]:
    """Cost of a denoising step by part; `masked` rows go through the head.

    Norms, rotary embedding and activations are left out: a few hundredths of the rest.
    """
    rows = sum(group.count * group.rows for group in sequences)
    return {
        "linear": linear(shape, rows, element),
        "attention": attention(shape, sequences, element).times(shape.num_layers),
        "head": head(shape, masked, element),
    }


def turning_rows(shape: Shape, ceilings: Ceilings) -> int:
    """Number of rows from which arithmetic limits the layers' matrices."""
    rows = 1
    while ceilings.limit(linear(shape, rows)) == "memory":
        rows += 1
    return rows


def main() -> None:
    """Print the tables of docs/performance.md."""
    for shape in (LLADA, DREAM):
        whole = linear(shape, 1)
        print(
            f"{shape.name}: layers {whole.bytes / 1e9:.1f} GB, {whole.flops / 1e9:.1f} GFLOP a "
            f"row; head {head(shape, 0).bytes / 1e9:.2f} GB; compute-bound from "
            f"{turning_rows(shape, H100)} rows on"
        )
        heading = "".join(f"{part:>22}" for part in step_parts(shape, [], 0))
        print(f"{'step':<42}{'rows':>7}{heading}")
        for name, group, masked in (
            ("Refresh, 1 × 256", Sequences(1, 256), 32),
            ("Refresh, 1 × 1152", Sequences(1, 1152), 32),
            ("Refresh, 14 × 1152", Sequences(14, 1152), 448),
            ("Reuse, 1 × 32 rows, 256 stored", Sequences(1, 32, 256), 16),
            ("Reuse, 8 × 32 rows, 256 stored", Sequences(8, 32, 256), 128),
            ("Reuse, 32 × 32 rows, 256 stored", Sequences(32, 32, 256), 512),
            ("Reuse, 32 × 32 rows, 1152 stored", Sequences(32, 32, 1152), 512),
            ("Reuse, 128 × 32 rows, 256 stored", Sequences(128, 32, 256), 2048),
            ("Reuse, 128 × 32 rows, 1152 stored", Sequences(128, 32, 1152), 2048),
        ):
            parts = step_parts(shape, [group], masked)
            cells = [
                f"{H100.seconds(cost) * 1e3:.2f} ms {H100.limit(cost)}" for cost in parts.values()
            ]
            print(f"{name:<42}{group.count * group.rows:>7}" + "".join(f"{c:>22}" for c in cells))


if __name__ == "__main__":
    main()
