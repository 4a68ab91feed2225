"""Candidates of rows that need all their logits: filters, and Dream's tempered statistics."""

from __future__ import annotations

import torch
from torch import Tensor

from dllm_engine.ops import noise
from dllm_engine.ops.head import Head
from dllm_engine.ops.rows import ROW_MULTIPLE, forbid, pad_rows, widen
from dllm_engine.sampling.rows import Candidates, RowSampling, SpecialTokens

#: Bytes per logit: the logit, its float64 copies, their order and the noise.
_BYTES = 64


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

    The budget limits the rows in one chunk, but a chunk has at least one row. The order in which
    torch sums a row depends on the number of rows: on a GPU always, on a CPU for a single row. So
    on a GPU all chunks have the same size, and on a CPU at least two rows if the budget allows.
    """
    chunk = max(1, budget_bytes // (head.vocab_size * _BYTES))
    least = min(chunk, 2)
    if hidden.device.type != "cpu":
        chunk = least = min(chunk, ROW_MULTIPLE)
    count = len(hidden)
    parts = []
    for start in range(0, count, chunk):
        end = start + max(least, min(chunk, count - start))
        # Repeat the last row to fill the chunk.
        part = torch.arange(start, end, device=hidden.device).clamp_(max=count - 1)
        parts.append(_choose(_logits(hidden[part], head), rows.take(part), special, needs_entropy))
    return Candidates.joined(parts).take(slice(count))


def _logits(hidden: Tensor, head: Head) -> Tensor:
    """[rows, vocab_size], in float32 or wider."""
    return widen(head.all_logits(pad_rows(hidden))[: len(hidden)])


def _choose(
    logits: Tensor, rows: RowSampling, special: SpecialTokens, needs_entropy: bool
) -> Candidates:
    if rows.flags.logits_eos_inf:
        forbid(logits, rows.logits_eos_inf, special.eos)
    mask_logit = logits[:, special.mask].clone()
    logits[:, special.mask] = -torch.inf
    filtered = tempered(logits, rows)
    token = _draw(filtered, rows)
    logits[:, special.mask] = mask_logit
    if rows.flags.confidence_eos_eot_inf:
        forbid(logits, rows.confidence_eos_eot_inf, special.stop)
    clean = statistics(logits, token, needs_entropy)
    inner = statistics(filtered, token, needs_entropy)

    def pick(name: str) -> Tensor:
        outer: Tensor = getattr(clean, name)
        return torch.where(rows.dream_statistics, getattr(inner, name).to(outer.dtype), outer)

    return Candidates(token, pick("confidence"), pick("entropy"), pick("margin"))


def statistics(logits: Tensor, token: Tensor, needs_entropy: bool) -> Candidates:
    """Confidence of `token`, entropy and margin under softmax(logits). Overwrites `logits`."""
    max_logit = logits.amax(dim=-1, keepdim=True)
    shifted = logits.sub_(max_logit)
    chosen = shifted.gather(1, token.unsqueeze(1)).squeeze(1)
    if not needs_entropy:
        sum_exp = shifted.exp_().sum(dim=-1)
        confidence = chosen.exp() / sum_exp
        nothing = torch.zeros_like(confidence)
        return Candidates(token, confidence, nothing, nothing)
    second = shifted.topk(2, dim=-1).values[:, 1]
    weight = shifted.exp()
    sum_exp = weight.sum(dim=-1)
    # A filtered token has logit −inf and weight 0; it must add 0, not NaN.
    mean = (weight * shifted.masked_fill_(weight == 0, 0.0)).sum(dim=-1) / sum_exp
    return Candidates(
        token, chosen.exp() / sum_exp, sum_exp.log() - mean, (1 - second.exp()) / sum_exp
    )


def tempered(logits: Tensor, rows: RowSampling) -> Tensor:
    """logits / T, then top-p, then top-k (the order of Dream's generation_utils.py); float64."""
    temperature = torch.where(rows.temperature > 0, rows.temperature, 1.0)
    scaled = logits.to(torch.float64) / temperature.unsqueeze(1)
    if rows.flags.top_p:
        scaled = _filter_top_p(scaled, rows.top_p.unsqueeze(1))
    most = min(rows.flags.top_k, logits.shape[1])
    return _filter_top_k(scaled, rows.top_k, most) if most else scaled


def _draw(logits: Tensor, rows: RowSampling) -> Tensor:
    token = logits.argmax(dim=-1)
    if not rows.flags.noisy:
        return token
    keys = noise.row_keys(rows.seed, rows.step, rows.position, noise.STREAM_TOKEN)
    drawn = (logits + noise.gumbel(keys, logits.shape[1])).argmax(dim=-1)
    return torch.where(rows.temperature > 0, drawn, token)


def _filter_top_p(logits: Tensor, top_p: Tensor) -> Tensor:
    """Keep the smallest set of best tokens whose probability reaches `top_p` (Holtzman 2020).

    `top_p` is [rows, 1]; 1 keeps all tokens, however the probabilities round.
    """
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    probability = ordered.softmax(dim=-1)
    before = probability.cumsum(dim=-1) - probability
    dropped = (before >= top_p) & (top_p < 1)
    return logits.masked_fill(torch.zeros_like(dropped).scatter(1, order, dropped), -torch.inf)


def _filter_top_k(logits: Tensor, top_k: Tensor, most: int) -> Tensor:
    """Keep the `top_k` best tokens of each row; 0 keeps all. `most` is the largest `top_k`."""
    best = logits.topk(most, dim=-1).values
    kth = best.gather(1, (top_k.clamp(1, most) - 1).unsqueeze(1))
    dropped = (logits < kth) & (top_k > 0).unsqueeze(1)
    return logits.masked_fill(dropped, -torch.inf)
