"""Packs the sequences of one step into rows, without padding between them."""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

from .canvas import CanvasTable
from .ops import PackedLayout
from .sampling.commit import CommitPlan
from .sampling.rows import ROW_MULTIPLE, RowSampling


@dataclasses.dataclass(frozen=True)
class StepBatch:
    """Everything one step needs, as tensors; R requests, M masked positions in active blocks."""

    #: [R] int64, ordered by length.
    slots: Tensor
    #: [rows] int64; inputs of the model, padded to a multiple of `ROW_MULTIPLE`.
    input_ids: Tensor
    positions: Tensor
    layout: PackedLayout
    #: [R, block] int64 and bool: positions of the active blocks, and which are masked.
    block_positions: Tensor
    block_masked: Tensor
    #: [M] int64: packed row whose hidden state predicts each masked position.
    rows: Tensor
    #: [M] int64: packed row of its unconditional twin; equal to `rows` without guidance.
    uncond_rows: Tensor
    #: [M] cfg_scale of each, or None when no request has guidance.
    cfg_scale: Tensor | None
    sampling: RowSampling
    plan: CommitPlan
    #: Whether any request needs entropies or margins.
    needs_spread: bool


def build_batch(table: CanvasTable, chosen: list[int], *, shifted: bool) -> StepBatch:
    """Lay out one step of the requests in these slots.

    A request with guidance contributes its sequence twice, the second time with everything it
    came with replaced by masks (LLaDA, generate.py: `un_x`). With `shifted`, a position is
    predicted from the one before it, the first from itself (Dream).
    """
    slots = torch.tensor(chosen, device=table.device)
    slots = slots[table.length[slots].argsort(stable=True)]
    guided = table.cfg_scale[slots] > 0
    # Twins stand right behind their sequence, so that equal lengths stay together.
    copies = 1 + guided.to(torch.int64)
    owner = torch.repeat_interleave(torch.arange(len(slots), device=slots.device), copies)
    first_copy = copies.cumsum(0) - copies
    is_twin = torch.arange(len(owner), device=slots.device) != first_copy[owner]
    input_ids, positions, starts, layout = _pack(table, slots[owner], is_twin)

    block_positions, block_masked = table.block_positions(slots)
    request, column = block_masked.nonzero(as_tuple=True)
    position = block_positions[request, column]
    predictor = (position - 1).clamp(min=0) if shifted else position
    twin = first_copy[request] + guided[request].to(torch.int64)
    request_slots = slots[request]
    return StepBatch(
        slots=slots,
        input_ids=input_ids,
        positions=positions,
        layout=layout,
        block_positions=block_positions,
        block_masked=block_masked,
        rows=starts[first_copy[request]] + predictor,
        uncond_rows=starts[twin] + predictor,
        cfg_scale=table.cfg_scale[request_slots] if bool(guided.any()) else None,
        sampling=RowSampling(
            temperature=table.temperature[request_slots],
            seed=table.seed[request_slots],
            step=table.step[request_slots],
            position=position,
            top_p=table.top_p[request_slots],
            top_k=table.top_k[request_slots],
            tempered=table.tempered[request_slots],
            no_eos=table.no_eos[request_slots],
            late_eos=table.late_eos[request_slots],
        ),
        plan=_plan(table, chosen, slots, block_masked),
        needs_spread=table.needs_spread(chosen),
    )


def _plan(table: CanvasTable, chosen: list[int], slots: Tensor, block_masked: Tensor) -> CommitPlan:
    count, chance = table.commit_counts(slots, block_masked)
    return CommitPlan(
        score=table.score[slots],
        rule=table.rule[slots],
        rules_in_use=table.rules_in_use(chosen),
        count=count,
        chance=chance,
        bound=table.bound[slots],
        second_bound=table.second_bound[slots],
        alg_temp=table.alg_temp[slots],
        seed=table.seed[slots],
        step=table.step[slots],
        block_start=table.block_start[slots],
    )


def _pack(
    table: CanvasTable, slots: Tensor, is_twin: Tensor
) -> tuple[Tensor, Tensor, Tensor, PackedLayout]:
    """Input ids and positions [rows], first row of each sequence, and their layout."""
    lengths = table.length[slots]
    starts = lengths.cumsum(0) - lengths
    sequence = torch.repeat_interleave(torch.arange(len(slots), device=slots.device), lengths)
    positions = torch.arange(len(sequence), device=slots.device) - starts[sequence]
    row_slots = slots[sequence]
    ids = table.tokens[row_slots, positions]
    hidden_prompt = is_twin[sequence] & table.given[row_slots, positions]
    ids = ids.masked_fill(hidden_prompt, table.special.mask)
    missing = -len(ids) % ROW_MULTIPLE
    layout = PackedLayout.of(lengths.tolist())
    return F.pad(ids, (0, missing)), F.pad(positions, (0, missing)), starts, layout
