"""Chooses a candidate token for each masked position, with the model's confidence in it.

The head runs on the masked rows alone, and its logits are reduced as they are made, so that they
stay within a memory budget: (rows × vocabulary) of a whole batch is gigabytes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from dllm_engine.ops.head import Head
from dllm_engine.sampling.constrained import ConstrainedRows, from_automata
from dllm_engine.sampling.credit import Credits
from dllm_engine.sampling.from_statistics import from_statistics
from dllm_engine.sampling.full_logits import from_full_logits
from dllm_engine.sampling.rows import (
    Candidates,
    RowSampling,
    SpecialTokens,
    needs_full_logits,
)
from dllm_engine.structured.best_text import Span


def sample_candidates(
    hidden: Tensor,
    head: Head,
    rows: RowSampling,
    special: SpecialTokens,
    *,
    budget_bytes: int,
    needs_entropy: bool = True,
    credits: Credits | None = None,
    constrained: ConstrainedRows | None = None,
    spans: Sequence[Span] = (),
    read_tokens: Tensor | None = None,
) -> Candidates:
    """Choose a token for each row.

    At temperature 0 the most likely token; above, `argmax(logits / T + G)` with Gumbel noise G,
    which samples from softmax(logits / T) exactly (LLaDA's generate.py takes the same
    maximum as exp(logits) / (−ln u)^T). The mask token is never chosen, but counts in the clean
    probabilities, as in the reference. The tempered and filtered distributions exclude it: a filter
    might leave no other token.

    Args:
        hidden: [rows, hidden_size], after the final norm.
        head: the language-model head.
        rows: temperature, seed, step, position and filters of each row.
        special: tokens with a special meaning.
        budget_bytes: memory for logits and their noise.
        needs_entropy: compute entropy and margin; zeros otherwise.
        credits: given if any row uses credit; only greedy rows without filters may.
        constrained: rows that automata decide; None: none.
        spans: of these rows; see `from_automata`.
        read_tokens: [rows, K] int64; tokens whose log-probabilities to read, −1 for none; only
            greedy rows without filters read any.
    """
    if constrained is not None:
        return _with_automata(
            hidden,
            head,
            rows,
            special,
            constrained,
            spans,
            budget_bytes=budget_bytes,
            needs_entropy=needs_entropy,
            credits=credits,
            read_tokens=read_tokens,
        )
    if not rows.num_full_logits:
        return from_statistics(
            hidden, head, rows, special, budget_bytes, needs_entropy, credits, read_tokens
        )
    if rows.num_full_logits == len(hidden) and credits is None and read_tokens is None:
        return from_full_logits(hidden, head, rows, special, budget_bytes, needs_entropy)
    filtered = (rows.top_p < 1) | (rows.top_k > 0)
    needs_all = needs_full_logits(rows.temperature > 0, filtered, rows.dream_statistics)
    order = needs_all.to(torch.uint8).argsort(stable=True)
    num_reduced = len(hidden) - rows.num_full_logits
    reduced, full = order[:num_reduced], order[num_reduced:]
    limits = special, budget_bytes, needs_entropy
    lists = None if credits is None else credits.take(reduced)
    reads = None if read_tokens is None else read_tokens[reduced]
    plain = from_statistics(hidden[reduced], head, rows.take(reduced), *limits, lists, reads)
    found = from_full_logits(hidden[full], head, rows.take(full), *limits)
    if credits is not None:
        found = dataclasses.replace(found, credits=credits.take(full))
    if read_tokens is not None:
        nothing = found.confidence.new_full((len(full), read_tokens.shape[1]), -torch.inf)
        found = dataclasses.replace(found, read=nothing)
    return Candidates.joined([plain, found]).take(order.argsort())  # in the order of the rows


def _with_automata(
    hidden: Tensor,
    head: Head,
    rows: RowSampling,
    special: SpecialTokens,
    constrained: ConstrainedRows,
    spans: Sequence[Span],
    *,
    budget_bytes: int,
    needs_entropy: bool,
    credits: Credits | None,
    read_tokens: Tensor | None,
) -> Candidates:
    """Candidates of a step in which automata decide some rows."""
    mine, others = constrained.rows, constrained.others
    found = from_automata(
        hidden[mine],
        head,
        rows.take(mine),
        special,
        constrained.counts,
        spans,
        budget_bytes,
        needs_entropy,
    )
    if credits is not None:
        found = dataclasses.replace(found, credits=credits.take(mine))
    if read_tokens is not None:
        nothing = found.confidence.new_full((len(mine), read_tokens.shape[1]), -torch.inf)
        found = dataclasses.replace(found, read=nothing)
    if not len(others):
        return found.take(constrained.places)
    free = sample_candidates(
        hidden[others],
        head,
        dataclasses.replace(rows.take(others), num_full_logits=constrained.num_full_logits),
        special,
        budget_bytes=budget_bytes,
        needs_entropy=needs_entropy,
        credits=None if credits is None else credits.take(others),
        read_tokens=None if read_tokens is None else read_tokens[others],
    )
    return Candidates.joined([found, free]).take(constrained.places)
