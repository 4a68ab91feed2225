"""Chooses a candidate token for each masked position, with the model's confidence in it.

The head runs on the masked rows alone, and its logits are reduced as they are made, so that they
stay within a memory budget: (rows × vocabulary) of a whole batch is gigabytes.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from dllm_engine.ops.head import Head
from dllm_engine.sampling.credit import Credits
from dllm_engine.sampling.from_statistics import from_statistics
from dllm_engine.sampling.full_logits import from_full_logits
from dllm_engine.sampling.rows import (
    Candidates,
    RowSampling,
    SpecialTokens,
    needs_full_logits,
)


def sample_candidates(
    hidden: Tensor,
    head: Head,
    rows: RowSampling,
    special: SpecialTokens,
    *,
    budget_bytes: int,
    needs_entropy: bool = True,
    credits: Credits | None = None,
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
    """
    if not rows.num_full_logits:
        return from_statistics(hidden, head, rows, special, budget_bytes, needs_entropy, credits)
    if rows.num_full_logits == len(hidden):
        found = from_full_logits(hidden, head, rows, special, budget_bytes, needs_entropy)
        return found if credits is None else dataclasses.replace(found, credits=credits)
    filtered = (rows.top_p < 1) | (rows.top_k > 0)
    needs_all = needs_full_logits(rows.temperature > 0, filtered, rows.dream_statistics)
    order = needs_all.to(torch.uint8).argsort(stable=True)
    num_reduced = len(hidden) - rows.num_full_logits
    reduced, full = order[:num_reduced], order[num_reduced:]
    limits = special, budget_bytes, needs_entropy
    lists = None if credits is None else credits.take(reduced)
    plain = from_statistics(hidden[reduced], head, rows.take(reduced), *limits, lists)
    found = from_full_logits(hidden[full], head, rows.take(full), *limits)
    if credits is not None:
        found = dataclasses.replace(found, credits=credits.take(full))
    return Candidates.joined([plain, found]).take(order.argsort())  # back in the order of the rows
