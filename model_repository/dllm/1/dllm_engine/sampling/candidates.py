"""Which token each masked position would take, and how sure the model is of it.

The head is applied to the rows that need it alone, and its logits are reduced as they are made,
so that they never take more memory than their budget: (rows × vocabulary) of a whole batch is
gigabytes.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from dllm_engine.ops import Head
from dllm_engine.sampling.credit import Credits
from dllm_engine.sampling.from_statistics import from_statistics
from dllm_engine.sampling.full_logits import from_full_logits
from dllm_engine.sampling.rows import (
    Candidates,
    RowSampling,
    SpecialTokens,
    joined,
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

    At temperature 0 the most likely token; above, `argmax(logits / T + G)` with Gumbel noise G in
    float64, which samples from softmax(logits / T) exactly (LLaDA's generate.py takes the same
    maximum as exp(logits) / (−ln u)^T). The mask token is never chosen, though it counts in the
    clean probabilities, as in the reference. In the tempered and filtered distributions it has no
    part: a filter could leave nothing else.

    Args:
        hidden: [rows, hidden_size], after the final norm.
        head: makes logits, a tile of the vocabulary at a time.
        rows: temperature, seed, step, position and filters of each row.
        special: the ids that some rows or all treat apart.
        budget_bytes: what the logits (and their noise) may take at once.
        needs_entropy: compute entropy and margin; zeros otherwise.
        credits: where any row is decided with credit; only greedy rows without filters may be.
    """
    if not rows.num_full_logits:
        return from_statistics(hidden, head, rows, special, budget_bytes, needs_entropy, credits)
    filtered = (rows.top_p < 1) | (rows.top_k > 0)
    whole = needs_full_logits(rows.temperature > 0, filtered, rows.dream_statistics)
    num_tiled = len(hidden) - rows.num_full_logits
    order = whole.to(torch.uint8).argsort(stable=True)
    tiled, whole_rows = order[:num_tiled], order[num_tiled:]
    parts = [
        from_full_logits(
            hidden[whole_rows], head, rows.take(whole_rows), special, budget_bytes, needs_entropy
        )
    ]
    if len(tiled):
        mine = None if credits is None else credits.take(tiled)
        arguments = (hidden[tiled], head, rows.take(tiled), special, budget_bytes, needs_entropy)
        parts.insert(0, from_statistics(*arguments, mine))
    found = joined(parts).take(order.argsort())  # in the order of the rows again
    if credits is None:
        return found
    after = Credits(credits.used, credits.tokens.clone(), credits.values.clone())
    if len(tiled) and parts[0].credits is not None:
        after.tokens[tiled], after.values[tiled] = parts[0].credits.tokens, parts[0].credits.values
    return dataclasses.replace(found, credits=after)
