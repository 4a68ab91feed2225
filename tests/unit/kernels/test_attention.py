"""The attention kernel equals float64 softmax attention, sequence by sequence."""

import dataclasses

import torch
from dllm_engine.ops.kernels.attention import packed_attention
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.support.budget import examples
from tests.unit.kernels.cases import DEVICE, HEADS, Heads, Sequence, Step, near

SEQUENCES = st.lists(
    st.builds(Sequence, rows=st.integers(1, 40), kv_len=st.just(0) | st.integers(1, 90)),
    min_size=1,
    max_size=4,
)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Plain attention of [rows, heads, head_dim] to [keys, num_kv_heads, head_dim]."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1).double() for x in (k, v))
    scores = torch.einsum("rhd,khd->hrk", q.double(), k) / q.shape[2] ** 0.5
    return torch.einsum("hrk,khd->rhd", scores.softmax(dim=-1), v)


@given(HEADS, SEQUENCES, st.integers(0, 2**31))
@settings(max_examples=examples(25))
def test_every_sequence_attends_to_its_own(
    heads: Heads, sequences: list[Sequence], seed: int
) -> None:
    """One launch handles fresh and stored sequences of any lengths; padding rows return zeros."""
    step = Step(heads, sequences, seed)
    found = packed_attention(step.q, step.k, step.v, step.layout(), step.pages)
    wanted, start = [], 0
    for index, sequence in enumerate(sequences):
        rows = slice(start, start + sequence.rows)
        keys, values = step.stored(index) if sequence.kv_len else (step.k[rows], step.v[rows])
        wanted.append(attend(step.q[rows], keys, values))
        start += sequence.rows
    wanted.append(torch.zeros(3, *step.q.shape[1:], device=DEVICE))
    near(found, torch.cat([part.double() for part in wanted]).flatten(1), heads.dtype)


@given(HEADS, st.integers(1, 20), st.integers(0, 2**31))
@settings(max_examples=examples(10))
def test_rows_are_stored_before_they_are_read(heads: Heads, rows: int, seed: int) -> None:
    """A Reuse attends to its fresh rows in its pages; rows with −1 in the slot mapping are not
    stored."""
    step = Step(heads, [Sequence(rows, kv_len=rows), Sequence(5)], seed)
    page = step.block_tables[0][torch.arange(rows, device=DEVICE) // heads.page_size]
    places = page * heads.page_size + torch.arange(rows, device=DEVICE) % heads.page_size
    places = torch.cat([places, torch.full((5,), -1, device=DEVICE)])
    before = step.pages.keys.clone(), step.pages.values.clone()
    found = packed_attention(step.q, step.k, step.v, step.layout(places), step.pages)
    mine = slice(0, rows)
    near(found[mine], attend(step.q[mine], step.k[mine], step.v[mine]).flatten(1), heads.dtype)
    for pool, old, fresh in zip(
        (step.pages.keys, step.pages.values), before, (step.k, step.v), strict=True
    ):
        expected = old.flatten(0, 1).index_copy(0, places[mine], fresh[mine])
        assert torch.equal(pool.flatten(0, 1), expected)


@given(HEADS, SEQUENCES, st.integers(0, 2**31))
@settings(max_examples=examples(15))
def test_a_row_sees_no_key_behind_its_limit(
    heads: Heads, sequences: list[Sequence], seed: int
) -> None:
    """Each row attends to as many fresh or stored keys of its sequence as its limit says."""
    step = Step(heads, sequences, seed)
    generator = torch.Generator().manual_seed(seed)
    limits = [
        torch.randint(1, (s.kv_len or s.rows) + 1, (s.rows,), generator=generator)
        for s in sequences
    ]
    layout = dataclasses.replace(step.layout(), key_limits=torch.cat(limits).to(DEVICE))
    found = packed_attention(step.q, step.k, step.v, layout, step.pages)
    start = 0
    for index, sequence in enumerate(sequences):
        rows = slice(start, start + sequence.rows)
        keys, values = step.stored(index) if sequence.kv_len else (step.k[rows], step.v[rows])
        for row, limit in enumerate(limits[index].tolist(), start):
            wanted = attend(step.q[row : row + 1], keys[:limit], values[:limit])
            near(found[row : row + 1], wanted.flatten(1), heads.dtype)
        start += sequence.rows


def test_a_sequence_has_the_same_result_in_any_company() -> None:
    """A sequence has bitwise the same result alone and in a batch."""
    heads = Heads(num_kv_heads=2, group=2, head_dim=16, page_size=8, dtype=torch.float32)
    alone = Step(heads, [Sequence(33)], seed=1)
    company = Step(heads, [Sequence(7, kv_len=50), Sequence(33), Sequence(70)], seed=2)
    rows = slice(7, 40)
    for mine, theirs in ((alone.q, company.q), (alone.k, company.k), (alone.v, company.v)):
        theirs[rows] = mine[:33]
    first = packed_attention(alone.q, alone.k, alone.v, alone.layout(), alone.pages)
    second = packed_attention(company.q, company.k, company.v, company.layout(), company.pages)
    assert torch.equal(first[:33], second[rows])
