"""Head-centric selection: chooses the positions that each KV head keeps."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dllm_engine.ops.layout import LayerPages, Selection

#: Products of queries and keys to compute at once, and the fewest keys to compute at once. These
#: are a few MiB, for which a step has room; all products would take far more than the step itself.
_SCORE_NUMBERS = 2**20
_LEAST_KEYS = 64


def select_positions(queries: Tensor, keys: Tensor, keep: int, pool_kernel: int) -> Tensor:
    """Choose the `keep` candidates of each KV head (dLLM-Serve; Sparse-dLLM, 3.2).

    A candidate's score is log Σ exp(q·k / √head_dim) over the block's queries; the best over the
    query heads that share the KV head; then the maximum over `pool_kernel` neighbours. Of equal
    scores the leftmost is kept. The papers score the mean of the queries, which loses keys that
    only one position needs (docs/decisions/012).

    Args:
        queries: [G, B, num_heads, head_dim]; of the active block.
        keys: [G, C, num_kv_heads, head_dim]; of the candidates.
        keep: how many, at most C.
        pool_kernel: odd width of the pooling.

    Returns:
        [G, keep, num_kv_heads] int64 in 0..C−1, ascending.
    """
    scores = torch.stack([position_scores(q, k) for q, k in zip(queries, keys, strict=True)])
    pooled = F.max_pool1d(scores, pool_kernel, stride=1, padding=pool_kernel // 2)
    best = pooled.sort(dim=2, descending=True, stable=True).indices[:, :, :keep]
    return best.sort(dim=2).values.transpose(1, 2)


def position_scores(queries: Tensor, keys: Tensor) -> Tensor:
    """Scores of one sequence before pooling: [num_kv_heads, C].

    Computes some keys at a time. How many depends on the sequence alone, so its scores are
    bitwise independent of the batch.
    """
    num_kv_heads, head_dim = keys.shape[1:]
    grouped = queries.unflatten(1, (num_kv_heads, -1)).permute(1, 2, 0, 3) / head_dim**0.5  # type: ignore[no-untyped-call]
    width = max(_LEAST_KEYS, _SCORE_NUMBERS // grouped.shape[:3].numel())
    return torch.cat([_scores(grouped, some) for some in torch.split(keys, width)], dim=1)


def _scores(grouped: Tensor, keys: Tensor) -> Tensor:
    """Scores of keys [c, num_kv_heads, head_dim]; queries [num_kv_heads, shared, B, head_dim]."""
    products: Tensor = grouped @ keys.permute(1, 2, 0).unsqueeze(1)  # [num_kv_heads, shared, B, c]
    wide = products.to(torch.promote_types(products.dtype, torch.float32))
    return wide.logsumexp(dim=2).amax(dim=1)


def store_selection(
    q: Tensor, k: Tensor, v: Tensor, selection: Selection, pages: LayerPages
) -> None:
    """Select and store: row r of a head's pages holds that head's r-th kept position."""
    keep = selection.slot_mapping.shape[1]
    candidates = k[selection.candidate_rows]
    chosen = select_positions(q[selection.block_rows], candidates, keep, selection.pool_kernel)
    index = chosen.unsqueeze(-1).expand(-1, -1, -1, k.shape[-1])
    pages.write(
        selection.slot_mapping.flatten(),
        candidates.gather(1, index).flatten(0, 1),
        v[selection.candidate_rows].gather(1, index).flatten(0, 1),
    )
