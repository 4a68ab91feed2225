"""The language-model head fused with its reduction: logits exist in registers only.

A program takes a block of rows and a split of the vocabulary. It multiplies a tile of the
vocabulary at a time and folds the products into running statistics, as `ops.head_statistics`
does: the online softmax of Milakov & Gimelshein (2018), with entropy and runner-up. A second,
small launch merges the splits.

A row's result never depends on the other rows: the shapes of tiles and the borders of splits
follow from the type and the vocabulary alone, so every sum is taken in the same order for every
batch. There are about as many splits as a large GPU has multiprocessors, so that a single block of
rows keeps it busy. A block is small enough that its products hide behind the reading of the
weights.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dllm_engine.ops.head_types import LOWEST, HeadOptions, HeadStatistics, TiledHead
from dllm_engine.ops.kernels.noise import gumbel
from dllm_engine.ops.kernels.operands import Tile, operand_type, precision

#: The most splits of the vocabulary: the multiprocessors of an H100.
_SPLITS = 132
#: Rows of one program of the merge.
_MERGED_ROWS = 8
#: Hidden dimensions that are summed at once for an extra token.
_EXTRA_DEPTH = 256


# float32 is multiplied without tensor cores; its operands are in registers too.
_TILES = {4: Tile(64, 64, 16, 8, 3), 2: Tile(128, 128, 64, 8, 4)}

_LOWEST = tl.constexpr(LOWEST)


def splits_of(weight: Tensor) -> tuple[Tile, int, int]:
    """How a weight is divided: a tile, tiles per split, number of splits."""
    tile = _TILES[weight.element_size()]
    tiles = triton.cdiv(len(weight), tile.columns)
    each = triton.cdiv(tiles, _SPLITS)
    return tile, each, triton.cdiv(tiles, each)


def head_statistics_bytes(head: TiledHead, noisy: bool, needs_entropy: bool) -> int:
    """See `Head.statistics_bytes`: the statistics of all splits."""
    return 4 * (4 + noisy + 2 * needs_entropy) * splits_of(head.weight)[2]


def head_statistics(
    head: TiledHead, hidden: Tensor, options: HeadOptions, extra_tokens: Tensor | None = None
) -> HeadStatistics:
    """See `Head.statistics`. The logits are never written to memory, and the host never waits."""
    weight, first = head.weight, head.first
    rows, width = hidden.shape
    hidden, weight = hidden.contiguous(), weight.contiguous()
    inverse, needs_entropy = options.inverse_temperature, options.needs_entropy
    noisy = inverse is not None
    tile, each, splits = splits_of(weight)
    found = _empty((rows,), hidden, torch.int64, noisy=True, needs_entropy=True)
    if extra_tokens is not None:
        found.extra_logits = _logits_of(hidden, weight, first, options, extra_tokens)
    if not rows:
        return found
    parts = _empty((rows, splits), hidden, torch.int32, noisy=noisy, needs_entropy=needs_entropy)

    # The kernel never reads what no row needs, but is compiled for the type of its pointer.
    unused = torch.empty(1, dtype=torch.bool, device=hidden.device)
    logits_eos_inf, confidence_eos_eot_inf = (
        unused if rows_with is None else rows_with.contiguous()
        for rows_with in (options.logits_eos_inf, options.confidence_eos_eot_inf)
    )
    _reduce[(triton.cdiv(rows, tile.rows), splits)](
        hidden,
        weight,
        parts.max_logit if options.keys is None else options.keys.contiguous(),
        parts.max_logit if inverse is None else inverse.contiguous(),
        logits_eos_inf,
        confidence_eos_eot_inf,
        options.eos,
        options.stop,
        *_columns(parts),
        rows,
        len(weight),
        width,
        first,
        options.mask,
        0 if options.logits_eos_inf is None else len(options.eos),
        0 if options.confidence_eos_eot_inf is None else len(options.stop),
        each,
        noisy,
        needs_entropy,
        tile.rows,
        tile.columns,
        tile.depth,
        operand_type(hidden.dtype),
        precision(hidden.dtype),
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    _merge[(triton.cdiv(rows, _MERGED_ROWS),)](
        *_columns(parts),
        *_columns(found),
        rows,
        first,
        splits,
        noisy,
        needs_entropy,
        _MERGED_ROWS,
        triton.next_power_of_2(splits),
    )
    return found


def _empty(
    shape: tuple[int, ...], like: Tensor, token: torch.dtype, *, noisy: bool, needs_entropy: bool
) -> HeadStatistics:
    """Memory for statistics; those that the options do not need get one number."""

    def memory(dtype: torch.dtype, needed: bool = True) -> Tensor:
        return torch.empty(shape if needed else (1,), dtype=dtype, device=like.device)

    wide = torch.float32
    return HeadStatistics(
        token=memory(token),
        score=memory(wide, noisy),
        logit=memory(wide),
        max_logit=memory(wide),
        second=memory(wide, needs_entropy),
        sum_exp=memory(wide),
        sum_exp_logit=memory(wide, needs_entropy),
    )


def _columns(found: HeadStatistics) -> list[Tensor]:
    """All but the extra logits, in the order of the kernels' arguments."""
    return list(vars(found).values())[:-1]


