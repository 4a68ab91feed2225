"""Which rows a step is made of, and which stored rows they read and write."""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

from .cache import LEAST_KEPT, CachePolicy, KVPages, Phases
from .canvas import CanvasTable
from .ops import FlatLayout, FlatSelection, FreshGroup, PackedLayout, PagedGroup, Selection
from .ops.layout import tiles_of
from .sampling.rows import ROW_MULTIPLE
from .slot_facts import SlotFacts
from .slot_state import SlotState

#: Rows of Reuses are grouped by their number rounded up to a multiple of this.
_QUERY_MULTIPLE = 8


@dataclasses.dataclass(frozen=True)
class StepSize:
    """How large a step is, as the host knows it."""

    sequences: int
    #: Packed rows of all sequences.
    rows: int
    #: Tokens of the longest sequence, and of the longest block.
    longest: int
    block: int
    #: Whether any sequence may store a selection of its keys and values, and whether any is the
    #: twin of another.
    selects: bool
    guided: bool

    @classmethod
    def of(cls, facts: list[SlotFacts]) -> StepSize:
        """Of a step of these requests."""
        return cls(
            sequences=sum(fact.sequences for fact in facts),
            rows=sum(fact.rows * fact.sequences for fact in facts),
            longest=max(fact.length for fact in facts),
            block=max(fact.block_length for fact in facts),
            selects=any(fact.sparse and fact.refresh for fact in facts),
            guided=any(fact.guided for fact in facts),
        )


@dataclasses.dataclass(frozen=True)
class Sequences:
    """The sequences of a step, in the order of their rows.

    R requests; S sequences, two for a request with guidance; N packed rows. All int64 unless
    said otherwise.
    """

    #: Of the R requests; and [R], the first sequence of each.
    requests: SlotState
    first_copy: Tensor
    #: Of the S sequences; and [S], 1 for the unconditional twin.
    state: SlotState
    twin: Tensor
    phases: Phases
    #: [S]; the window, and how many rows go through the model.
    window_start: Tensor
    window_end: Tensor
    num_rows: Tensor
    #: [S]; stored rows: what `sparse` keeps outside the window, and all that a Reuse attends to.
    keep: Tensor
    held: Tensor
    #: [S, 6]; sequences with equal keys form a group; None: they are not grouped.
    shape: Tensor | None
    #: [N]; sequence and position of each row.
    owner: Tensor
    positions: Tensor
    #: [S, width]; packed row of each position, where it has one.
    row_of: Tensor

    @classmethod
    def of(
        cls, table: CanvasTable, pages: KVPages, state: SlotState, size: StepSize, *, grouped: bool
    ) -> Sequences:
        """The sequences of some requests, ordered by shape where they are grouped."""
        phases = table.phases(state)
        start, end = table.window(state)
        active = table.active(state, phases, size.longest)
        num_rows = active.sum(dim=1)
        keep, held = _stored_rows(state, end - start)
        order = torch.arange(len(active), device=active.device)
        shape = None
        if grouped:
            shape = _shape(pages, state, phases, start, num_rows, keep, held)
            order = torch.unique(shape, dim=0, return_inverse=True)[1].argsort(stable=True)
            state = state.take(order)
        of_request = first = order
        first_copy = torch.arange(len(active), device=active.device)
        sequences = state
        if size.guided:
            # Twins stand right behind their sequence, so that equal shapes stay together.
            copies = 1 + (state.cfg_scale > 0).to(torch.int64)
            first_copy = copies.cumsum(0) - copies
            which = torch.repeat_interleave(copies, output_size=size.sequences)
            of_request, first = order[which], first_copy[which]
            sequences = state.take(which)
        active = active[of_request]
        owner, positions = torch.nonzero_static(active, size=size.rows).unbind(1)
        numbers = torch.arange(len(active), device=active.device)
        return cls(
            requests=state,
            first_copy=first_copy,
            state=sequences,
            twin=numbers - first if size.guided else torch.zeros_like(numbers),
            phases=phases.take(of_request),
            window_start=start[of_request],
            window_end=end[of_request],
            num_rows=num_rows[of_request],
            keep=keep[of_request],
            held=held[of_request],
            shape=None if shape is None else shape[of_request],
            owner=owner,
            positions=positions,
            row_of=(active.flatten().cumsum(0) - 1).view(active.shape),
        )

    @property
    def row_starts(self) -> Tensor:
        """[S]; first packed row."""
        return self.num_rows.cumsum(0) - self.num_rows

    def stores(self) -> Tensor:
        """[S] bool; whether the rows that go through the model are stored as they are."""
        return ~self.phases.refresh | (self.phases.store & ~self.phases.selects)

    def stored_row(self, owner: Tensor, position: Tensor) -> Tensor:
        """Which of a sequence's stored rows takes the one at `position`, where any does; [n].

        Of a sparse request the window stands behind what is kept, of others all in its place.
        """
        sparse = self.phases.policy[owner] == int(CachePolicy.SPARSE)
        behind = self.keep[owner] + position - self.window_start[owner]
        return torch.where(sparse, behind, position)


def _stored_rows(state: SlotState, window: Tensor) -> tuple[Tensor, Tensor]:
    """Rows that `sparse` keeps outside the window (else 0), and all that a Reuse attends to."""
    candidates = state.length - window
    kept = (state.retention_ratio * candidates).to(torch.int64).clamp(min=LEAST_KEPT)
    sparse = state.cache == int(CachePolicy.SPARSE)
    keep = torch.where(sparse, torch.minimum(kept, candidates), 0)
    return keep, torch.where(sparse, keep + window, state.length)


