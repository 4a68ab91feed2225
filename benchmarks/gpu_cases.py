"""The calls that `gpu_kernels` measures: our kernels, torch's operations, libraries.

Each is one layer's call at the size of a real step. The results of ours and torch's are compared
too, so that a fast wrong kernel is noticed.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from dllm_engine.ops.dispatch import TORCH, Operations
from dllm_engine.ops.head import Head
from dllm_engine.ops.head_types import HeadOptions, HeadStatistics
from dllm_engine.ops.layout import FlatSelection, LayerPages, Selection
from dllm_engine.ops.rotary import Rope, RotaryTable
from dllm_engine.ops.selection import store_selection
from torch import Tensor

from benchmarks import gpu_arithmetic as arithmetic
from benchmarks.gpu_arithmetic import Cost, Sequences, Shape
from benchmarks.gpu_layouts import PAGE_SIZE, flat_layout, packed_layout
from benchmarks.gpu_libraries import library_attention

#: Rows of an active block.
BLOCK = 32


@dataclasses.dataclass(frozen=True)
class Case:
    """One call, three ways."""

    kernel: str
    model: str
    name: str
    cost: Cost
    ours: Callable[[], object]
    torch: Callable[[], object]
    #: Share of two results that is equal or near, 0 to 1.
    agreement: Callable[[], float]
    libraries: dict[str, Callable[[], object]] = dataclasses.field(default_factory=dict)


class Tensors:
    """Random inputs on the device, in bfloat16."""

    def __init__(self, device: str) -> None:
        self.device = device
        self._generator = torch.Generator(device).manual_seed(1)

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        """Normally distributed numbers."""
        made = torch.empty(shape, dtype=torch.bfloat16, device=self.device)
        return made.normal_(std=scale, generator=self._generator)

    def heads(self, rows: int, shape: Shape) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values: slices of one product, as in a layer."""
        sizes = [shape.num_heads, shape.num_kv_heads, shape.num_kv_heads]
        q, k, v = self.normal(rows, sum(sizes), shape.head_dim).split(sizes, dim=1)
        return q, k, v

    def pages(self, count: int, shape: Shape) -> LayerPages:
        """Stored keys and values."""
        size = (count, PAGE_SIZE, shape.num_kv_heads, shape.head_dim)
        return LayerPages(self.normal(*size), self.normal(*size))


def near(ours: Tensor, theirs: Tensor) -> float:
    """Share of numbers that differ at most by bfloat16's rounding of a sum."""
    return float(torch.isclose(ours.float(), theirs.float(), rtol=3e-2, atol=3e-2).float().mean())