@triton.jit
def _among(tokens, ids, count):
    """Whether each token is among the first `count` of `ids`."""
    found = tokens < 0
    for i in range(count):
        found = found | (tokens == tl.load(ids + i))
    return found


@triton.jit
def _halves(x):
    """Split into the left and the right half of the columns."""
    halves = tl.reshape(x, [x.shape[0], 2, x.shape[1] // 2])
    return tl.split(tl.permute(halves, (0, 2, 1)))


@triton.jit
def _noised_best(logits, keys, inverse, first, start, token, score, logit):
    """Update the best token, by logit / T + Gumbel noise where 1 / T is above 0."""
    column = tl.arange(0, logits.shape[1])
    ids = first + start + column
    noised = logits * inverse[:, None] + gumbel(keys[:, None], ids[None, :])
    noised = tl.where((inverse > 0)[:, None], noised, logits)
    highest, place = tl.max(noised, axis=1, return_indices=True)
    value = tl.max(tl.where(column[None, :] == place[:, None], logits, float("-inf")), axis=1)
    better = highest > score
    token = tl.where(better, (start + place).to(tl.int32), token)
    return token, tl.where(better, highest, score), tl.where(better, value, logit)


# One compilation for any number of rows and any alignment, so that all round the same.
@triton.jit(
    do_not_specialize=[
        "keys",
        "inverse_temperature",
        "logits_eos_inf",
        "confidence_eos_eot_inf",
        "num_rows",
        "num_eos",
        "num_stop",
    ]
)
def _reduce(
    hidden,
    weight,
    keys,
    inverse_temperature,
    logits_eos_inf,
    confidence_eos_eot_inf,
    eos,
    stop,
    token_out,
    score_out,
    logit_out,
    max_logit_out,
    second_out,
    sum_exp_out,
    sum_exp_logit_out,
    num_rows,
    num_tokens,
    width,
    first,
    mask,
    num_eos,
    num_stop,
    tiles,
    NOISY: tl.constexpr,
    NEEDS_ENTROPY: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    DEPTH: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1).to(tl.int64)
    row = block * ROWS + tl.arange(0, ROWS)
    live = row < num_rows
    column = tl.arange(0, TILE)
    k = tl.arange(0, DEPTH)
    hidden_place = tl.arange(0, ROWS)[:, None] * width + k[None, :]
    weight_place = column[None, :] * width + k[:, None]
    token = tl.zeros([ROWS], tl.int32)
    score = tl.full([ROWS], _LOWEST, tl.float32)
    logit = tl.full([ROWS], _LOWEST, tl.float32)
    max_logit = tl.full([ROWS], _LOWEST, tl.float32)
    second = tl.full([ROWS], _LOWEST, tl.float32)
    sum_exp = tl.zeros([ROWS], tl.float32)
    sum_exp_logit = tl.zeros([ROWS], tl.float32)
    forbids = (
        tl.load(logits_eos_inf + row, mask=row < tl.where(num_eos > 0, num_rows, 0), other=0) != 0
    )
    uncounted = (
        tl.load(
            confidence_eos_eot_inf + row, mask=row < tl.where(num_stop > 0, num_rows, 0), other=0
        )
        != 0
    )
    if NOISY:
        key = tl.load(keys + row, mask=live, other=0)
        inverse = tl.load(inverse_temperature + row, mask=live, other=0.0)
    for tile in range(split * tiles, tl.minimum((split + 1) * tiles, tl.cdiv(num_tokens, TILE))):
        start = tile * TILE
        there = start + column < num_tokens
        logits = tl.zeros([ROWS, TILE], tl.float32)
        for depth in range(0, width, DEPTH):
            inside = depth + k < width
            states = tl.load(
                hidden + block * ROWS * width + depth + hidden_place,
                mask=live[:, None] & inside[None, :],
                other=0.0,
            ).to(OPERAND)
            weights = tl.load(
                weight + start * width + depth + weight_place,
                mask=there[None, :] & inside[:, None],
                other=0.0,
            ).to(OPERAND)
            logits = tl.dot(states, weights, logits, input_precision=PRECISION)
        logits = tl.where(there[None, :], logits, float("-inf"))
        ids = first + start + column
        ends = _among(ids, eos, num_eos)
        logits = tl.where(forbids[:, None] & ends[None, :], float("-inf"), logits)

        choosable = tl.where((ids == mask)[None, :], float("-inf"), logits)
        if NOISY:
            # A quarter at a time: noise for the whole tile does not fit into registers.
            left, right = _halves(choosable)
            for half in tl.static_range(2):
                quarters = _halves(right if half else left)
                for i in tl.static_range(2):
                    begin = start + (2 * half + i) * (TILE // 4)
                    token, score, logit = _noised_best(
                        quarters[i], key, inverse, first, begin, token, score, logit
                    )
        else:
            highest, place = tl.max(choosable, axis=1, return_indices=True)
            better = highest > score
            token = tl.where(better, (start + place).to(tl.int32), token)
            score = tl.where(better, highest, score)
            logit = score

        stops = _among(ids, stop, num_stop)
        logits = tl.where(uncounted[:, None] & stops[None, :], float("-inf"), logits)
        largest = tl.max(logits, axis=1)
        if NEEDS_ENTROPY:
            # Equal logits count separately.
            is_largest = logits == largest[:, None]
            below = tl.max(tl.where(is_largest, float("-inf"), logits), axis=1)
            twice = tl.sum(is_largest.to(tl.int32), axis=1) > 1
            next_largest = tl.where(twice, largest, below)
            second = tl.maximum(tl.maximum(second, next_largest), tl.minimum(max_logit, largest))
        higher = tl.maximum(max_logit, largest)
        shifted = logits - higher[:, None]
        mass = tl.exp(shifted)
        rescale = tl.exp(max_logit - higher)
        if NEEDS_ENTROPY:
            moved = sum_exp_logit + (max_logit - higher) * sum_exp
            # A forbidden token has logit −inf and weight 0; it must add 0, not NaN.
            inner = tl.sum(mass * tl.where(mass > 0, shifted, 0.0), axis=1)
            sum_exp_logit = rescale * moved + inner
        sum_exp = rescale * sum_exp + tl.sum(mass, axis=1)
        max_logit = higher
    out = row * tl.num_programs(1) + split
    tl.store(token_out + out, token, mask=live)
    if NOISY:
        tl.store(score_out + out, score, mask=live)
    tl.store(logit_out + out, logit, mask=live)
    tl.store(max_logit_out + out, max_logit, mask=live)
    tl.store(sum_exp_out + out, sum_exp, mask=live)
    if NEEDS_ENTROPY:
        tl.store(second_out + out, second, mask=live)
        tl.store(sum_exp_logit_out + out, sum_exp_logit, mask=live)


@triton.jit(do_not_specialize=["num_rows"])
def _merge(
    tokens,
    scores,
    logits,
    max_logits,
    seconds,
    sum_exps,
    sum_exp_logits,
    token_out,
    score_out,
    logit_out,
    max_logit_out,
    second_out,
    sum_exp_out,
    sum_exp_logit_out,
    num_rows,
    first,
    splits,
    NOISY: tl.constexpr,
    NEEDS_ENTROPY: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # As `parallel.head.merge`, for all splits of a row at once.
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = row < num_rows
    split = tl.arange(0, BLOCK)[None, :]
    there = live[:, None] & (split < splits)
    place = row[:, None] * splits + split
    token = tl.load(tokens + place, mask=there, other=0)
    logit = tl.load(logits + place, mask=there, other=_LOWEST)
    score = tl.load(scores + place, mask=there, other=_LOWEST) if NOISY else logit
    # The leftmost of equal scores.
    best, at = tl.max(score, axis=1, return_indices=True)
    is_best = split == at[:, None]
    chosen = tl.sum(tl.where(is_best, token, 0), axis=1)
    tl.store(token_out + row, first + chosen.to(tl.int64), mask=live)
    tl.store(score_out + row, best, mask=live)
    tl.store(logit_out + row, tl.sum(tl.where(is_best, logit, 0.0), axis=1), mask=live)

    part_max_logit = tl.load(max_logits + place, mask=there, other=_LOWEST)
    part_sum_exp = tl.load(sum_exps + place, mask=there, other=0.0)
    max_logit = tl.max(part_max_logit, axis=1)
    below = part_max_logit - max_logit[:, None]
    scale = tl.exp(below)
    tl.store(max_logit_out + row, max_logit, mask=live)
    tl.store(sum_exp_out + row, tl.sum(scale * part_sum_exp, axis=1), mask=live)
    second = tl.full([ROWS], _LOWEST, tl.float32)
    sum_exp_logit = tl.zeros([ROWS], tl.float32)
    if NEEDS_ENTROPY:
        is_max = part_max_logit == max_logit[:, None]
        lower = tl.max(tl.where(is_max, _LOWEST, part_max_logit), axis=1)
        twice = tl.sum(is_max.to(tl.int32), axis=1) > 1
        part_second = tl.load(seconds + place, mask=there, other=_LOWEST)
        second = tl.maximum(tl.max(part_second, axis=1), tl.where(twice, max_logit, lower))
        part_sum_exp_logit = tl.load(sum_exp_logits + place, mask=there, other=0.0)
        sum_exp_logit = tl.sum(scale * (part_sum_exp_logit + below * part_sum_exp), axis=1)
    tl.store(second_out + row, second, mask=live)
    tl.store(sum_exp_logit_out + row, sum_exp_logit, mask=live)


def _logits_of(
    hidden: Tensor, weight: Tensor, first: int, options: HeadOptions, tokens: Tensor
) -> Tensor:
    """Logits of each row's own [rows, K] tokens, −∞ for no token and for excluded tokens."""
    rows, count = tokens.shape
    found = torch.empty(rows, count, dtype=torch.float32, device=hidden.device)
    if rows:
        _extra[(rows,)](
            hidden,
            weight,
            tokens.contiguous(),
            found,
            len(weight),
            hidden.shape[1],
            first,
            count,
            triton.next_power_of_2(count),
            _EXTRA_DEPTH,
        )
    for rows_without, ids in (
        (options.logits_eos_inf, options.eos),
        (options.confidence_eos_eot_inf, options.stop),
    ):
        if rows_without is not None:
            found.masked_fill_(rows_without[:, None] & torch.isin(tokens, ids), -torch.inf)
    return found


@triton.jit(do_not_specialize=["tokens"])
def _extra(
    hidden,
    weight,
    tokens,
    out,
    num_tokens,
    width,
    first,
    COUNT: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPTH: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    item = tl.arange(0, BLOCK)
    there = item < COUNT
    place = tl.load(tokens + row * COUNT + item, mask=there, other=-1) - first
    mine = (place >= 0) & (place < num_tokens)
    k = tl.arange(0, DEPTH)
    logit = tl.zeros([BLOCK], tl.float32)
    for depth in range(0, width, DEPTH):
        inside = depth + k < width
        states = tl.load(hidden + row * width + depth + k, mask=inside, other=0.0)
        weights = tl.load(
            weight + (place * width)[:, None] + (depth + k)[None, :],
            mask=mine[:, None] & inside[None, :],
            other=0.0,
        )
        logit += tl.sum(weights.to(tl.float32) * states.to(tl.float32)[None, :], axis=1)
    logit = tl.where(mine, logit, float("-inf"))
    tl.store(out + row * COUNT + item, logit, mask=there)
