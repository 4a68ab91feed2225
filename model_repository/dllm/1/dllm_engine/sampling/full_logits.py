"""Candidates of rows that need all their logits: filters, and Dream's tempered statistics."""

from __future__ import annotations

import dataclasses

import torch.nn.functional as F
from torch import Tensor

from dllm_engine.ops.head import Head
from dllm_engine.ops.head_types import Filters, HeadStatistics
from dllm_engine.ops.rows import ROW_MULTIPLE
from dllm_engine.sampling.from_statistics import candidates_of, options_of
from dllm_engine.sampling.rows import Candidates, RowSampling, SpecialTokens

#: Rows of one product on a GPU: reading the weights takes it about as long as multiplying them.
_GPU_ROWS = 128


def least_bytes(vocab_size: int, element_size: int) -> int:
    """Bytes that full logits take even if the budget is smaller.

    The head computes `ROW_MULTIPLE` rows at once: their tiles, and the tiles joined.
    """
    return 2 * ROW_MULTIPLE * vocab_size * max(4, element_size)


def from_full_logits(
    hidden: Tensor,
    head: Head,
    rows: RowSampling,
    special: SpecialTokens,
    budget_bytes: int,
    needs_entropy: bool,
) -> Candidates:
    """Candidates of rows with filters or Dream's statistics; see `sample_candidates`.

    The budget limits the rows in one chunk, but a chunk has at least one row. On a GPU a library
    may add up a row's product in another order for another number of rows, so that all its
    products have the same number.
    """
    options = options_of(rows, special, needs_entropy, hidden.dtype)
    if options.confidence_eos_eot_inf is not None:
        clean = options.confidence_eos_eot_inf & ~rows.dream_statistics
        options = dataclasses.replace(options, confidence_eos_eot_inf=clean)
    filters = Filters(
        top_p=rows.top_p,
        top_k=rows.top_k,
        tempered=rows.dream_statistics,
        uses_top_p=rows.flags.top_p,
        most_top_k=rows.flags.top_k,
    )
    chunk = _rows_at_once(head, budget_bytes, hidden)
    multiple = ROW_MULTIPLE if hidden.device.type == "cpu" else max(chunk, ROW_MULTIPLE)
    found = []
    for start in range(0, len(hidden), chunk):
        part = slice(start, start + chunk)
        some = hidden[part]
        padded = F.pad(some, (0, 0, 0, -len(some) % multiple))
        # Without a name, so that a chunk's logits end before the next ones begin.
        found.append(
            head.draw(head.all_logits(padded)[: len(some)], options.take(part), filters.take(part))
        )
    return candidates_of(HeadStatistics.joined(found), options)


def _rows_at_once(head: Head, budget_bytes: int, hidden: Tensor) -> int:
    row, once = head.draw_bytes()
    chunk = max(1, (budget_bytes - once) // row)
    if hidden.device.type != "cpu":
        chunk = min(1 << (chunk.bit_length() - 1), _GPU_ROWS)
    return chunk if chunk < ROW_MULTIPLE else chunk // ROW_MULTIPLE * ROW_MULTIPLE