def attention_case(
    tensors: Tensors, operations: Operations, shape: Shape, groups: Sequence[Sequences]
) -> Case:
    rows = sum(group.count * group.rows for group in groups)
    q, k, v = tensors.heads(rows, shape)
    widest = max(1, *(-(-group.kv_len // PAGE_SIZE) for group in groups))
    sequences = sum(group.count for group in groups)
    pages = tensors.pages(sequences * widest, shape)
    block_tables = torch.randperm(sequences * widest, device=tensors.device).view(sequences, widest)
    block_m = operations.block_m(shape.num_heads, shape.num_kv_heads)
    assert block_m is not None
    flat = flat_layout(groups, block_tables, block_m)
    packed = packed_layout(groups, block_tables)
    ours = functools.partial(operations.packed_attention, q, k, v, flat, pages)
    theirs = functools.partial(TORCH.packed_attention, q, k, v, packed, pages)
    return Case(
        kernel="attention",
        model=shape.name,
        name=", ".join(
            f"{g.count} × {g.rows} rows" + (f" / {g.kv_len} stored" if g.kv_len else "")
            for g in groups
        ),
        cost=arithmetic.attention(shape, groups),
        ours=ours,
        torch=theirs,
        agreement=lambda: near(ours(), theirs()),
        libraries=library_attention(q, k, v, pages, block_tables, groups),
    )


def selection_case(tensors: Tensors, shape: Shape, count: int, candidates: int) -> Case:
    """`count` sequences whose active block is before the last half of the candidates."""
    from dllm_engine.ops.kernels.selection import store_selection as store_by_kernel

    device, keep, length = tensors.device, candidates // 2, candidates + BLOCK
    q, k, v = tensors.heads(count * length, shape)
    num_pages = -(-keep // PAGE_SIZE)
    pages = tensors.pages(count * num_pages, shape)
    block_tables = torch.arange(count * num_pages, device=device).view(count, num_pages)
    begin = candidates // 2

    def column(value: int) -> Tensor:
        return torch.full((count,), value, device=device)

    flat = dataclasses.replace(
        flat_layout([Sequences(count, length)], block_tables, 1),
        selection=FlatSelection(
            column(keep), column(begin), column(begin), column(begin + BLOCK), column(3), candidates
        ),
    )
    rows = torch.arange(count * length, device=device).view(count, length)
    kept = torch.arange(keep, device=device)
    grouped = Selection(
        block_rows=rows[:, begin : begin + BLOCK],
        candidate_rows=torch.cat([rows[:, :begin], rows[:, begin + BLOCK :]], dim=1),
        slot_mapping=block_tables[:, kept // PAGE_SIZE] * PAGE_SIZE + kept % PAGE_SIZE,
        pool_kernel=3,
    )
    ours = functools.partial(store_by_kernel, q, k, v, flat, pages)
    theirs = functools.partial(store_selection, q, k, v, grouped, pages)

    def agreement() -> float:
        # Torch rounds scores to bfloat16, so the two may keep different positions, which shifts
        # all later ones. So kept keys are compared as a set.
        def kept_keys(work: Callable[[], object]) -> Tensor:
            work()
            bits = pages.keys.flatten(0, 1)[grouped.slot_mapping].view(torch.int16).to(torch.int64)
            weights = torch.arange(1, bits.shape[-1] + 1, device=device) ** 5
            return (bits * weights).sum(dim=-1)

        return float(torch.isin(kept_keys(ours), kept_keys(theirs)).float().mean())

    return Case(
        kernel="selection",
        model=shape.name,
        name=f"{count} × {candidates} candidates, half kept",
        cost=arithmetic.selection(
            shape, count=count, candidates=candidates, block=BLOCK, keep=keep
        ),
        ours=ours,
        torch=theirs,
        agreement=agreement,
    )


def rms_norm_case(tensors: Tensors, operations: Operations, shape: Shape, rows: int) -> Case:
    x, weight = tensors.normal(rows, shape.hidden_size), tensors.normal(shape.hidden_size)
    ours = functools.partial(operations.rms_norm, x, weight, 1e-5)
    theirs = functools.partial(TORCH.rms_norm, x, weight, 1e-5)
    return Case(
        kernel="RMSNorm",
        model=shape.name,
        name=f"{rows} rows",
        cost=arithmetic.rms_norm(rows, shape.hidden_size),
        ours=ours,
        torch=theirs,
        agreement=lambda: near(ours(), theirs()),
        libraries={
            "rms_norm": functools.partial(F.rms_norm, x, weight.shape, weight, 1e-5),
        },
    )


def rotary_case(tensors: Tensors, operations: Operations, shape: Shape, rows: int) -> Case:
    heads = shape.num_heads + shape.num_kv_heads
    x = tensors.normal(rows, heads, shape.head_dim)
    table = RotaryTable(
        shape.head_dim, 4096, Rope(theta=5e5), device=tensors.device, dtype=torch.bfloat16
    )
    cos, sin = table.at(torch.arange(rows, device=tensors.device) % 4096)

    def agreement() -> float:  # ours rotates in place
        theirs = TORCH.apply_rotary(x.clone(), cos, sin)
        return near(operations.apply_rotary(x.clone(), cos, sin), theirs)

    return Case(
        kernel="rotary",
        model=shape.name,
        name=f"{rows} rows",
        cost=arithmetic.rotary(rows, heads, shape.head_dim),
        ours=functools.partial(operations.apply_rotary, x, cos, sin),
        torch=functools.partial(TORCH.apply_rotary, x, cos, sin),
        agreement=agreement,
    )


def gate_case(tensors: Tensors, operations: Operations, shape: Shape, rows: int) -> Case:
    gate_up = tensors.normal(rows, 2 * shape.intermediate_size)
    ours = functools.partial(operations.silu_mul, gate_up)
    theirs = functools.partial(TORCH.silu_mul, gate_up)
    return Case(
        kernel="gate",
        model=shape.name,
        name=f"{rows} rows",
        cost=arithmetic.silu_mul(rows, shape.intermediate_size),
        ours=ours,
        torch=theirs,
        agreement=lambda: near(ours(), theirs()),
    )


def head_cases(
    tensors: Tensors, operations: Operations, shape: Shape, counts: Sequence[int]
) -> Iterator[Case]:
    """The language-model head with its statistics: `counts` rows, three kinds each."""
    device = tensors.device
    weight = tensors.normal(shape.vocab_size, shape.hidden_size, scale=0.02)
    by_kernel, by_tiles = Head(weight, operations), Head(weight)
    ids = torch.tensor([shape.vocab_size - 2], device=device)
    for count in counts:
        hidden = tensors.normal(count, shape.hidden_size)
        for kind in ("greedy", "with entropy", "with noise"):
            noisy = kind == "with noise"
            cold = torch.full((count,), 1 / 0.8, device=device)
            options = HeadOptions(
                mask=shape.vocab_size - 1,
                eos=ids,
                stop=ids,
                logits_eos_inf=None,
                confidence_eos_eot_inf=None,
                inverse_temperature=cold if noisy else None,
                keys=torch.arange(count, device=device) << 40 if noisy else None,
                needs_entropy=kind == "with entropy",
            )
            ours = functools.partial(by_kernel.statistics, hidden, options)
            theirs = functools.partial(by_tiles.statistics, hidden, options)
            yield Case(
                kernel="head",
                model=shape.name,
                name=f"{count} rows, {kind}",
                cost=arithmetic.head(shape, count),
                ours=ours,
                torch=theirs,
                agreement=functools.partial(_equally_good, ours, theirs, hidden, weight),
                libraries={"logits materialised": functools.partial(_materialised, hidden, weight)}
                if kind == "greedy"
                else {},
            )


def _equally_good(
    ours: Callable[[], HeadStatistics],
    theirs: Callable[[], HeadStatistics],
    hidden: Tensor,
    weight: Tensor,
) -> float:
    """Share of rows whose token has the best score and the reported logit.

    Tokens may differ: torch rounds logits to bfloat16, which makes many equal.
    """
    mine, other = ours(), theirs()
    logit = (hidden.float() * weight[mine.token].float()).sum(dim=1)
    return min(near(mine.score, other.score), near(mine.logit, logit))


def _materialised(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Best token and its probability from the whole tensor of logits, as in a notebook."""
    logits = F.linear(hidden, weight).float()
    peak, token = logits.max(dim=-1)
    return token, (peak - logits.logsumexp(dim=-1)).exp()