def _shape(
    pages: KVPages,
    state: SlotState,
    phases: Phases,
    window_start: Tensor,
    num_rows: Tensor,
    keep: Tensor,
    held: Tensor,
) -> Tensor:
    """[R, 6] int64; what must be equal for two sequences to share a kernel call.

    Of a Refresh: 0, length and, where it selects, block, window, kept rows and pooling. Of a
    Reuse: 1, rows rounded up, pages, and whether the last page is full.
    """
    end, zero = state.block_end, torch.zeros_like(keep)
    selecting = torch.stack([end - state.block_start, end - window_start, keep, state.pool_kernel])
    fresh = torch.cat([state.length.unsqueeze(0), torch.where(phases.selects, selecting, 0)])
    paged = torch.stack(
        [
            -(-num_rows // _QUERY_MULTIPLE) * _QUERY_MULTIPLE,
            -(-held // pages.page_size),
            (held % pages.page_size == 0).to(torch.int64),
            zero,
            zero,
        ]
    )
    merged = torch.where(phases.refresh, fresh, paged)
    return torch.cat([(~phases.refresh).to(torch.int64).unsqueeze(0), merged]).T


def flat_layout(pages: KVPages, sequences: Sequences, size: StepSize, tile_rows: int) -> FlatLayout:
    """One entry per sequence and tile; nothing of it needs an answer from the device."""
    refresh, owner = sequences.phases.refresh, sequences.owner
    num_pages = -(-size.longest // pages.page_size)
    row = sequences.stored_row(owner, sequences.positions).clamp(min=0)
    places = pages.places(sequences.state.slots[owner], sequences.twin[owner], row)
    places = torch.where(sequences.stores()[owner], places, -1)
    tile_sequence, tile_row = tiles_of(sequences.num_rows, size.rows, tile_rows)
    selection = None
    if size.selects:
        selection = FlatSelection(
            keep=torch.where(sequences.phases.selects, sequences.keep, 0),
            block_start=sequences.state.block_start,
            window_start=sequences.window_start,
            window_end=sequences.window_end,
            pool_kernel=sequences.state.pool_kernel,
            max_candidates=size.longest,
        )
    return FlatLayout(
        tile_rows=tile_rows,
        row_starts=sequences.row_starts,
        row_counts=sequences.num_rows,
        held=torch.where(refresh, 0, sequences.held),
        tables=pages.table[sequences.state.slots, sequences.twin, :num_pages],
        tile_sequence=tile_sequence,
        tile_row=tile_row,
        write_places=F.pad(places, (0, -size.rows % ROW_MULTIPLE), value=-1),
        selection=selection,
    )


def grouped_layout(pages: KVPages, sequences: Sequences) -> PackedLayout:
    """Group the sequences by shape and say where each row is stored."""
    assert sequences.shape is not None
    starts = sequences.row_starts
    shapes, counts = torch.unique_consecutive(sequences.shape, dim=0, return_counts=True)
    sizes = torch.stack([counts, starts[counts.cumsum(0) - counts]], dim=1)
    fresh, paged = [], []
    first = 0
    for (reuse, *shape), (count, row) in zip(shapes.tolist(), sizes.tolist(), strict=True):
        members = torch.arange(first, first + count, device=starts.device)
        if reuse:
            paged.append(_paged_group(pages, sequences, members, starts, shape))
        else:
            select = shape[3] > 0
            selection = _selection(pages, sequences, members, shape) if select else None
            fresh.append(FreshGroup(row, count, shape[0], selection))
        first += count
    rows, places = _writes(pages, sequences)
    layout = PackedLayout(len(sequences.owner), tuple(fresh), tuple(paged))
    if not len(rows):
        return layout
    return dataclasses.replace(layout, write_rows=rows, write_places=places)


def _writes(pages: KVPages, sequences: Sequences) -> tuple[Tensor, Tensor]:
    """Packed rows that are stored as they are, and their places in the pool; both [n]."""
    rows = sequences.stores()[sequences.owner].nonzero().squeeze(1)
    owner = sequences.owner[rows]
    row = sequences.stored_row(owner, sequences.positions[rows])
    return rows, pages.places(sequences.state.slots[owner], sequences.twin[owner], row)


def _paged_group(
    pages: KVPages,
    sequences: Sequences,
    members: Tensor,
    starts: Tensor,
    shape: list[int],
) -> PagedGroup:
    width, num_pages, full = shape[:3]
    columns = torch.arange(width, device=members.device)
    first, num_rows = starts[members].unsqueeze(1), sequences.num_rows[members].unsqueeze(1)
    slots = sequences.state.slots[members]
    held = None
    if not full:
        places = torch.arange(num_pages * pages.page_size, device=members.device)
        held = (places < sequences.held[members].unsqueeze(1))[:, None, None, :]
    return PagedGroup(
        query_rows=first + torch.minimum(columns, num_rows - 1),
        out_rows=torch.where(columns < num_rows, first + columns, len(sequences.owner)),
        pages=pages.table[slots, sequences.twin[members], :num_pages],
        held=held,
    )


def _selection(
    pages: KVPages, sequences: Sequences, members: Tensor, shape: list[int]
) -> Selection:
    length, block, window, keep, pool_kernel = shape
    start, end = sequences.window_start[members, None], sequences.window_end[members, None]
    columns = torch.arange(length - window, device=members.device)
    candidates = torch.where(columns < start, columns, columns + window)
    blocks = end - block + torch.arange(block, device=members.device)
    row_of, slots = sequences.row_of[members], sequences.state.slots[members]
    kept = torch.arange(keep, device=members.device).expand(len(members), -1)
    return Selection(
        block_rows=row_of.gather(1, blocks),
        candidate_rows=row_of.gather(1, candidates),
        places=pages.places(slots[:, None], sequences.twin[members, None], kept),
        pool_kernel=pool_kernel,
    )
