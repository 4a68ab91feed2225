"""Every decoding rule equals its plain definition on random blocks."""

import torch
from dllm_engine.sampling import rules
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.support import rules as plain

#: Few distinct values, so that ties and equality with thresholds occur; exact in float32.
PROBABILITIES = st.sampled_from([i / 16 for i in range(17)])
ENTROPIES = st.sampled_from([i / 8 for i in range(17)])
Block = tuple[list[float], list[bool]]


@st.composite
def matrices(draw: st.DrawFn, values: st.SearchStrategy[float]) -> list[Block]:
    """Random blocks of one width: values and masks."""
    width = draw(st.integers(1, 12))
    row = st.tuples(
        st.lists(values, min_size=width, max_size=width),
        st.lists(st.booleans(), min_size=width, max_size=width),
    )
    return draw(st.lists(row, min_size=1, max_size=4))


def tensors(blocks: list[Block]) -> tuple[Tensor, Tensor]:
    """float32 values and masks, [R, block]."""
    return torch.tensor([b[0] for b in blocks]), torch.tensor([b[1] for b in blocks])


def per_row(values: list[float], rows: int) -> tuple[list[float], Tensor]:
    """One parameter per row, cycling through `values`."""
    cycled = [values[i % len(values)] for i in range(rows)]
    return cycled, torch.tensor(cycled, dtype=torch.float64)


def positions(chosen: Tensor) -> list[set[int]]:
    """Columns committed in each row."""
    return [set(row.nonzero().flatten().tolist()) for row in chosen]


@given(matrices(PROBABILITIES), st.lists(st.integers(0, 13), min_size=1, max_size=4))
def test_fixed_count(blocks: list[Block], counts: list[int]) -> None:
    """The rule commits the schedule's count of best positions."""
    score, masked = tensors(blocks)
    cycled = [counts[i % len(counts)] for i in range(len(blocks))]
    chosen = rules.fixed_count(score, masked, torch.tensor(cycled))
    assert positions(chosen) == [
        plain.fixed_count(*b, n) for b, n in zip(blocks, cycled, strict=True)
    ]


@given(matrices(PROBABILITIES), st.lists(PROBABILITIES, min_size=1, max_size=4))
def test_threshold(blocks: list[Block], taus: list[float]) -> None:
    """The rule commits every position at or above the threshold, and the best."""
    score, masked = tensors(blocks)
    cycled, tau = per_row(taus, len(blocks))
    chosen = rules.threshold(score, masked, tau)
    assert positions(chosen) == [
        plain.threshold(*b, t) for b, t in zip(blocks, cycled, strict=True)
    ]


@given(matrices(PROBABILITIES), st.lists(st.sampled_from([0.0, 0.5, 1.0, 1.5]), min_size=1))
def test_factor(blocks: list[Block], factors: list[float]) -> None:
    """The rule commits Fast-dLLM's longest run above its falling bound."""
    score, masked = tensors(blocks)
    score = score.to(torch.float64)
    cycled, f = per_row(factors, len(blocks))
    chosen = rules.factor(score, masked, f)
    assert positions(chosen) == [plain.factor(*b, x) for b, x in zip(blocks, cycled, strict=True)]


@given(matrices(ENTROPIES), st.lists(ENTROPIES, min_size=1, max_size=4))
def test_entropy_bound(blocks: list[Block], gammas: list[float]) -> None:
    """The rule applies EB-sampler's bound to the entropies before each position."""
    entropy, masked = tensors(blocks)
    cycled, gamma = per_row(gammas, len(blocks))
    chosen = rules.entropy_bound(entropy, masked, gamma)
    assert positions(chosen) == [
        plain.entropy_bound(*b, g) for b, g in zip(blocks, cycled, strict=True)
    ]


@given(matrices(PROBABILITIES), PROBABILITIES, PROBABILITIES)
def test_hierarchical(blocks: list[Block], low: float, tau: float) -> None:
    """The rule commits dInfer's best position of each run of masks."""
    score, masked = tensors(blocks)
    lows, taus = per_row([low], len(blocks))[1], per_row([tau], len(blocks))[1]
    chosen = rules.hierarchical(score, masked, lows, taus)
    assert positions(chosen) == [plain.hierarchical(*b, low, tau) for b in blocks]


@given(matrices(PROBABILITIES), st.integers(0, 4), PROBABILITIES, PROBABILITIES, st.data())
def test_local_leap(
    blocks: list[Block], count: int, anchor: float, neighbour: float, data: st.DataObject
) -> None:
    """The rule commits fairly sure neighbours of sure positions that are committed now or
    earlier."""
    score, masked = tensors(blocks)
    width = score.shape[1]
    committed = [
        [-1.0 if open_ else data.draw(PROBABILITIES) for open_ in block[1]] for block in blocks
    ]
    rows = len(blocks)
    chosen = rules.local_leap(
        rules.fixed_count(score, masked, torch.full((rows,), count)),
        score,
        torch.tensor(committed).view(rows, width),
        masked,
        per_row([anchor], rows)[1],
        per_row([neighbour], rows)[1],
    )
    assert positions(chosen) == [
        plain.local_leap(*block, before, count, anchor, neighbour)
        for block, before in zip(blocks, committed, strict=True)
    ]
