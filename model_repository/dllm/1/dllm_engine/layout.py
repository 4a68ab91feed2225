"""Which rows a step is made of, and which stored rows they read and write."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from .cache import CachePolicy, KVPages, Phases
from .canvas import CanvasTable
from .ops import FreshGroup, PackedLayout, PagedGroup, Selection

#: Rows of Reuses are grouped by their number rounded up to a multiple of this.
_QUERY_MULTIPLE = 8


@dataclasses.dataclass(frozen=True)
class Sequences:
    """The sequences of a step, in the order of their rows.

    R requests; S sequences, two for a request with guidance; N packed rows. All int64 unless
    said otherwise.
    """

    #: [R]; slots of the requests, and the first sequence of each.
    request_slots: Tensor
    first_copy: Tensor
    #: [S]; slot, and 1 for the unconditional twin.
    slots: Tensor
    twin: Tensor
    phases: Phases
    #: [S]; the window, and how many rows go through the model.
    window_start: Tensor
    window_end: Tensor
    num_rows: Tensor
    #: [S]; stored rows: what `sparse` keeps outside the window, and all that a Reuse attends to.
    keep: Tensor
    held: Tensor
    #: [S, 6]; sequences with equal keys form a group.
    shape: Tensor
    #: [N]; sequence and position of each row.
    owner: Tensor
    positions: Tensor
    #: [S, width]; packed row of each position, where it has one.
    row_of: Tensor

    @classmethod
    def of(cls, table: CanvasTable, pages: KVPages, slots: Tensor) -> Sequences:
        """The sequences of the requests in `slots`, ordered by shape."""
        phases = table.phases(slots)
        start, end = table.window(slots)
        active = table.active(slots, phases)
        num_rows = active.sum(dim=1)
        keep, held = _stored_rows(table, slots, end - start)
        shape = _shape(table, pages, slots, phases, num_rows, keep, held)
        order = torch.unique(shape, dim=0, return_inverse=True)[1].argsort(stable=True)
        # Twins stand right behind their sequence, so that equal shapes stay together.
        copies = 1 + (table.cfg_scale[slots[order]] > 0).to(torch.int64)
        of_request = order.repeat_interleave(copies)
        first_copy = copies.cumsum(0) - copies
        first = first_copy.repeat_interleave(copies)
        active = active[of_request]
        owner, positions = active.nonzero(as_tuple=True)
        return cls(
            request_slots=slots[order],
            first_copy=first_copy,
            slots=slots[of_request],
            twin=torch.arange(len(first), device=slots.device) - first,
            phases=phases.take(of_request),
            window_start=start[of_request],
            window_end=end[of_request],
            num_rows=num_rows[of_request],
            keep=keep[of_request],
            held=held[of_request],
            shape=shape[of_request],
            owner=owner,
            positions=positions,
            row_of=(active.flatten().cumsum(0) - 1).view(active.shape),
        )


def _stored_rows(table: CanvasTable, slots: Tensor, window: Tensor) -> tuple[Tensor, Tensor]:
    """Rows that `sparse` keeps outside the window (else 0), and all that a Reuse attends to."""
    length = table.length[slots]
    candidates = length - window
    kept = (table.retention_ratio[slots] * candidates).to(torch.int64).clamp(min=1)
    sparse = table.cache[slots] == int(CachePolicy.SPARSE)
    keep = torch.where(sparse, torch.minimum(kept, candidates), 0)
    return keep, torch.where(sparse, keep + window, length)


def _shape(
    table: CanvasTable,
    pages: KVPages,
    slots: Tensor,
    phases: Phases,
    num_rows: Tensor,
    keep: Tensor,
    held: Tensor,
) -> Tensor:
    """[R, 6] int64; what must be equal for two sequences to share a kernel call.

    Of a Refresh: 0, length and, where it selects, block, window, kept rows and pooling. Of a
    Reuse: 1, rows rounded up, pages, and whether the last page is full.
    """
    start, end = table.window(slots)
    selecting = [end - table.block_start[slots], end - start, keep, table.pool_kernel[slots]]
    zero = torch.zeros_like(slots)
    fresh = [table.length[slots], *(torch.where(phases.selects, x, zero) for x in selecting)]
    paged = [
        -(-num_rows // _QUERY_MULTIPLE) * _QUERY_MULTIPLE,
        -(-held // pages.page_size),
        (held % pages.page_size == 0).to(torch.int64),
        zero,
        zero,
    ]
    merged = torch.where(phases.refresh, torch.stack(fresh), torch.stack(paged))
    return torch.cat([(~phases.refresh).to(torch.int64).unsqueeze(0), merged]).T


def build_layout(pages: KVPages, sequences: Sequences) -> PackedLayout:
    """Group the sequences by shape and say where each row is stored."""
    starts = sequences.num_rows.cumsum(0) - sequences.num_rows
    shapes, counts = torch.unique_consecutive(sequences.shape, dim=0, return_counts=True)
    sizes = torch.stack([counts, starts[counts.cumsum(0) - counts]], dim=1)
    fresh, paged = [], []
    first = 0
    for (reuse, *shape), (count, row) in zip(shapes.tolist(), sizes.tolist(), strict=True):
        members = torch.arange(first, first + count, device=starts.device)
        if reuse:
            paged.append(_paged_group(pages, sequences, members, row, starts, shape))
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
    phases, owner = sequences.phases, sequences.owner
    stores = ~phases.refresh | (phases.store & ~phases.selects)
    rows = stores[owner].nonzero().squeeze(1)
    owner, position = owner[rows], sequences.positions[rows]
    # Of a sparse request the window stands behind what is kept, of others all in its place.
    sparse = phases.policy[owner] == int(CachePolicy.SPARSE)
    behind = sequences.keep[owner] + position - sequences.window_start[owner]
    row = torch.where(sparse, behind, position)
    return rows, pages.places(sequences.slots[owner], sequences.twin[owner], row)


def _paged_group(
    pages: KVPages,
    sequences: Sequences,
    members: Tensor,
    first_row: int,
    starts: Tensor,
    shape: list[int],
) -> PagedGroup:
    width, num_pages, full = shape[:3]
    columns = torch.arange(width, device=members.device)
    num_rows = sequences.num_rows[members].unsqueeze(1)
    slots = sequences.slots[members]
    held = None
    if not full:
        places = torch.arange(num_pages * pages.page_size, device=members.device)
        held = (places < sequences.held[members].unsqueeze(1))[:, None, None, :]
    kept = (columns < num_rows).flatten().nonzero().squeeze(1)
    return PagedGroup(
        query_rows=starts[members].unsqueeze(1) + torch.minimum(columns, num_rows - 1),
        kept=None if len(kept) == width * len(members) else kept,
        rows=slice(first_row, first_row + len(kept)),
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
    row_of = sequences.row_of[members]
    kept = torch.arange(keep, device=members.device).expand(len(members), -1)
    return Selection(
        block_rows=row_of.gather(1, blocks),
        candidate_rows=row_of.gather(1, candidates),
        places=pages.places(sequences.slots[members, None], sequences.twin[members, None], kept),
        pool_kernel=pool_kernel,
    )
