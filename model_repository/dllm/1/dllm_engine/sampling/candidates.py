"""Which token each masked position would take, and how sure the model is of it.

The head is applied to the rows that need it alone, and its logits are reduced as they are made,
so that they never take more memory than their budget: (rows × vocabulary) of a whole batch is
gigabytes.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from ..ops import Head
from .rows import Candidates, RowSampling, SpecialTokens
from .tiles import by_tiles
from .whole_rows import by_whole_rows

_FIELDS = [field.name for field in dataclasses.fields(Candidates)]


def sample_candidates(
    hidden: Tensor,
    head: Head,
    rows: RowSampling,
    special: SpecialTokens,
    *,
    budget_bytes: int,
    with_spread: bool = True,
) -> Candidates:
    """Choose a token for each row.

    At temperature 0 the most likely token; above, `argmax(logits / T + G)` with Gumbel noise G in
    float64, which samples from softmax(logits / T) exactly (LLaDA's generate.py takes the same
    maximum as exp(logits) / (−ln u)^T). The mask token is never chosen, though it counts in the
    clean probabilities, as in the reference.

    Args:
        hidden: [rows, hidden_size], after the final norm.
        head: makes logits, a tile of the vocabulary at a time.
        rows: temperature, seed, step, position and filters of each row.
        special: the ids that some rows or all treat apart.
        budget_bytes: what the logits (and their noise) may take at once.
        with_spread: compute entropy and margin; zeros otherwise.
    """
    filters = (rows.top_p < 1) | (rows.top_k > 0)
    noisy = rows.temperature > 0
    # At temperature 0 and without filters Dream's distribution is the clean one.
    whole = (noisy & filters) | (rows.tempered & (noisy | filters))
    if not bool(whole.any()):
        return by_tiles(hidden, head, rows, special, budget_bytes, with_spread)
    wide = torch.promote_types(hidden.dtype, torch.float32)
    found = Candidates(
        token=torch.empty(len(hidden), dtype=torch.int64, device=hidden.device),
        **{name: hidden.new_empty(len(hidden), dtype=wide) for name in _FIELDS[1:]},
    )
    for choose, index in (
        (by_tiles, (~whole).nonzero().squeeze(1)),
        (by_whole_rows, whole.nonzero().squeeze(1)),
    ):
        if not len(index):
            continue
        part = choose(hidden[index], head, rows.take(index), special, budget_bytes, with_spread)
        for name in _FIELDS:
            getattr(found, name)[index] = getattr(part, name)
    return found
