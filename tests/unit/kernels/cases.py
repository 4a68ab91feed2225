"""Random steps for the kernels, and tolerances."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import torch
import torch.nn.functional as F
from dllm_engine.ops.dispatch import choose_operations
from dllm_engine.ops.layout import FlatLayout, FlatSelection, LayerPages
from hypothesis import strategies as st
from torch import Tensor

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
#: The operations under test.
KERNELS = choose_operations("triton", DEVICE, torch.float32)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
#: Of an engine that starts quickly: it begins with as many rows as a step may have.
SMALL: dict[str, Any] = {"max_model_len": 64, "max_num_batched_tokens": 128}
#: Of the rounding of one number; sums of many are allowed some of them.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


@dataclasses.dataclass(frozen=True)
class Heads:
    """Sizes of attention."""

    num_kv_heads: int
    group: int
    head_dim: int
    page_size: int
    dtype: torch.dtype


HEADS = st.builds(
    Heads,
    num_kv_heads=st.integers(1, 3),
    group=st.integers(1, 7),
    head_dim=st.sampled_from([8, 16, 24, 32]),
    page_size=st.sampled_from([1, 4, 8, 32]),
    dtype=st.sampled_from(DTYPES),
)


@dataclasses.dataclass(frozen=True)
class Sequence:
    """`rows` packed rows; `kv_len` rows in its pages, which it attends to if above 0."""

    rows: int
    kv_len: int = 0


def near(found: Tensor, wanted: Tensor, dtype: torch.dtype) -> None:
    """Assert that both are equal within the type's tolerance."""
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(
        found.float().cpu(), wanted.float().cpu(), rtol=tolerance, atol=tolerance
    )


class Step:
    """Queries, keys, values and pages of some sequences, with padding behind the rows."""

    def __init__(self, heads: Heads, sequences: list[Sequence], seed: int) -> None:
        self.heads, self.sequences = heads, sequences
        generator = torch.Generator().manual_seed(seed)

        def numbers(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(DEVICE, heads.dtype)

        self.num_rows = sum(sequence.rows for sequence in sequences)
        # Slices of one product, as a layer has them.
        num_heads = heads.num_kv_heads * heads.group
        qkv = numbers(self.num_rows + 3, num_heads + 2 * heads.num_kv_heads, heads.head_dim)
        self.q, self.k, self.v = qkv.split([num_heads, heads.num_kv_heads, heads.num_kv_heads], 1)
        widest = max(1, *(-(-max(s.kv_len, s.rows) // heads.page_size) for s in sequences))
        num_pages = widest * len(sequences)
        shape = (num_pages + 1, heads.page_size, heads.num_kv_heads, heads.head_dim)
        self.pages = LayerPages(numbers(*shape), numbers(*shape))
        order = torch.randperm(num_pages, generator=generator)
        self.block_tables = order.view(len(sequences), widest).to(DEVICE)

    def layout(
        self, places: Tensor | None = None, selection: FlatSelection | None = None
    ) -> FlatLayout:
        """The step's layout, which stores rows and a selection as given."""
        operations = choose_operations("triton", DEVICE, self.heads.dtype)
        block_m = operations.block_m(self.heads.group, 1)
        assert block_m is not None
        if places is not None:
            places = F.pad(places, (0, len(self.k) - len(places)), value=-1)
        return dataclasses.replace(
            FlatLayout.of([s.rows for s in self.sequences], block_m, DEVICE),
            kv_lens=torch.tensor([s.kv_len for s in self.sequences], device=DEVICE),
            block_tables=self.block_tables,
            slot_mapping=places,
            selection=selection,
        )

    def stored(self, index: int) -> tuple[Tensor, Tensor]:
        """Keys and values in a sequence's pages: [kv_len, num_kv_heads, head_dim]."""
        kv_len = self.sequences[index].kv_len
        pages = self.block_tables[index]
        return (
            self.pages.keys[pages].flatten(0, 1)[:kv_len],
            self.pages.values[pages].flatten(0, 1)[:kv_len],
        )
