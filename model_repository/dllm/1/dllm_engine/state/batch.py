"""Packs the sequences of one step into rows, without padding between them."""

from __future__ import annotations

import dataclasses

import numpy as np
from torch import Tensor

from dllm_engine.decoding import Rule, Score
from dllm_engine.memory import KVPages
from dllm_engine.ops import Array, Layout, Upload
from dllm_engine.ops.rows import ROW_MULTIPLE
from dllm_engine.sampling import CommitPlan, CreditRows, RowSampling, SamplingFlags
from dllm_engine.state.attention_metadata import Sequences, flat_layout, grouped_layout
from dllm_engine.state.canvas import Blocks, CanvasTable
from dllm_engine.state.slots import SlotState


@dataclasses.dataclass(frozen=True)
class StepBatch:
    """Everything one step needs; R requests, M masked positions in active blocks.

    Tensors hold it once the upload they were made with is sent.
    """

    #: Of the R requests, ordered as the rows are, on the host.
    state: SlotState
    blocks: Blocks
    #: [rows] int64; inputs of the model, padded to a multiple of `ROW_MULTIPLE`.
    input_ids: Tensor
    positions: Tensor
    layout: Layout
    #: [R, block] bool: positions of the active blocks that are masked.
    masked: Tensor
    #: [M] int64: where in these each of them stands.
    index: Tensor
    #: [M] int64: packed row whose hidden state predicts each masked position.
    rows: Tensor
    #: [M] int64: its packed row in the unconditional sequence; equal to `rows` without guidance.
    uncond_rows: Tensor
    #: [M] cfg_scale of each, or None when no request has guidance.
    cfg_scale: Tensor | None
    sampling: RowSampling
    plan: CommitPlan
    #: Whether any request needs entropies or margins.
    needs_entropy: bool
    #: [R, block] float32, what committed positions were committed with; None: no rule asks.
    committed: Tensor | None
    #: Where the credit of the M positions is, or None where no request uses it.
    credit_rows: CreditRows | None


def build_batch(
    table: CanvasTable,
    pages: KVPages,
    chosen: list[int],
    upload: Upload,
    block_m: int | None = None,
) -> StepBatch:
    """Lay out one step of the requests in these slots.

    A request with guidance contributes its sequence twice, the second time with everything it
    came with replaced by masks (LLaDA, generate.py: `un_x`). Where the model is shifted, a
    position is predicted from the one before it, the first from itself (Dream).

    Args:
        block_m: rows per tile of a flat layout; None: sequences are grouped by shape.
    """
    sequences = Sequences.of(table, pages, table.state(chosen), grouped=block_m is None)
    state = sequences.requests
    if block_m is None:
        layout: Layout = grouped_layout(pages, sequences, upload)
    else:
        layout = flat_layout(pages, sequences, block_m, upload)
    blocks = table.blocks(state)
    request, positions = blocks.request, blocks.positions
    predictor = np.maximum(positions - 1, 0) if table.shifted else positions
    first = sequences.first_copy[request]
    rows = uncond_rows = upload(sequences.row_of(first, predictor))
    guided = (state.cfg_scale > 0).any()
    if guided:
        uncond = first + (state.cfg_scale[request] > 0)
        uncond_rows = upload(sequences.row_of(uncond, predictor))
    plan = _plan(table, state, blocks, upload)
    return StepBatch(
        state=state,
        blocks=blocks,
        input_ids=upload(_padded(_input_ids(table, sequences))),
        positions=upload(_padded(sequences.positions)),
        layout=layout,
        masked=upload(blocks.masked),
        index=upload(blocks.index),
        rows=rows,
        uncond_rows=uncond_rows,
        cfg_scale=upload(state.cfg_scale[request]) if guided else None,
        sampling=_sampling(state, blocks, upload),
        plan=plan,
        needs_entropy=bool(state.needs_entropy.any()),
        committed=upload(table.block_confidence(state))
        if Rule.LOCAL_LEAP in plan.rules_in_use
        else None,
        credit_rows=_credit_rows(state, blocks, upload) if state.uses_credit.any() else None,
    )


def _sampling(state: SlotState, blocks: Blocks, upload: Upload) -> RowSampling:
    request = blocks.request

    def column(values: Array) -> Tensor:
        return upload(values[request])

    return RowSampling(
        temperature=column(state.temperature),
        seed=column(state.seed),
        step=column(state.step),
        position=upload(blocks.positions),
        top_p=column(state.top_p),
        top_k=column(state.top_k),
        dream_statistics=column(state.dream_statistics),
        logits_eos_inf=column(state.logits_eos_inf),
        confidence_eos_eot_inf=column(state.confidence_eos_eot_inf),
        flags=SamplingFlags(
            noisy=bool((state.temperature > 0).any()),
            top_p=bool((state.top_p < 1).any()),
            top_k=int(state.top_k.max()),
            logits_eos_inf=bool(state.logits_eos_inf.any()),
            confidence_eos_eot_inf=bool(state.confidence_eos_eot_inf.any()),
        ),
        num_full_logits=int(state.needs_full_logits[request].sum()),
    )


def _plan(table: CanvasTable, state: SlotState, blocks: Blocks, upload: Upload) -> CommitPlan:
    count, chance = table.commit_counts(state, blocks)
    return CommitPlan(
        score=upload(state.score),
        rule=upload(state.rule),
        rules_in_use=frozenset(map(Rule, set(state.rule.tolist()))),
        scores_in_use=frozenset(map(Score, set(state.score.tolist()))),
        draws=bool((state.alg_temp > 0).any()),
        count=upload(count),
        chance=upload(chance),
        threshold=upload(state.threshold),
        second_threshold=upload(state.second_threshold),
        alg_temp=upload(state.alg_temp),
        seed=upload(state.seed),
        step=upload(state.step),
        block_start=upload(state.block_start),
    )


def _credit_rows(state: SlotState, blocks: Blocks, upload: Upload) -> CreditRows:
    uses = state.uses_credit[blocks.request]
    # A block begins with none; what stands there is another block's.
    empty = ~uses | (state.block_age[blocks.request] == 0)
    return CreditRows(upload(blocks.slots), upload(blocks.column), upload(uses), upload(empty))


def _input_ids(table: CanvasTable, sequences: Sequences) -> Array:
    slots, positions = sequences.state.slots[sequences.owner], sequences.positions
    ids: Array = table.tokens[slots, positions]
    if sequences.uncond.any():
        hidden = (sequences.uncond[sequences.owner] == 1) & table.given[slots, positions]
        ids[hidden] = table.mask
    return ids


def _padded(rows: Array) -> Array:
    padded = np.zeros(len(rows) + -len(rows) % ROW_MULTIPLE, np.int64)
    padded[: len(rows)] = rows
    return padded
