"""The head with its reduction: logits are made a tile at a time and folded into running statistics.

A tile is some rows × some of the vocabulary. What is kept between tiles is, per row, the best
token, the largest logit m, Σ exp(l − m) and, where asked for, Σ exp(l − m)(l − m) and the second
largest logit: the online softmax of Milakov & Gimelshein (2018), with entropy and runner-up.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops import TILE, Head
from ..parallel import SlicedHead
from . import noise
from .credit import LISTED, Credits, decide
from .merge import merge_over_ranks
from .rows import (
    ROW_MULTIPLE,
    Candidates,
    RowSampling,
    SpecialTokens,
    forbid,
    joined,
    pad_rows,
    widen,
)

#: Bytes per logit of a tile, with all that is made of it: for the best token and Σ exp alone, for
#: entropy and runner-up besides, and with the noise, which is made in float64 and int64.
_CLEAN_BYTES, _SPREAD_BYTES, _NOISY_BYTES = 16, 32, 64
#: Below every logit, and finite, so that differences from it are numbers.
_LOWEST = -1e30
_LANES = 64


@dataclasses.dataclass
class _Running:
    """Statistics of the tiles seen so far; all [rows]."""

    #: Best token that may be chosen, by logit or by logit and noise; its score; its logit.
    token: Tensor
    score: Tensor
    logit: Tensor
    #: Of the whole distribution: largest and second largest logit.
    peak: Tensor
    second: Tensor
    #: Σ exp(l − peak), and the same weighted with l − peak.
    total: Tensor
    weighted: Tensor
    #: [rows, K]; logits of tokens with credit.
    listed: Tensor | None = None


def by_tiles(
    hidden: Tensor,
    head: Head,
    rows: RowSampling,
    special: SpecialTokens,
    budget_bytes: int,
    with_spread: bool,
    credits: Credits | None = None,
) -> Candidates:
    """Candidates of rows without filters, from the clean distribution (see `sample_candidates`)."""
    noisy = bool((rows.temperature > 0).any())
    plain = _SPREAD_BYTES if with_spread else _CLEAN_BYTES
    tile_bytes = min(TILE, head.vocab_size) * (_NOISY_BYTES if noisy else plain)
    fitting = budget_bytes // tile_bytes
    chunk = max(ROW_MULTIPLE, fitting // ROW_MULTIPLE * ROW_MULTIPLE)
    slices = [slice(i, i + chunk) for i in range(0, max(1, len(hidden)), chunk)]
    parts = [
        _reduce(
            hidden[part],
            head,
            rows.take(part),
            special,
            with_spread,
            None if credits is None else credits.take(part),
        )
        for part in slices
    ]
    found = joined(parts)
    if credits is None:
        return found
    lists = [part.credits for part in parts if part.credits is not None]
    after = Credits(
        credits.used,
        torch.cat([part.tokens for part in lists]),
        torch.cat([part.values for part in lists]),
    )
    return dataclasses.replace(found, credits=after)


def _reduce(
    hidden: Tensor,
    head: Head,
    rows: RowSampling,
    special: SpecialTokens,
    spread: bool,
    credits: Credits | None,
) -> Candidates:
    count = len(hidden)
    wide = torch.promote_types(hidden.dtype, torch.float32)

    def column(value: float, dtype: torch.dtype = wide) -> Tensor:
        return torch.full((count,), value, dtype=dtype, device=hidden.device)

    running = _Running(
        token=column(0, torch.int64),
        score=column(_LOWEST, torch.float64),
        logit=column(0.0),
        peak=column(_LOWEST),
        second=column(_LOWEST),
        total=column(0.0),
        weighted=column(0.0),
        listed=None if credits is None else column(-torch.inf)[:, None].repeat(1, LISTED),
    )
    noisy = (rows.temperature > 0).nonzero().squeeze(1)
    late = bool(rows.late_eos.any())
    padded = pad_rows(hidden)
    for start in head.tile_starts:
        tile = widen(head.logits(padded, start)[:count])
        _fold_tile(running, tile, start, rows, special, noisy, late, spread, credits)
    if isinstance(head, SlicedHead):
        running = merge_over_ranks(running, head.group)
    if late:
        is_stop = rows.late_eos & torch.isin(running.token, special.stop)
        running.logit.masked_fill_(is_stop, -torch.inf)
    token = running.token
    confidence = (running.logit - running.peak).exp() / running.total
    after = None
    if credits is not None and running.listed is not None:
        fused = decide(credits, running.listed, token, running.logit, running.peak, running.total)
        token = torch.where(credits.used, fused.token, token)
        confidence = torch.where(credits.used, fused.confidence, confidence)
        after = fused.credits
    if not spread:
        nothing = torch.zeros_like(confidence)
        return Candidates(token, confidence, nothing, nothing, after)
    entropy = running.total.log() - running.weighted / running.total
    margin = (1 - (running.second - running.peak).exp()) / running.total
    return Candidates(token, confidence, entropy, margin, after)


def _fold_tile(
    running: _Running,
    tile: Tensor,
    start: int,
    rows: RowSampling,
    special: SpecialTokens,
    noisy: Tensor,
    late: bool,
    spread: bool,
    credits: Credits | None,
) -> None:
    """Fold the logits [rows, width] of tokens `start` and up into `running`; overwrites them."""
    forbid_here(tile, rows.no_eos, special.eos, start)
    mask = special.mask - start
    mask_here = 0 <= mask < tile.shape[1]
    mask_logit = tile[:, mask].clone() if mask_here else None
    if mask_here:
        tile[:, mask] = -torch.inf
    largest, place = best_of(tile)
    _fold_choice(running, tile, largest, place, start, rows, noisy)
    if mask_logit is not None:
        tile[:, mask] = mask_logit
        largest = torch.maximum(largest, mask_logit)
    if late:
        forbid_here(tile, rows.late_eos, special.stop, start)
        largest = tile.amax(dim=1)
    if credits is not None:
        _fold_listed(running, tile, start, credits)
    if spread:
        _fold_second(running, tile, largest)
    peak = torch.maximum(running.peak, largest)
    rescale = (running.peak - peak).exp()
    shifted = tile.sub_(peak.unsqueeze(1))
    if spread:
        weight = shifted.exp()
        # A forbidden token has logit −inf and weight 0; it adds nothing, not NaN.
        inner = (weight * shifted.masked_fill_(weight == 0, 0.0)).sum(dim=1)
        moved = running.weighted + (running.peak - peak) * running.total
        running.weighted = rescale * moved + inner
        shifted = weight
    else:
        shifted.exp_()
    running.total = rescale * running.total + shifted.sum(dim=1)
    running.peak = peak


def _fold_choice(
    running: _Running,
    tile: Tensor,
    largest: Tensor,
    place: Tensor,
    start: int,
    rows: RowSampling,
    noisy: Tensor,
) -> None:
    """The best token so far; of noisy rows, by logit / T + Gumbel noise."""
    # A copy, for a float64 model too: the caller goes on with `largest`.
    score, logit = largest.to(torch.float64, copy=True), largest
    if noisy.numel():
        theirs = rows.take(noisy)
        keys = noise.row_keys(theirs.seed, theirs.step, theirs.position, noise.STREAM_TOKEN)
        noised = tile[noisy].to(torch.float64).div_(theirs.temperature.unsqueeze(1))
        noised += noise.gumbel(keys, tile.shape[1], start)
        score[noisy], place[noisy] = noised.max(dim=1)
        logit = tile.gather(1, place.unsqueeze(1)).squeeze(1)
    better = score > running.score
    running.token = torch.where(better, place + start, running.token)
    running.logit = torch.where(better, logit, running.logit)
    running.score = torch.where(better, score, running.score)


def _fold_listed(running: _Running, tile: Tensor, start: int, credits: Credits) -> None:
    """Logits of the listed tokens that lie in the tile."""
    assert running.listed is not None
    place = credits.tokens - start
    here = (place >= 0) & (place < tile.shape[1])
    logits = tile.gather(1, place.clamp(0, tile.shape[1] - 1))
    running.listed = torch.where(here & (credits.tokens >= 0), logits, running.listed)


def _fold_second(running: _Running, tile: Tensor, largest: Tensor) -> None:
    """The second largest logit so far; equal ones count apart."""
    is_largest = tile == largest.unsqueeze(1)
    below = tile.masked_fill(is_largest, -torch.inf).amax(dim=1)
    second = torch.where(is_largest.sum(dim=1) > 1, largest, below)
    lower = torch.minimum(running.peak, largest)
    running.second = torch.maximum(torch.maximum(running.second, second), lower)


def best_of(tile: Tensor) -> tuple[Tensor, Tensor]:
    """Largest value of each row and its place, the leftmost of equal ones.

    The maximum of lanes first: torch's maximum with places is not vectorised on CPUs, and forty
    times slower than without.
    """
    missing = -tile.shape[1] % _LANES
    lanes = F.pad(tile, (0, missing), value=-torch.inf) if missing else tile
    lanes = lanes.view(len(tile), lanes.shape[1] // _LANES, _LANES)
    group = lanes.amax(dim=2).argmax(dim=1)
    inside = lanes[torch.arange(len(tile), device=tile.device), group]
    value, place = inside.max(dim=1)
    return value, group * _LANES + place


def forbid_here(tile: Tensor, where: Tensor, ids: Tensor, start: int) -> None:
    """`forbid` for those of `ids` that lie in the tile from token `start` on."""
    inside = ids[(ids >= start) & (ids < start + tile.shape[1])]
    if inside.numel():
        forbid(tile, where, inside - start)
