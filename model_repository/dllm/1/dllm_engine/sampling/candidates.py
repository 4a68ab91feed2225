"""Which token each masked position would take, and how sure the model is of it.

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
class RowSampling:
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
    #: bool; statistics of the tempered and filtered distribution (Dream) instead of the clean.
    tempered: Tensor
    #: bool; never choose an end-of-text token.
    no_eos: Tensor
    #: bool; confidence as if there were no end-of-text or end-of-turn tokens.
    late_eos: Tensor


@dataclasses.dataclass(frozen=True)
class SpecialTokens:
    """Ids that sampling treats apart; int64 tensors on the model's device."""

    #: May never be chosen.
    mask: int
    #: [n]; end of text.
    eos: Tensor
    #: [n]; everything that ends an answer.
    stop: Tensor


@dataclasses.dataclass(frozen=True)
class Candidates:
    """The chosen token of each row and how sure the model is of it; all [rows].

    Statistics are float32 (float64 for a float64 model), of softmax(logits) unless the row asks
    for the tempered distribution.
    """

    #: int64.
    token: Tensor
    #: Probability of the chosen token.
    confidence: Tensor
    #: Shannon entropy in nats.
    entropy: Tensor
    #: Difference of the two largest probabilities.
    margin: Tensor


def sample_candidates(
    hidden: Tensor,
    head_weight: Tensor,
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
        head_weight: [vocab_size, hidden_size].
        rows: temperature, seed, step, position and filters of each row.
        special: the ids that some rows or all treat apart.
        budget_bytes: what the logits (and their noise) may take at once.
        with_spread: compute entropy and margin; zeros otherwise.
    """
    wide = bool(((rows.temperature > 0) | rows.tempered).any())
    chunk = _rows_per_chunk(head_weight.shape[0], budget_bytes, wide)
    parts = []
    for start in range(0, hidden.shape[0], chunk):
        part = slice(start, start + chunk)
        logits = _logits(hidden[part], head_weight)
        parts.append(_choose(logits, _take(rows, part), special, with_spread))
    names = [field.name for field in dataclasses.fields(Candidates)]
    return Candidates(**{name: torch.cat([getattr(p, name) for p in parts]) for name in names})


def _rows_per_chunk(vocab_size: int, budget_bytes: int, wide: bool) -> int:
    # Greedy rows hold logits and their exponentials; others int64 and float64 noise beside.
    bytes_per_row = vocab_size * (64 if wide else 12)
    fitting = budget_bytes // bytes_per_row
    return max(ROW_MULTIPLE, fitting // ROW_MULTIPLE * ROW_MULTIPLE)


def _take(rows: RowSampling, index: slice | Tensor) -> RowSampling:
    fields = dataclasses.fields(rows)
    return RowSampling(**{f.name: getattr(rows, f.name)[index] for f in fields})


def _logits(hidden: Tensor, head_weight: Tensor) -> Tensor:
    """At least float32 [rows, vocab_size]."""
    missing = -hidden.shape[0] % ROW_MULTIPLE
    padded = F.pad(hidden, (0, 0, 0, missing)) if missing else hidden
    logits = F.linear(padded, head_weight)[: hidden.shape[0]]
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _choose(
    logits: Tensor, rows: RowSampling, special: SpecialTokens, with_spread: bool
) -> Candidates:
    _forbid(logits, rows.no_eos, special.eos)
    mask_logit = logits[:, special.mask].clone()
    logits[:, special.mask] = -torch.inf
    token = logits.argmax(dim=-1)
    # At temperature 0 and without filters Dream's distribution is the clean one.
    filters = (rows.top_p < 1) | (rows.top_k > 0)
    uncommon = ((rows.temperature > 0) | (rows.tempered & filters)).nonzero().squeeze(1)
    filtered = None
    if uncommon.numel():
        theirs = _take(rows, uncommon)
        filtered = _tempered(logits[uncommon], theirs)
        token[uncommon] = _draw(filtered, theirs)
    logits[:, special.mask] = mask_logit
    _forbid(logits, rows.late_eos, special.stop)
    found = _statistics(logits, token, with_spread)
    if filtered is not None:
        tempered = rows.tempered[uncommon]
        index = uncommon[tempered]
        inner = _statistics(filtered[tempered], token[index], with_spread)
        for name in ("confidence", "entropy", "margin"):
            column = getattr(found, name)
            column[index] = getattr(inner, name).to(column.dtype)
    return found


def _forbid(logits: Tensor, where: Tensor, ids: Tensor) -> None:
    """Set the logits of `ids` to −inf in the rows that ask for it."""
    chosen = where.nonzero()
    if chosen.numel():
        logits[chosen, ids] = -torch.inf


def _statistics(logits: Tensor, token: Tensor, with_spread: bool) -> Candidates:
    """Confidence of `token`, entropy and margin under softmax(logits). Overwrites `logits`."""
    peak = logits.amax(dim=-1, keepdim=True)
    shifted = logits.sub_(peak)
    chosen = shifted.gather(1, token.unsqueeze(1)).squeeze(1)
    if not with_spread:
        total = shifted.exp_().sum(dim=-1)
        confidence = chosen.exp() / total
        nothing = torch.zeros_like(confidence)
        return Candidates(token, confidence, nothing, nothing.clone())
    second = shifted.topk(2, dim=-1).values[:, 1]
    weight = shifted.exp()
    total = weight.sum(dim=-1)
    # A filtered token has logit −inf and weight 0; it adds nothing, not NaN.
    mean = (weight * shifted.masked_fill_(weight == 0, 0.0)).sum(dim=-1) / total
    return Candidates(token, chosen.exp() / total, total.log() - mean, (1 - second.exp()) / total)


def _tempered(logits: Tensor, rows: RowSampling) -> Tensor:
    """logits / T, then top-p, then top-k (the order of Dream's generation_utils.py); float64."""
    temperature = torch.where(rows.temperature > 0, rows.temperature, 1.0)
    scaled = logits.to(torch.float64) / temperature.unsqueeze(1)
    return _filter_top_k(_filter_top_p(scaled, rows.top_p), rows.top_k)


def _draw(logits: Tensor, rows: RowSampling) -> Tensor:
    token = logits.argmax(dim=-1)
    noisy = (rows.temperature > 0).nonzero().squeeze(1)
    if noisy.numel():
        keys = noise.row_keys(
            rows.seed[noisy], rows.step[noisy], rows.position[noisy], noise.STREAM_TOKEN
        )
        gumbel = noise.gumbel(keys, logits.shape[1])
        token[noisy] = (logits[noisy] + gumbel).argmax(dim=-1)
    return token


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
    limit = min(int(top_k.max()), logits.shape[1])
    if limit == 0:
        return logits
    best = logits.topk(limit, dim=-1).values
    kth = best.gather(1, (top_k.clamp(1, limit) - 1).unsqueeze(1))
    dropped = (logits < kth) & (top_k > 0).unsqueeze(1)
    return logits.masked_fill(dropped, -torch.inf)
