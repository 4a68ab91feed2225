"""The torch implementation of the head's statistics, and the reference for its kernel.

It makes logits a tile at a time (some rows × some of the vocabulary) and folds each tile into
running statistics. Between tiles it keeps, per row, the best token, the largest logit m,
Σ exp(l − m) and, if entropies are needed, Σ exp(l − m)(l − m) and the second largest logit: the
online softmax of Milakov & Gimelshein (2018), with entropy and runner-up.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dllm_engine.ops import noise
from dllm_engine.ops.head_types import LOWEST, TILE, HeadOptions, HeadStatistics, TiledHead
from dllm_engine.ops.rows import forbid, pad_rows, widen

#: Bytes per logit of a tile, including everything made from it: with the best token and Σ exp
#: alone, with entropy and runner-up, and with noise.
_CLEAN_BYTES, _ENTROPY_BYTES, _NOISY_BYTES = 16, 32, 32
_LANES = 64


def head_statistics(
    head: TiledHead, hidden: Tensor, options: HeadOptions, extra_tokens: Tensor | None = None
) -> HeadStatistics:
    """See `Head.statistics`."""
    count = len(hidden)
    wide = torch.promote_types(hidden.dtype, torch.float32)
    running = start_of(count, wide, hidden.device)
    if extra_tokens is not None:
        running.extra_logits = torch.full_like(extra_tokens, -torch.inf, dtype=wide)
    noisy = None
    if options.inverse_temperature is not None:
        noisy = (options.inverse_temperature > 0).nonzero().squeeze(1)
    padded = pad_rows(hidden)
    for start in head.tile_starts:
        tile = widen(head.logits(padded, start)[:count])
        _fold_tile(running, tile, start, options, noisy, extra_tokens)
    return running


def start_of(rows: int, wide: torch.dtype, device: torch.device) -> HeadStatistics:
    """The statistics of no token."""

    def column(value: float, dtype: torch.dtype = wide) -> Tensor:
        return torch.full((rows,), value, dtype=dtype, device=device)

    return HeadStatistics(
        token=column(0, torch.int64),
        score=column(LOWEST),
        logit=column(LOWEST),
        max_logit=column(LOWEST),
        second=column(LOWEST),
        sum_exp=column(0.0),
        sum_exp_logit=column(0.0),
    )


def head_statistics_bytes(head: TiledHead, noisy: bool, needs_entropy: bool) -> int:
    """See `Head.statistics_bytes`."""
    clean = _ENTROPY_BYTES if needs_entropy else _CLEAN_BYTES
    return min(TILE, head.vocab_size) * (_NOISY_BYTES if noisy else clean)


def _fold_tile(
    running: HeadStatistics,
    tile: Tensor,
    start: int,
    options: HeadOptions,
    noisy: Tensor | None,
    extra_tokens: Tensor | None,
) -> None:
    """Fold the logits [rows, width] of the tile from token `start` on; overwrites them."""
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
        fold_second(running, tile, largest)
    fold_sums(running, tile, largest, needs_entropy=options.needs_entropy)


def fold_sums(
    running: HeadStatistics, tile: Tensor, largest: Tensor, *, needs_entropy: bool
) -> None:
    """Update the largest logit and the sums relative to it; overwrites the tile."""
    max_logit = torch.maximum(running.max_logit, largest)
    below = running.max_logit - max_logit
    rescale = below.exp()
    shifted = tile.sub_(max_logit.unsqueeze(1))
    if needs_entropy:
        weight = shifted.exp()
        # A forbidden token has logit −inf and weight 0; it must add 0, not NaN.
        inner = (weight * shifted.masked_fill_(weight == 0, 0.0)).sum(dim=1)
        moved = running.sum_exp_logit + below * running.sum_exp
        running.sum_exp_logit = rescale * moved + inner
    else:
        weight = shifted.exp_()
    running.sum_exp = rescale * running.sum_exp + weight.sum(dim=1)
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
    """Update the best token: by logit, or by logit / T + Gumbel noise in noisy rows."""
    score, logit = largest.clone(), largest
    if noisy is not None and noisy.numel():
        assert options.inverse_temperature is not None
        assert options.keys is not None
        noised = tile[noisy].mul_(options.inverse_temperature[noisy].unsqueeze(1))
        noised += noise.gumbel(options.keys[noisy], tile.shape[1], start)
        score[noisy], place[noisy] = noised.max(dim=1)
        logit = tile.gather(1, place.unsqueeze(1)).squeeze(1)
    better = score > running.score
    running.token = torch.where(better, place + start, running.token)
    running.logit = torch.where(better, logit, running.logit)
    running.score = torch.where(better, score, running.score)


def _fold_extra(running: HeadStatistics, tile: Tensor, start: int, extra_tokens: Tensor) -> None:
    """Store the logits of the extra tokens that lie in the tile."""
    assert running.extra_logits is not None
    place = extra_tokens - start
    here = (extra_tokens >= 0) & (place >= 0) & (place < tile.shape[1])
    logits = tile.gather(1, place.clamp(0, tile.shape[1] - 1))
    running.extra_logits = torch.where(here, logits, running.extra_logits)


def fold_second(running: HeadStatistics, tile: Tensor, largest: Tensor) -> None:
    """Update the second largest logit; equal logits count separately."""
    is_largest = tile == largest.unsqueeze(1)
    below = tile.masked_fill(is_largest, -torch.inf).amax(dim=1)
    second = torch.where(is_largest.sum(dim=1) > 1, largest, below)
    lower = torch.minimum(running.max_logit, largest)
    running.second = torch.maximum(torch.maximum(running.second, second), lower)


def best_of(tile: Tensor) -> tuple[Tensor, Tensor]:
    """Largest value of each row and its column, the leftmost of equal values.

    Reduces lanes first: on CPUs torch's maximum with indices is not vectorised, and forty times
    slower than the maximum alone.
    """
    missing = -tile.shape[1] % _LANES
    lanes = F.pad(tile, (0, missing), value=-torch.inf) if missing else tile
    lanes = lanes.view(len(tile), lanes.shape[1] // _LANES, _LANES)
    group = lanes.amax(dim=2).argmax(dim=1)
    inside = lanes[torch.arange(len(tile), device=tile.device), group]
    value, place = inside.max(dim=1)
    return value, group * _LANES + place


def forbid_here(tile: Tensor, where: Tensor, ids: Tensor, start: int) -> None:
    """Forbid the tokens `ids` that lie in the tile from token `start` on."""
    inside = ids[(ids >= start) & (ids < start + tile.shape[1])]
    if inside.numel():
        forbid(tile, where, inside - start)
