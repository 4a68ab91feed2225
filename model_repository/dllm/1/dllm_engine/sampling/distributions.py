"""Tempered and filtered distributions as tensors, for rows whose tokens an automaton chooses.

Other rows draw from theirs without making them: `ops/draw.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dllm_engine.sampling.rows import Candidates, RowSampling


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
