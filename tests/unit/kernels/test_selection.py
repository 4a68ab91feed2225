"""The selection kernels equal `select_positions`."""

import torch
from dllm_engine.ops.kernels.selection import score_positions, store_best
from dllm_engine.ops.layout import FlatSelection
from dllm_engine.ops.selection import position_scores
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.support.budget import examples
from tests.unit.kernels.cases import DEVICE, HEADS, Heads, Sequence, Step, near


def selection_of(
    lengths: list[int], windows: list[tuple[int, int, int]], keep: list[int], pool: list[int]
) -> FlatSelection:
    """A selection with windows (first position, first of the block, end)."""

    def column(values: list[int]) -> Tensor:
        return torch.tensor(values, device=DEVICE)

    begins, blocks, ends = (list(x) for x in zip(*windows, strict=True))
    most = max(n - end + begin for n, begin, end in zip(lengths, begins, ends, strict=True))
    return FlatSelection(
        column(keep), column(blocks), column(begins), column(ends), column(pool), most
    )


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[int], FlatSelection]:
    """Sequences with windows that leave candidates on one side or both."""
    lengths = draw(st.lists(st.integers(2, 80), min_size=1, max_size=3))
    windows, keep, pool = [], [], []
    for length in lengths:
        begin = draw(st.integers(0, length - 1))
        end = draw(st.integers(begin + 1, length if begin else length - 1))
        windows.append((begin, draw(st.integers(begin, end - 1)), end))
        keep.append(draw(st.integers(0, length - (end - begin))))
        pool.append(draw(st.sampled_from([1, 3, 5])))
    return lengths, selection_of(lengths, windows, keep, pool)


def candidates_of(length: int, selection: FlatSelection, index: int) -> Tensor:
    """Positions outside the window."""
    positions = torch.arange(length, device=DEVICE)
    begin, end = selection.window_start[index], selection.window_end[index]
    return positions[(positions < begin) | (positions >= end)]


@given(HEADS, cases(), st.integers(0, 2**31))
@settings(max_examples=examples(15))
def test_scores(heads: Heads, case: tuple[list[int], FlatSelection], seed: int) -> None:
    """A score is log Σ exp over the block's queries, and the best over the query heads of a KV
    head."""
    lengths, selection = case
    step = Step(heads, [Sequence(n) for n in lengths], seed)
    found = score_positions(step.q, step.k, step.layout(), selection)
    start = 0
    for i, length in enumerate(lengths):
        if selection.keep[i]:
            block = slice(
                start + int(selection.block_start[i]), start + int(selection.window_end[i])
            )
            candidates = start + candidates_of(length, selection, i)
            wanted = position_scores(step.q[block].float(), step.k[candidates].float())
            near(found[i, :, : len(candidates)], wanted, heads.dtype)
        start += length


@given(HEADS, cases(), st.integers(0, 2**31))
@settings(max_examples=examples(25))
def test_best_are_stored(heads: Heads, case: tuple[list[int], FlatSelection], seed: int) -> None:
    """The kept candidates are stored in ascending order, the leftmost of equal ones, and nothing
    else is written."""
    lengths, selection = case
    step = Step(heads, [Sequence(n) for n in lengths], seed)
    generator = torch.Generator().manual_seed(seed)
    shape = (len(lengths), heads.num_kv_heads, selection.max_candidates)
    scores = torch.randint(-3, 3, shape, generator=generator).float().to(DEVICE)
    scores = torch.where(scores == 0, -scores, scores)  # zeros of both signs are equal
    expected = step.pages.keys.clone(), step.pages.values.clone()
    start = 0
    for i, length in enumerate(lengths):
        candidates = candidates_of(length, selection, i)
        reach, keep = int(selection.pool_kernel[i]) // 2, int(selection.keep[i])
        for head in range(heads.num_kv_heads):
            row = scores[i, head, : len(candidates)].tolist()
            pooled = [max(row[max(0, c - reach) : c + reach + 1]) for c in range(len(row))]
            best = sorted(sorted(range(len(row)), key=lambda c: -pooled[c])[:keep])
            for place, candidate in enumerate(best):
                page, line = step.block_tables[i, place // heads.page_size], place % heads.page_size
                source = start + candidates[candidate]
                for pool, fresh in zip(expected, (step.k, step.v), strict=True):
                    pool[page, line, head] = fresh[source, head]
        start += length
    store_best(scores, step.k, step.v, step.layout(), selection, step.pages)
    assert torch.equal(step.pages.keys, expected[0])
    assert torch.equal(step.pages.values, expected[1])
