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

from dllm_engine.ops import LOWEST, TILE, Head, HeadOptions, HeadStatistics, noise
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
_CLEAN_BYTES, _ENTROPY_BYTES, _NOISY_BYTES = 16, 32, 64
_LANES = 64


def by_tiles(
    hidden: Tensor,
    head: Head,
    rows: RowSampling,
    special: SpecialTokens,
    budget_bytes: int,
    needs_entropy: bool,
    credits: Credits | None = None,
) -> Candidates:
    """Candidates of rows without filters, from the clean distribution (see `sample_candidates`)."""
    row_bytes = _row_bytes(head, rows.flags.noisy, needs_entropy)
    chunk = max(ROW_MULTIPLE, budget_bytes // row_bytes // ROW_MULTIPLE * ROW_MULTIPLE)
    slices = [slice(i, i + chunk) for i in range(0, max(1, len(hidden)), chunk)]
    parts = [
        _candidates(
            hidden[part],
            head,
            _options(rows.take(part), special, needs_entropy),
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


def _row_bytes(head: Head, noisy: bool, needs_entropy: bool) -> int:
    """Bytes that a row of a chunk takes while its statistics are made."""
    if head.kernels:
        return head.statistics_bytes(noisy=noisy, needs_entropy=needs_entropy)
    clean = _ENTROPY_BYTES if needs_entropy else _CLEAN_BYTES
    return min(TILE, head.vocab_size) * (_NOISY_BYTES if noisy else clean)


def _options(rows: RowSampling, special: SpecialTokens, needs_entropy: bool) -> HeadOptions:
    flags, keys = rows.flags, None
    if flags.noisy:
        keys = noise.row_keys(rows.seed, rows.step, rows.position, noise.STREAM_TOKEN)
    return HeadOptions(
        mask=special.mask,
        eos=special.eos,
        stop=special.stop,
        logits_eos_inf=rows.logits_eos_inf if flags.logits_eos_inf else None,
        confidence_eos_eot_inf=rows.confidence_eos_eot_inf
        if flags.confidence_eos_eot_inf
        else None,
        temperature=rows.temperature if flags.noisy else None,
        keys=keys,
        needs_entropy=needs_entropy,
    )


def _candidates(
    hidden: Tensor, head: Head, options: HeadOptions, credits: Credits | None
) -> Candidates:
    extra_tokens = None if credits is None else credits.tokens
    of_rows = head.statistics if head.kernels else functools.partial(tiled_statistics, head)
    found = of_rows(hidden, options, extra_tokens)
    if isinstance(head, SlicedHead):
        found = merge_over_ranks(found, head.group)
    token, logit = found.token, found.logit
    if options.confidence_eos_eot_inf is not None:
        is_stop = options.confidence_eos_eot_inf & torch.isin(token, options.stop)
        logit = logit.masked_fill(is_stop, -torch.inf)
    confidence = (logit - found.max_logit).exp() / found.sum_exp
    after = None
    if credits is not None and found.extra_logits is not None:
        fused = decide(credits, found.extra_logits, token, logit, found.max_logit, found.sum_exp)
        token = torch.where(credits.used, fused.token, token)
        confidence = torch.where(credits.used, fused.confidence, confidence)
        after = fused.credits
    if not options.needs_entropy:
        nothing = torch.zeros_like(confidence)
        return Candidates(token, confidence, nothing, nothing, after)
    entropy = found.sum_exp.log() - found.sum_exp_logit / found.sum_exp
    margin = (1 - (found.second - found.max_logit).exp()) / found.sum_exp
    return Candidates(token, confidence, entropy, margin, after)


def tiled_statistics(
    head: Head, hidden: Tensor, options: HeadOptions, extra_tokens: Tensor | None = None
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
        max_logit=column(LOWEST),
        second=column(LOWEST),
        sum_exp=column(0.0),
        sum_exp_logit=column(0.0),
        extra_logits=None
        if extra_tokens is None
        else torch.full_like(extra_tokens, -torch.inf, dtype=wide),
    )
    noisy = None
    if options.temperature is not None:
        noisy = (options.temperature > 0).nonzero().squeeze(1)
    padded = pad_rows(hidden)
    for start in head.tile_starts:
        tile = widen(head.logits(padded, start)[:count])
        _fold_tile(running, tile, start, options, noisy, extra_tokens)
    return running


def _fold_tile(
    running: HeadStatistics,
    tile: Tensor,
    start: int,
    options: HeadOptions,
    noisy: Tensor | None,
    extra_tokens: Tensor | None,
) -> None:
    """Fold the logits [rows, width] of tokens `start` and up into `running`; overwrites them."""
    if options.logits_eos_inf is not None:
        forbid_here(tile, options.logits_eos_inf, options.eos, start)
    mask = options.mask - start
    mask_here = 0 <= mask < tile.shape[1]
    mask_logit = tile[:, mask].clone() if mask_here else None
    if mask_here:
        tile[:, mask] = -torch.inf
    largest, place = best_of(tile)
    _fold_choice(running, tile, largest, place, start, options, noisy)
    if mask_logit is not None:
        tile[:, mask] = mask_logit
        largest = torch.maximum(largest, mask_logit)
    if options.confidence_eos_eot_inf is not None:
        forbid_here(tile, options.confidence_eos_eot_inf, options.stop, start)
        largest = tile.amax(dim=1)
    if extra_tokens is not None:
        _fold_extra(running, tile, start, extra_tokens)
    if options.needs_entropy:
        _fold_second(running, tile, largest)
    max_logit = torch.maximum(running.max_logit, largest)
    rescale = (running.max_logit - max_logit).exp()
    shifted = tile.sub_(max_logit.unsqueeze(1))
    if options.needs_entropy:
        weight = shifted.exp()
        # A forbidden token has logit −inf and weight 0; it adds nothing, not NaN.
        inner = (weight * shifted.masked_fill_(weight == 0, 0.0)).sum(dim=1)
        moved = running.sum_exp_logit + (running.max_logit - max_logit) * running.sum_exp
        running.sum_exp_logit = rescale * moved + inner
        shifted = weight
    else:
        shifted.exp_()
    running.sum_exp = rescale * running.sum_exp + shifted.sum(dim=1)
    running.max_logit = max_logit


def _fold_choice(
    running: HeadStatistics,
    tile: Tensor,
    largest: Tensor,
    place: Tensor,
    start: int,
    options: HeadOptions,
    noisy: Tensor | None,
) -> None:
    """The best token so far; of noisy rows, by logit / T + Gumbel noise."""
    # A copy, for a float64 model too: the caller goes on with `largest`.
    score, logit = largest.to(torch.float64, copy=True), largest
    if noisy is not None and noisy.numel():
        assert options.temperature is not None
        assert options.keys is not None
        noised = tile[noisy].to(torch.float64).div_(options.temperature[noisy].unsqueeze(1))
        noised += noise.gumbel(options.keys[noisy], tile.shape[1], start)
        score[noisy], place[noisy] = noised.max(dim=1)
        logit = tile.gather(1, place.unsqueeze(1)).squeeze(1)
    better = score > running.score
    running.token = torch.where(better, place + start, running.token)
    running.logit = torch.where(better, logit, running.logit)
    running.score = torch.where(better, score, running.score)


def _fold_extra(running: HeadStatistics, tile: Tensor, start: int, extra_tokens: Tensor) -> None:
    """Logits of the extra tokens that lie in the tile."""
    assert running.extra_logits is not None
    place = extra_tokens - start
    here = (extra_tokens >= 0) & (place >= 0) & (place < tile.shape[1])
    logits = tile.gather(1, place.clamp(0, tile.shape[1] - 1))
    running.extra_logits = torch.where(here, logits, running.extra_logits)


def _fold_second(running: HeadStatistics, tile: Tensor, largest: Tensor) -> None:
    """The second largest logit so far; equal ones count apart."""
    is_largest = tile == largest.unsqueeze(1)
    below = tile.masked_fill(is_largest, -torch.inf).amax(dim=1)
    second = torch.where(is_largest.sum(dim=1) > 1, largest, below)
    lower = torch.minimum(running.max_logit, largest)
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
