"""Makes one step's layout in both forms from groups of sequences; see `gpu_cases`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from dllm_engine.ops.layout import FlatLayout, FreshGroup, PackedLayout, PagedGroup
from torch import Tensor

from benchmarks.gpu_arithmetic import Sequences

#: Rows of keys and values per page: the engine's default.
PAGE_SIZE = 32


def flat_layout(groups: Sequence[Sequences], block_tables: Tensor, block_m: int) -> FlatLayout:
    """Flat layout of sequences in this order; a Reuse's rows are the last ones in its pages."""
    device = block_tables.device
    lengths = [group.rows for group in groups for _ in range(group.count)]
    kv_lens = torch.tensor([g.kv_len for g in groups for _ in range(g.count)], device=device)
    plain = FlatLayout.of(lengths, block_m, str(device))
    counts, starts = plain.query_lens, plain.query_starts
    owner = torch.arange(len(counts), device=device).repeat_interleave(counts)
    place = (kv_lens - counts - starts)[owner] + torch.arange(len(owner), device=device)
    page = block_tables[owner, place.clamp(min=0) // PAGE_SIZE]
    places = torch.where(kv_lens[owner] > 0, page * PAGE_SIZE + place % PAGE_SIZE, -1)
    return dataclasses.replace(
        plain, kv_lens=kv_lens, block_tables=block_tables, slot_mapping=places
    )


def packed_layout(groups: Sequence[Sequences], block_tables: Tensor) -> PackedLayout:
    """Packed layout for torch's operations; all pages that are read are full."""
    fresh, paged = [], []
    row = sequence = 0
    for group in groups:
        rows = slice(row, row + group.count * group.rows)
        if group.kv_len:
            assert group.kv_len % PAGE_SIZE == 0
            members = block_tables[sequence : sequence + group.count, : group.kv_len // PAGE_SIZE]
            inside = torch.arange(rows.start, rows.stop, device=block_tables.device)
            inside = inside.view(group.count, -1)
            paged.append(PagedGroup(inside, inside, members, None))
        else:
            fresh.append(FreshGroup(row, group.count, group.rows))
        row, sequence = rows.stop, sequence + group.count
    places = flat_layout(groups, block_tables, 1).slot_mapping
    assert places is not None
    stored = (places >= 0).nonzero().squeeze(1)
    layout = PackedLayout(row, tuple(fresh), tuple(paged))
    if not len(stored):
        return layout
    return dataclasses.replace(layout, write_rows=stored, slot_mapping=places[stored])
