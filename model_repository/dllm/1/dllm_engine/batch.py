"""Packs the sequences of one step into rows, without padding between them."""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

from .cache import KVPages
from .canvas import CanvasTable
from .layout import Sequences, StepSize, flat_layout, grouped_layout
from .ops import Layout
from .sampling import CommitPlan, Credits, RowSampling, SamplingFlags
from .sampling.rows import ROW_MULTIPLE
from .slot_facts import SlotFacts
from .slot_state import SlotState


@dataclasses.dataclass(frozen=True)
class StepBatch:
    """Everything one step needs, as tensors; R requests, M masked positions in active blocks."""

    #: Of the R requests, ordered as the rows are.
    state: SlotState
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
    sequences = Sequences.of(table, pages, table.state(chosen), size, grouped=tile_rows is None)
    state = sequences.requests
    if tile_rows is None:
        layout: Layout = grouped_layout(pages, sequences)
    else:
        layout = flat_layout(pages, sequences, size, tile_rows)

    block_positions, block_masked = table.block_positions(state, size.block)
    num_masked = sum(fact.masked for fact in facts)
    request, column = torch.nonzero_static(block_masked, size=num_masked).unbind(1)
    position = block_positions[request, column]
    predictor = (position - 1).clamp(min=0) if table.shifted else position
    of_position = state.take(request)
    rows = uncond_rows = sequences.row_of[sequences.first_copy[request], predictor]
    if size.guided:
        twin = sequences.first_copy[request] + (of_position.cfg_scale > 0).to(torch.int64)
        uncond_rows = sequences.row_of[twin, predictor]
    return StepBatch(
        state=state,
        input_ids=_pad(_input_ids(table, sequences, guided=size.guided)),
        positions=_pad(sequences.positions),
        layout=layout,
        block_positions=block_positions,
        block_masked=block_masked,
        request=request,
        column=column,
        rows=rows,
        uncond_rows=uncond_rows,
        cfg_scale=of_position.cfg_scale if size.guided else None,
        sampling=RowSampling(
            temperature=of_position.temperature,
            seed=of_position.seed,
            step=of_position.step,
            position=position,
            top_p=of_position.top_p,
            top_k=of_position.top_k,
            tempered=of_position.tempered,
            no_eos=of_position.no_eos,
            late_eos=of_position.late_eos,
            flags=SamplingFlags.of_all(fact.sampling for fact in facts),
            num_whole=sum(fact.masked for fact in facts if fact.sampling.whole),
        ),
        plan=_plan(table, facts, state, block_masked),
        needs_spread=any(fact.needs_spread for fact in facts),
        credits=table.credits(chosen, of_position, column),
    )


def _plan(
    table: CanvasTable, facts: list[SlotFacts], state: SlotState, block_masked: Tensor
) -> CommitPlan:
    tempered = any(fact.tempered for fact in facts)
    count, chance = table.commit_counts(state, block_masked, tempered=tempered)
    return CommitPlan(
        score=state.score,
        rule=state.rule,
        rules_in_use=frozenset(fact.rule for fact in facts),
        scores_in_use=frozenset(fact.score for fact in facts),
        draws=any(fact.draws for fact in facts),
        count=count,
        chance=chance,
        bound=state.bound,
        second_bound=state.second_bound,
        alg_temp=state.alg_temp,
        seed=state.seed,
        step=state.step,
        block_start=state.block_start,
    )


def _input_ids(table: CanvasTable, sequences: Sequences, *, guided: bool) -> Tensor:
    slots, positions = sequences.state.slots[sequences.owner], sequences.positions
    ids = table.tokens[slots, positions]
    if not guided:
        return ids
    hidden_prompt = (sequences.twin[sequences.owner] == 1) & table.given[slots, positions]
    return ids.masked_fill(hidden_prompt, table.special.mask)


def _pad(rows: Tensor) -> Tensor:
    return F.pad(rows, (0, -len(rows) % ROW_MULTIPLE))
