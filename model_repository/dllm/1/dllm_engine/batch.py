"""Packs the sequences of one step into rows, without padding between them."""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

from .cache import KVPages
from .canvas import CanvasTable
from .layout import Sequences, StepSize, flat_layout, grouped_layout
from .ops import Layout, upload
from .sampling import CommitPlan, Credits, RowSampling, SamplingFlags
from .sampling.rows import ROW_MULTIPLE
from .slot_facts import SlotFacts


@dataclasses.dataclass(frozen=True)
class StepBatch:
    """Everything one step needs, as tensors; R requests, M masked positions in active blocks."""

    #: [R] int64, ordered as the rows are.
    slots: Tensor
    #: [rows] int64; inputs of the model, padded to a multiple of `ROW_MULTIPLE`.
    input_ids: Tensor
    positions: Tensor
    layout: Layout
    #: [R, block] int64 and bool: positions of the active blocks, and which are masked.
    block_positions: Tensor
    block_masked: Tensor
    #: [M] int64: where each masked position stands in these, in row-major order.
    request: Tensor
    column: Tensor
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
    #: Credit of the M positions, or None where no request uses it.
    credits: Credits | None


def build_batch(
    table: CanvasTable, pages: KVPages, chosen: list[int], tile_rows: int | None = None
) -> StepBatch:
    """Lay out one step of the requests in these slots.

    A request with guidance contributes its sequence twice, the second time with everything it
    came with replaced by masks (LLaDA, generate.py: `un_x`). Where the model is shifted, a
    position is predicted from the one before it, the first from itself (Dream).

    Args:
        tile_rows: rows per tile of a flat layout; None: sequences are grouped by shape. A flat
            layout is made without waiting for the device.
    """
    facts = table.facts(chosen)
    size = StepSize.of(facts)
    slots = upload(chosen, table.device)
    sequences = Sequences.of(table, pages, slots, size, grouped=tile_rows is None)
    slots = sequences.request_slots
    if tile_rows is None:
        layout: Layout = grouped_layout(pages, sequences)
    else:
        layout = flat_layout(table, pages, sequences, size, tile_rows)

    block_positions, block_masked = table.block_positions(slots, size.block)
    num_masked = sum(fact.masked for fact in facts)
    request, column = torch.nonzero_static(block_masked, size=num_masked).unbind(1)
    position = block_positions[request, column]
    predictor = (position - 1).clamp(min=0) if table.shifted else position
    first = sequences.first_copy[request]
    request_slots = slots[request]
    cfg_scale = table.cfg_scale[request_slots]
    twin = first + (cfg_scale > 0).to(torch.int64)
    return StepBatch(
        slots=slots,
        input_ids=_pad(_input_ids(table, sequences)),
        positions=_pad(sequences.positions),
        layout=layout,
        block_positions=block_positions,
        block_masked=block_masked,
        request=request,
        column=column,
        rows=sequences.row_of[first, predictor],
        uncond_rows=sequences.row_of[twin, predictor],
        cfg_scale=cfg_scale if any(fact.guided for fact in facts) else None,
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
            flags=SamplingFlags.of_all(fact.sampling for fact in facts),
        ),
        plan=_plan(table, facts, slots, block_masked),
        needs_spread=any(fact.needs_spread for fact in facts),
        credits=table.credits(chosen, request_slots, position),
    )


def _plan(
    table: CanvasTable, facts: list[SlotFacts], slots: Tensor, block_masked: Tensor
) -> CommitPlan:
    count, chance = table.commit_counts(slots, block_masked)
    return CommitPlan(
        score=table.score[slots],
        rule=table.rule[slots],
        rules_in_use=frozenset(fact.rule for fact in facts),
        scores_in_use=frozenset(fact.score for fact in facts),
        draws=any(fact.draws for fact in facts),
        count=count,
        chance=chance,
        bound=table.bound[slots],
        second_bound=table.second_bound[slots],
        alg_temp=table.alg_temp[slots],
        seed=table.seed[slots],
        step=table.step[slots],
        block_start=table.block_start[slots],
    )


def _input_ids(table: CanvasTable, sequences: Sequences) -> Tensor:
    slots, positions = sequences.slots[sequences.owner], sequences.positions
    ids = table.tokens[slots, positions]
    hidden_prompt = (sequences.twin[sequences.owner] == 1) & table.given[slots, positions]
    return ids.masked_fill(hidden_prompt, table.special.mask)


def _pad(rows: Tensor) -> Tensor:
    return F.pad(rows, (0, -len(rows) % ROW_MULTIPLE))
