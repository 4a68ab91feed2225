"""Draws tokens from logits that exist whole, since a filter needs the order of a row's tokens.

This is the torch implementation, and the reference for the kernel. It finds the least logit that
each row's filters keep, then goes through the vocabulary a tile at a time, as the head's statistics
do.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from dllm_engine.ops import noise
from dllm_engine.ops.head_statistics import best_of, fold_second, fold_sums, forbid_here, start_of
from dllm_engine.ops.head_types import TILE, Filters, HeadOptions, HeadStatistics
from dllm_engine.ops.rows import forbid

#: Best tokens of a row that are sorted first. On a CPU the whole row is sorted only if these are
#: not enough for its `top_p`.
_SORTED = 512
#: Bytes per number of a tile, per sorted token, and per token where a whole row is sorted.
_TILE_BYTES, _SORTED_BYTES, _WHOLE_BYTES = 48, 56, 48


def draw_bytes(vocab_size: int, element_size: int) -> tuple[int, int]:
    """Bytes that `draw` takes per row, its logits and the parts they are made from included; and
    once."""
    width = max(4, element_size)
    row = 2 * vocab_size * width
    row += min(TILE, vocab_size) * _TILE_BYTES + min(_SORTED, vocab_size) * _SORTED_BYTES
    return row, vocab_size * _WHOLE_BYTES


def draw(logits: Tensor, options: HeadOptions, filters: Filters) -> HeadStatistics:
    """Draw a token of each row, and reduce the distribution that its confidence comes from.

    A row's filters apply to softmax(logits / T), without the mask token: top-p, then top-k (the
    order of Dream's generation_utils.py). A `tempered` row's statistics are those of the result,
    with logits relative to the largest; another row's are those of its logits.

    Args:
        logits: [rows, vocab_size] in float32 or wider; overwritten.
    """
    if options.logits_eos_inf is not None:
        forbid(logits, options.logits_eos_inf, options.eos)
    mask_logit = logits[:, options.mask].clone()
    logits[:, options.mask] = -torch.inf
    highest = logits.amax(dim=1, keepdim=True)
    inverse = options.inverse_temperature
    scale = torch.ones_like(highest)
    if inverse is not None:
        scale = torch.where(inverse > 0, inverse, 1.0).unsqueeze(1)
    bounds = _bounds(logits, highest, scale, filters)
    running = start_of(len(logits), logits.dtype, logits.device)
    for start in range(0, logits.shape[1], TILE):
        tile = logits[:, start : start + TILE]
        shifted = (tile - highest).mul_(scale)
        if bounds is not None:
            shifted.masked_fill_(bounds.dropped(tile), -torch.inf)
        score = shifted
        if inverse is not None:
            assert options.keys is not None
            noised = noise.gumbel(options.keys, tile.shape[1], start).add(shifted)
            score = torch.where((inverse > 0).unsqueeze(1), noised, shifted)
        best, place = best_of(score)
        if 0 <= options.mask - start < tile.shape[1]:
            tile[:, options.mask - start] = mask_logit
        if options.confidence_eos_eot_inf is not None:
            forbid_here(tile, options.confidence_eos_eot_inf, options.stop, start)
        counted = torch.where(filters.tempered.unsqueeze(1), shifted, tile)
        better = best > running.score
        logit = counted.gather(1, place.unsqueeze(1)).squeeze(1)
        running.token = torch.where(better, place + start, running.token)
        running.logit = torch.where(better, logit, running.logit)
        running.score = torch.where(better, best, running.score)
        largest = counted.amax(dim=1)
        if options.needs_entropy:
            fold_second(running, counted, largest)
        fold_sums(running, counted, largest, needs_entropy=options.needs_entropy)
    return running


@dataclasses.dataclass
class _Bounds:
    """Which tokens the filters of some rows keep; [rows, 1] each."""

    #: The least logit that is kept, and how many of the tokens that have it, from the left.
    least: Tensor
    equals: Tensor
    #: Whether a row may keep some of several equal logits.
    divides: bool
    #: Tokens with the least logit in earlier tiles.
    seen: Tensor

    def dropped(self, tile: Tensor) -> Tensor:
        """Tokens of the next tile that the filters drop."""
        if not self.divides:
            return tile < self.least
        equal = tile == self.least
        place = equal.cumsum(dim=1) + self.seen
        self.seen = place[:, -1:]
        return (tile < self.least) | (equal & (place > self.equals))


def _bounds(logits: Tensor, highest: Tensor, scale: Tensor, filters: Filters) -> _Bounds | None:
    """Find the least logit that each row's filters keep; None: no row has a filter."""
    if not (filters.uses_top_p or filters.most_top_k):
        return None
    vocab_size = logits.shape[1]
    top_k = filters.top_k.unsqueeze(1).clamp(max=vocab_size)
    most = min(filters.most_top_k, vocab_size)
    least = torch.full_like(highest, -torch.inf)
    equals = torch.full_like(top_k, vocab_size)
    divides = False
    ordered = logits.topk(_how_many(logits, most, filters.uses_top_p)).values
    if filters.uses_top_p:
        least, equals, divides = _nucleus(logits, ordered, highest, scale, filters)
    if most:
        kth = ordered.gather(1, top_k.clamp(min=1) - 1)
        higher = (top_k > 0) & (kth > least)
        least = torch.where(higher, kth, least)
        equals = torch.where(higher, vocab_size, equals)
    return _Bounds(least, equals, divides, torch.zeros_like(equals))


