"""The head with its reduction: logits are made a tile at a time and folded into running statistics.

By one kernel where the head has kernels, and by the loop of this file elsewhere. A tile is some
rows × some of the vocabulary. What is kept between tiles is, per row, the best token, the largest
logit m, Σ exp(l − m) and, where asked for, Σ exp(l − m)(l − m) and the second largest logit: the
online softmax of Milakov & Gimelshein (2018), with entropy and runner-up.
"""

from __future__ import annotations

import dataclasses
import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from dllm_engine.ops import LOWEST, TILE, Choice, Head, HeadStatistics, noise
from dllm_engine.parallel import SlicedHead
from dllm_engine.sampling.credit import Credits, decide
from dllm_engine.sampling.rank_merge import merge_over_ranks
from dllm_engine.sampling.rows import (
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
_LANES = 64


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
    row_bytes = _row_bytes(head, rows.flags.noisy, with_spread)
    chunk = max(ROW_MULTIPLE, budget_bytes // row_bytes // ROW_MULTIPLE * ROW_MULTIPLE)
    slices = [slice(i, i + chunk) for i in range(0, max(1, len(hidden)), chunk)]
    parts = [
        _candidates(
            hidden[part],
            head,
            _choice(rows.take(part), special, with_spread),
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


def _row_bytes(head: Head, noisy: bool, spread: bool) -> int:
    """Bytes that a row of a chunk takes while its statistics are made."""
    if head.kernels:
        return head.statistics_bytes(noisy=noisy, spread=spread)
    clean = _SPREAD_BYTES if spread else _CLEAN_BYTES
    return min(TILE, head.vocab_size) * (_NOISY_BYTES if noisy else clean)


def _choice(rows: RowSampling, special: SpecialTokens, spread: bool) -> Choice:
    flags, keys = rows.flags, None
    if flags.noisy:
        keys = noise.row_keys(rows.seed, rows.step, rows.position, noise.STREAM_TOKEN)
    return Choice(
        mask=special.mask,
        eos=special.eos,
        stop=special.stop,
        no_eos=rows.no_eos if flags.no_eos else None,
        late_eos=rows.late_eos if flags.late_eos else None,
        temperature=rows.temperature if flags.noisy else None,
        keys=keys,
        spread=spread,
    )


def _candidates(hidden: Tensor, head: Head, choice: Choice, credits: Credits | None) -> Candidates:
    listed = None if credits is None else credits.tokens
    of_rows = head.statistics if head.kernels else functools.partial(tiled_statistics, head)
    found = of_rows(hidden, choice, listed)
    if isinstance(head, SlicedHead):
        found = merge_over_ranks(found, head.group)
    token, logit = found.token, found.logit
    if choice.late_eos is not None:
        is_stop = choice.late_eos & torch.isin(token, choice.stop)
        logit = logit.masked_fill(is_stop, -torch.inf)
    confidence = (logit - found.peak).exp() / found.total
    after = None
    if credits is not None and found.listed is not None:
        fused = decide(credits, found.listed, token, logit, found.peak, found.total)
        token = torch.where(credits.used, fused.token, token)
        confidence = torch.where(credits.used, fused.confidence, confidence)
        after = fused.credits
    if not choice.spread:
        nothing = torch.zeros_like(confidence)
        return Candidates(token, confidence, nothing, nothing, after)
    entropy = found.total.log() - found.weighted / found.total
    margin = (1 - (found.second - found.peak).exp()) / found.total
    return Candidates(token, confidence, entropy, margin, after)


def tiled_statistics(
    head: Head, hidden: Tensor, choice: Choice, listed: Tensor | None = None
) -> HeadStatistics:
    """What `head.statistics` says, by this file's loop: for any head."""
    count = len(hidden)
    wide = torch.promote_types(hidden.dtype, torch.float32)

    def column(value: float, dtype: torch.dtype = wide) -> Tensor:
        return torch.full((count,), value, dtype=dtype, device=hidden.device)

    running = HeadStatistics(
        token=column(0, torch.int64),
        score=column(LOWEST, torch.float64),
        logit=column(LOWEST),
        peak=column(LOWEST),
        second=column(LOWEST),
        total=column(0.0),
        weighted=column(0.0),
        listed=None if listed is None else torch.full_like(listed, -torch.inf, dtype=wide),
    )
    noisy = None
    if choice.temperature is not None:
        noisy = (choice.temperature > 0).nonzero().squeeze(1)
    padded = pad_rows(hidden)
    for start in head.tile_starts:
        tile = widen(head.logits(padded, start)[:count])
        _fold_tile(running, tile, start, choice, noisy, listed)
    return running


def _fold_tile(
    running: HeadStatistics,
    tile: Tensor,
    start: int,
    choice: Choice,
    noisy: Tensor | None,
    listed: Tensor | None,
) -> None:
    """Fold the logits [rows, width] of tokens `start` and up into `running`; overwrites them."""
    if choice.no_eos is not None:
        forbid_here(tile, choice.no_eos, choice.eos, start)
    mask = choice.mask - start
    mask_here = 0 <= mask < tile.shape[1]
    mask_logit = tile[:, mask].clone() if mask_here else None
    if mask_here:
        tile[:, mask] = -torch.inf
    largest, place = best_of(tile)
    _fold_choice(running, tile, largest, place, start, choice, noisy)
    if mask_logit is not None:
        tile[:, mask] = mask_logit
        largest = torch.maximum(largest, mask_logit)
    if choice.late_eos is not None:
        forbid_here(tile, choice.late_eos, choice.stop, start)
        largest = tile.amax(dim=1)
    if listed is not None:
        _fold_listed(running, tile, start, listed)
    if choice.spread:
        _fold_second(running, tile, largest)
    peak = torch.maximum(running.peak, largest)
    rescale = (running.peak - peak).exp()
    shifted = tile.sub_(peak.unsqueeze(1))
    if choice.spread:
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
    running: HeadStatistics,
    tile: Tensor,
    largest: Tensor,
    place: Tensor,
    start: int,
    choice: Choice,
    noisy: Tensor | None,
) -> None:
    """The best token so far; of noisy rows, by logit / T + Gumbel noise."""
    # A copy, for a float64 model too: the caller goes on with `largest`.
    score, logit = largest.to(torch.float64, copy=True), largest
    if noisy is not None and noisy.numel():
        assert choice.temperature is not None
        assert choice.keys is not None
        noised = tile[noisy].to(torch.float64).div_(choice.temperature[noisy].unsqueeze(1))
        noised += noise.gumbel(choice.keys[noisy], tile.shape[1], start)
        score[noisy], place[noisy] = noised.max(dim=1)
        logit = tile.gather(1, place.unsqueeze(1)).squeeze(1)
    better = score > running.score
    running.token = torch.where(better, place + start, running.token)
    running.logit = torch.where(better, logit, running.logit)
    running.score = torch.where(better, score, running.score)


def _fold_listed(running: HeadStatistics, tile: Tensor, start: int, listed: Tensor) -> None:
    """Logits of the listed tokens that lie in the tile."""
    assert running.listed is not None
    place = listed - start
    here = (listed >= 0) & (place >= 0) & (place < tile.shape[1])
    logits = tile.gather(1, place.clamp(0, tile.shape[1] - 1))
    running.listed = torch.where(here, logits, running.listed)


def _fold_second(running: HeadStatistics, tile: Tensor, largest: Tensor) -> None:
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
