"""Packs the sequences of one step into rows, without padding between them."""

from __future__ import annotations

import dataclasses

import numpy as np
from torch import Tensor

from dllm_engine.decoding import Rule, Score
from dllm_engine.memory.kv_cache import KVPages
from dllm_engine.ops.layout import Layout
from dllm_engine.ops.rows import ROW_MULTIPLE
from dllm_engine.ops.transfer import Array, Upload
from dllm_engine.sampling.commit import CommitPlan
from dllm_engine.sampling.credit import CreditRows, Credits
from dllm_engine.sampling.rows import RowSampling, SamplingFlags
from dllm_engine.state.attention_metadata import AttentionMetadata, flat_layout, grouped_layout
from dllm_engine.state.slots import SlotState
from dllm_engine.state.step_plan import Blocks, StepPlan


@dataclasses.dataclass(frozen=True)
class StepInputs:
    """What every rank computes a step from; M masked positions in active blocks."""

    #: [rows] int64; inputs of the model, padded to a multiple of `ROW_MULTIPLE`.
    input_ids: Tensor
    positions: Tensor
    layout: Layout
    #: [M] int64: packed row whose hidden state predicts each masked position.
    rows: Tensor
    #: [M] int64: its packed row in the unconditional sequence; equal to `rows` without guidance.
    uncond_rows: Tensor
    #: [M] cfg_scale of each, or None when no request has guidance.
    cfg_scale: Tensor | None
    sampling: RowSampling
    #: Whether any request needs entropies or margins.
    needs_entropy: bool
    #: Of the M positions; None: no request uses credit.
    credits: Credits | None = None


@dataclasses.dataclass(frozen=True)
class StepBatch:
    """A step's plan on the device, once the upload is sent; R requests, M masked positions."""

    inputs: StepInputs
    #: [R, block] bool: positions of the active blocks that are masked.
    masked: Tensor
    #: [M] int64: their indices in the flattened `masked`.
    index: Tensor
    commit: CommitPlan
    #: [R, block] float32, what committed positions were committed with; None: no rule asks.
    committed: Tensor | None
    #: Where the credit of the M positions is, or None where no request uses it.
    credit_rows: CreditRows | None


def build_batch(
    plan: StepPlan, pages: KVPages, upload: Upload, block_m: int | None = None
) -> StepBatch:
    """Put a planned step into the upload.

    Args:
        block_m: rows per tile of a flat layout; None: sequences are grouped by shape.
    """
    sequences, blocks = plan.sequences, plan.blocks
    state = sequences.requests
    flat = AttentionMetadata.of(sequences, pages)
    layout: Layout = (
        grouped_layout(flat, upload) if block_m is None else flat_layout(flat, block_m, upload)
    )
    rows = upload(plan.rows)
    inputs = StepInputs(
        input_ids=upload(_padded(plan.input_ids)),
        positions=upload(_padded(sequences.positions)),
        layout=layout,
        rows=rows,
        uncond_rows=upload(plan.uncond_rows) if sequences.guided else rows,
        cfg_scale=upload(state.cfg_scale[blocks.request]) if sequences.guided else None,
        sampling=_sampling(state, blocks, upload),
        needs_entropy=bool(state.needs_entropy.any()),
    )
    return StepBatch(
        inputs=inputs,
        masked=upload(blocks.masked),
        index=upload(blocks.index),
        commit=_commit_plan(plan, upload),
        committed=None if plan.committed is None else upload(plan.committed),
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


def _commit_plan(plan: StepPlan, upload: Upload) -> CommitPlan:
    state = plan.sequences.requests
    return CommitPlan(
        score=upload(state.score),
        rule=upload(state.rule),
        rules_in_use=frozenset(map(Rule, set(state.rule.tolist()))),
        scores_in_use=frozenset(map(Score, set(state.score.tolist()))),
        draws=bool((state.alg_temp > 0).any()),
        count=upload(plan.counts),
        chance=upload(plan.chances),
        threshold=upload(state.threshold),
        second_threshold=upload(state.second_threshold),
        alg_temp=upload(state.alg_temp),
        seed=upload(state.seed),
        step=upload(state.step),
        block_start=upload(state.block_start),
    )


def _credit_rows(state: SlotState, blocks: Blocks, upload: Upload) -> CreditRows:
    uses = state.uses_credit[blocks.request]
    # A new block starts with none: the rows still hold another block's.
    empty = ~uses | (state.block_age[blocks.request] == 0)
    return CreditRows(upload(blocks.slots), upload(blocks.column), upload(uses), upload(empty))


def _padded(rows: Array) -> Array:
    padded = np.zeros(len(rows) + -len(rows) % ROW_MULTIPLE, np.int64)
    padded[: len(rows)] = rows
    return padded