def _how_many(logits: Tensor, most: int, uses_top_p: bool) -> int:
    """How many of a row's best tokens to sort; all on a GPU, where asking for more would wait."""
    vocab_size = logits.shape[1]
    if not uses_top_p:
        return most
    return vocab_size if logits.device.type != "cpu" else min(vocab_size, max(_SORTED, most))


def _nucleus(
    logits: Tensor, ordered: Tensor, highest: Tensor, scale: Tensor, filters: Filters
) -> tuple[Tensor, Tensor, bool]:
    """The smallest set of best tokens whose probability reaches `top_p` (Holtzman 2020).

    The leftmost of equal tokens come first; a `top_p` of 1 keeps all, however sums round.

    Args:
        ordered: [rows, n]; each row's largest logits, sorted.

    Returns:
        `_Bounds`' first three fields.
    """
    top_p = filters.top_p.unsqueeze(1)
    total = torch.zeros_like(top_p)
    for tile in torch.split(logits, TILE, dim=1):
        total += (tile - highest).mul_(scale).exp_().sum(dim=1, keepdim=True, dtype=top_p.dtype)
    limit = torch.where(top_p < 1, top_p * total, torch.inf)
    least, equals, divides = _last_inside(ordered, highest, scale, limit)
    if ordered.shape[1] < logits.shape[1]:
        # Rows that keep all of these may keep more.
        unknown = (least == ordered[:, -1:]) & (top_p < 1)
        for row in unknown.squeeze(1).nonzero().flatten().tolist():
            one = slice(row, row + 1)
            whole = logits[one].sort(dim=1, descending=True).values
            least[one], equals[one], divides[one] = _last_inside(
                whole, highest[one], scale[one], limit[one]
            )
    limited = top_p < 1
    least = torch.where(limited, least, -torch.inf)
    equals = torch.where(limited, equals, logits.shape[1])
    some = True if logits.device.type != "cpu" else bool((divides & limited).any())
    return least, equals, some


def _last_inside(
    ordered: Tensor, highest: Tensor, scale: Tensor, limit: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The last of sorted logits that less than `limit` of mass precedes.

    Returns:
        It, how many of its equals are kept, and whether another equal one follows; [rows, 1] each.
    """
    mass = (ordered - highest).mul_(scale).exp_().to(limit.dtype)
    before = mass.cumsum(dim=1).sub_(mass)
    inside = before < limit
    # At least one: no comparison with NaN holds, and the engine fails such rows by name.
    count = inside.sum(dim=1, keepdim=True).clamp(min=1)
    least = ordered.gather(1, count - 1)
    equal = ordered == least
    kept = (equal & inside).sum(dim=1, keepdim=True)
    return least, kept, equal.sum(dim=1, keepdim=True) > kept
