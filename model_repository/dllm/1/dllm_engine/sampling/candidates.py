"""Which token each masked position would take, and with what probability.

The head is applied to the rows that need it alone, a chunk at a time, so that logits never take
more memory than their budget: (rows × vocabulary) of a whole batch is gigabytes.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

from . import noise

#: Row counts are padded up to this. Matrix kernels choose their inner loops by row count for
#: very few rows; from 8 rows on, a row's result was seen not to depend on its neighbours.
ROW_MULTIPLE = 16


@dataclasses.dataclass(frozen=True)
class RowNoise:
    """What sampling needs to know of each row: all [rows], on the model's device."""

    #: float64; 0 is greedy.
    temperature: Tensor
    #: int64.
    seed: Tensor
    step: Tensor
    #: int64, absolute position in the sequence.
    position: Tensor
    #: float64; 1 is off.
    top_p: Tensor
    #: int64; 0 is off.
    top_k: Tensor


@dataclasses.dataclass(frozen=True)
class Candidates:
    """The chosen token of each row and how sure the model is of it."""

    #: int64 [rows].
    token: Tensor
    #: float32 [rows] (float64 for a float64 model); probability under the clean,
    #: un-tempered distribution.
    confidence: Tensor


def sample_candidates(
    hidden: Tensor,
    head_weight: Tensor,
    rows: RowNoise,
    *,
    mask_token_id: int,
    budget_bytes: int,
) -> Candidates:
    """Choose a token for each row.

    At temperature 0 the most likely token; above, `argmax(logits / T + G)` with Gumbel noise G in
    float64, which samples from softmax(logits / T) exactly (LLaDA's generate.py takes the same
    maximum as exp(logits) / (−ln u)^T). The mask token is never chosen, though it counts in the
    probabilities, as in the reference.

    Args:
        hidden: [rows, hidden_size], after the final norm.
        head_weight: [vocab_size, hidden_size].
        rows: temperature, seed, step, position and filters of each row.
        mask_token_id: the id that may not be chosen.
        budget_bytes: what the logits (and their noise) may take at once.
    """
    chunk = _rows_per_chunk(head_weight.shape[0], budget_bytes, bool((rows.temperature > 0).any()))
    tokens, confidences = [], []
    for start in range(0, hidden.shape[0], chunk):
        part = slice(start, start + chunk)
        logits = _logits(hidden[part], head_weight)
        token, confidence = _choose(logits, _take(rows, part), mask_token_id)
        tokens.append(token)
        confidences.append(confidence)
    return Candidates(torch.cat(tokens), torch.cat(confidences))


def _rows_per_chunk(vocab_size: int, budget_bytes: int, noisy: bool) -> int:
    # Greedy rows hold logits and their exponentials; sampled ones int64 and float64 noise beside.
    bytes_per_row = vocab_size * (64 if noisy else 8)
    fitting = budget_bytes // bytes_per_row
    return max(ROW_MULTIPLE, fitting // ROW_MULTIPLE * ROW_MULTIPLE)


def _take(rows: RowNoise, index: slice | Tensor) -> RowNoise:
    return RowNoise(**{f.name: getattr(rows, f.name)[index] for f in dataclasses.fields(rows)})


def _logits(hidden: Tensor, head_weight: Tensor) -> Tensor:
    """At least float32 [rows, vocab_size]."""
    missing = -hidden.shape[0] % ROW_MULTIPLE
    padded = F.pad(hidden, (0, 0, 0, missing)) if missing else hidden
    logits = F.linear(padded, head_weight)[: hidden.shape[0]]
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _choose(logits: Tensor, rows: RowNoise, mask_token_id: int) -> tuple[Tensor, Tensor]:
    mask_logit = logits[:, mask_token_id].clone()
    logits[:, mask_token_id] = -torch.inf
    top, token = logits.max(dim=-1)
    noisy = (rows.temperature > 0).nonzero().squeeze(1)
    if noisy.numel():
        token[noisy] = _sample(logits[noisy], _take(rows, noisy))
    chosen = logits.gather(1, token.unsqueeze(1)).squeeze(1)
    peak = torch.maximum(top, mask_logit)
    total = logits.sub_(peak.unsqueeze(1)).exp_().sum(dim=-1) + (mask_logit - peak).exp()
    return token, (chosen - peak).exp() / total


def _sample(logits: Tensor, rows: RowNoise) -> Tensor:
    scaled = logits.to(torch.float64) / rows.temperature.unsqueeze(1)
    scaled = _filter_top_p(scaled, rows.top_p)
    scaled = _filter_top_k(scaled, rows.top_k)
    keys = noise.row_keys(rows.seed, rows.step, rows.position, noise.STREAM_TOKEN)
    return (scaled + noise.gumbel(keys, logits.shape[1])).argmax(dim=-1)


def _filter_top_p(logits: Tensor, top_p: Tensor) -> Tensor:
    """Keep the smallest set of best tokens whose probability reaches `top_p` (Holtzman 2020)."""
    if bool((top_p >= 1).all()):
        return logits
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    probability = ordered.softmax(dim=-1)
    before = probability.cumsum(dim=-1) - probability
    dropped = before >= top_p.unsqueeze(1)
    return logits.masked_fill(torch.zeros_like(dropped).scatter(1, order, dropped), -torch.inf)


def _filter_top_k(logits: Tensor, top_k: Tensor) -> Tensor:
    """Keep the `top_k` best tokens of each row; 0 keeps all."""
    limit = int(top_k.max())
    if limit == 0:
        return logits
    limit = min(limit, logits.shape[1])
    best = logits.topk(limit, dim=-1).values
    kth = best.gather(1, (top_k.clamp(1, limit) - 1).unsqueeze(1))
    dropped = (logits < kth) & (top_k > 0).unsqueeze(1)
    return logits.masked_fill(dropped, -torch.inf)
