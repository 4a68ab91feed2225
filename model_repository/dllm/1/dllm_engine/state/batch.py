"""Packs the sequences of one step into rows, without padding between them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from dllm_engine.decoding import Rule, Score
from dllm_engine.memory.kv_cache import KVPages
from dllm_engine.ops.layout import Layout
from dllm_engine.ops.rows import ROW_MULTIPLE
from dllm_engine.ops.transfer import Array, Upload
from dllm_engine.sampling.commit import CommitPlan
from dllm_engine.sampling.constrained import ConstrainedRows
from dllm_engine.sampling.credit import CreditRows, Credits
from dllm_engine.sampling.rows import RowSampling, SamplingFlags
from dllm_engine.sampling_params import MAX_LOGPROBS
from dllm_engine.state.attention_metadata import AttentionMetadata, flat_layout, grouped_layout
from dllm_engine.state.slots import SlotState
from dllm_engine.state.step_plan import Blocks, FormRows, StepPlan
from dllm_engine.structured.best_text import Span

#: Fields that `RowSampling` has per masked position, and `CommitPlan` per request, by the names of
#: the slot state.
_BY_POSITION = [f.name for f in dataclasses.fields(RowSampling) if f.name in SlotState._fields]
_BY_REQUEST = [f.name for f in dataclasses.fields(CommitPlan) if f.name in SlotState._fields]


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
    #: Credit of the M positions; None: no request uses any.
    credits: Credits | None = None
    #: Which of the M positions automata decide; None: none.
    constrained: ConstrainedRows | None = None
    #: [M, K] int64: tokens whose log-probabilities to read, −1 for none; None: no request reads.
    read_tokens: Tensor | None = None
    #: Positions whose log-probabilities are computed once the step has chosen, and how many
    #: alternatives are listed for each.
    num_log_probs: int = 0
    num_top: int = 0


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
    #: [M] bool: the positions whose requests ask for log-probabilities; None: no request asks.
    asks: Tensor | None
    #: Of the positions that automata decide; only the first rank has them.
    spans: Sequence[Span] = ()


def build_batch(
    plan: StepPlan, pages: KVPages, upload: Upload, block_m: int | None = None
) -> StepBatch:
    """Put a planned step into the upload.

    Args:
        block_m: rows per tile of a flat layout; None: sequences are grouped by shape.
    """
    sequences, blocks = plan.sequences, plan.blocks
    state = sequences.requests
    flat = AttentionMetadata.of(sequences, pages, plan.key_limits)
    layout: Layout = (
        grouped_layout(flat, upload) if block_m is None else flat_layout(flat, block_m, upload)
    )
    rows = upload(plan.rows)
    log_probs = plan.log_probs
    inputs = StepInputs(
        input_ids=upload(_padded(plan.input_ids)),
        positions=upload(_padded(sequences.positions)),
        layout=layout,
        rows=rows,
        uncond_rows=upload(plan.uncond_rows) if sequences.guided else rows,
        cfg_scale=upload(state.cfg_scale[blocks.request]) if sequences.guided else None,
        sampling=_sampling(state, blocks, upload),
        needs_entropy=bool(state.needs_entropy.any()),
        constrained=None if plan.forms is None else _constrained(plan, plan.forms, upload),
        read_tokens=None if plan.read_tokens is None else upload(plan.read_tokens),
        num_log_probs=0 if log_probs is None else log_probs.count,
        # As many for every request: of equal logits, which are listed depends on the number.
        num_top=MAX_LOGPROBS if log_probs is not None and log_probs.lists else 0,
    )
    return StepBatch(
        inputs=inputs,
        masked=upload(blocks.masked),
        index=upload(blocks.index),
        commit=_commit_plan(plan, upload),
        committed=None if plan.committed is None else upload(plan.committed),
        credit_rows=_credit_rows(state, blocks, upload) if state.uses_credit.any() else None,
        spans=() if plan.forms is None else plan.forms.spans,
        asks=None if log_probs is None else upload(log_probs.asks),
    )


def _constrained(plan: StepPlan, forms: FormRows, upload: Upload) -> ConstrainedRows:
    blocks = plan.blocks
    full = plan.sequences.requests.needs_full_logits[blocks.request]
    rows = np.array(forms.rows, np.int64)
    others = np.setdiff1d(np.arange(len(full)), rows)
    return ConstrainedRows(
        rows=upload(rows),
        others=upload(others),
        places=upload(np.argsort(np.concatenate([rows, others]))),
        counts=tuple(span.num_masked for span in forms.spans),
        num_full_logits=int(full[others].sum()),
    )


def _sampling(state: SlotState, blocks: Blocks, upload: Upload) -> RowSampling:
    columns: dict[str, Any] = {
        name: upload(getattr(state, name)[blocks.request]) for name in _BY_POSITION
    }
    return RowSampling(
        **columns,
        position=upload(blocks.positions),
        flags=SamplingFlags(
            noisy=bool((state.temperature > 0).any()),
            top_p=bool((state.top_p < 1).any()),
            top_k=int(state.top_k.max()),
            logits_eos_inf=bool(state.logits_eos_inf.any()),
            confidence_eos_eot_inf=bool(state.confidence_eos_eot_inf.any()),
        ),
        num_full_logits=int(state.needs_full_logits[blocks.request].sum()),
    )


def _commit_plan(plan: StepPlan, upload: Upload) -> CommitPlan:
    state = plan.sequences.requests
    columns: dict[str, Any] = {name: upload(getattr(state, name)) for name in _BY_REQUEST}
    return CommitPlan(
        **columns,
        rules_in_use=frozenset(map(Rule, set(state.rule.tolist()))),
        scores_in_use=frozenset(map(Score, set(state.score.tolist()))),
        draws=bool((state.alg_temp > 0).any()),
        count=upload(plan.counts),
        chance=upload(plan.chances),
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
