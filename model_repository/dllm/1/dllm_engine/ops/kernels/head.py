"""The language-model head fused with its reduction: logits live in registers only.

A program has some rows and a split of the vocabulary. It multiplies a tile of the vocabulary at a
time and folds the products into running statistics, as `sampling.tiles` does: the online softmax
of Milakov & Gimelshein (2018), with entropy and runner-up. A second, small launch merges splits.

A row's result never depends on the other rows: shapes of tiles and borders of splits follow from
type and vocabulary alone, so every sum has its order whatever the batch. There are about as many
splits as a large GPU has multiprocessors, so that a single block of rows keeps it busy; and a
block is no taller than lets its products hide behind the reading of the weights.
"""

from __future__ import annotations

import dataclasses

import torch
import triton
import triton.language as tl
from torch import Tensor

from dllm_engine.ops.head import LOWEST, Choice, HeadStatistics
from dllm_engine.ops.kernels.operands import operand_type, precision

#: At most so many splits of the vocabulary: the multiprocessors of an H100.
_SPLITS = 132
#: Rows of one program of the merge.
_MERGED_ROWS = 8
#: Hidden dimensions that are summed at once for a listed token.
_LISTED_DEPTH = 256


@dataclasses.dataclass(frozen=True)
class _Shape:
    """Rows, tokens and hidden dimensions that are multiplied at once, and how."""

    rows: int
    tile: int
    depth: int
    warps: int
    stages: int


# float32 is multiplied without tensor cores, where the operands lie in registers too.
_SHAPES = {4: _Shape(64, 64, 16, 8, 3), 2: _Shape(128, 128, 64, 8, 4)}

_LOWEST = tl.constexpr(LOWEST)
# splitmix64, as in `sampling.noise`.
_GOLDEN = tl.constexpr(0x9E3779B97F4A7C15)
_MIX_1 = tl.constexpr(0xBF58476D1CE4E5B9)
_MIX_2 = tl.constexpr(0x94D049BB133111EB)
_TO_UNIT = tl.constexpr(2.0**-53)


def _split(weight: Tensor) -> tuple[_Shape, int, int]:
    """Shape of the tiles of a head's weight, tiles of one split, and number of splits."""
    shape = _SHAPES[weight.element_size()]
    tiles = triton.cdiv(len(weight), shape.tile)
    each = triton.cdiv(tiles, _SPLITS)
    return shape, each, triton.cdiv(tiles, each)


def partial_bytes(weight: Tensor, *, noisy: bool, spread: bool) -> int:
    """Bytes per row of what is written between the two launches."""
    return 4 * (4 + 2 * noisy + 2 * spread) * _split(weight)[2]


def head_statistics(
    hidden: Tensor, weight: Tensor, first: int, choice: Choice, listed: Tensor | None = None
) -> HeadStatistics:
    """See `Head.statistics`; `weight` [tokens, hidden_size] is of the tokens from `first` on."""
    rows, width = hidden.shape
    hidden, weight = hidden.contiguous(), weight.contiguous()
    noisy, spread = choice.temperature is not None, choice.spread
    shape, each, splits = _split(weight)
    found = _empty((rows,), hidden, torch.int64, noisy=True, spread=True)
    if listed is not None:
        found.listed = _logits_of(hidden, weight, first, choice, listed)
    if not rows:
        return found
    parts = _empty((rows, splits), hidden, torch.int32, noisy=noisy, spread=spread)

    # What no row needs is never read, but its pointer has a type, by which kernels are compiled.
    nobody = torch.empty(1, dtype=torch.bool, device=hidden.device)
    no_eos = nobody if choice.no_eos is None else choice.no_eos.contiguous()
    late_eos = nobody if choice.late_eos is None else choice.late_eos.contiguous()
    _reduce[(triton.cdiv(rows, shape.rows), splits)](
        hidden,
        weight,
        parts.peak if choice.keys is None else choice.keys.contiguous(),
        parts.peak if choice.temperature is None else choice.temperature.contiguous(),
        no_eos,
        late_eos,
        choice.eos,
        choice.stop,
        parts.token,
        parts.score,
        parts.logit,
        parts.peak,
        parts.second,
        parts.total,
        parts.weighted,
        rows,
        len(weight),
        width,
        first,
        choice.mask,
        0 if choice.no_eos is None else len(choice.eos),
        0 if choice.late_eos is None else len(choice.stop),
        each,
        noisy,
        spread,
        shape.rows,
        shape.tile,
        shape.depth,
        operand_type(hidden.dtype),
        precision(hidden.dtype),
        num_warps=shape.warps,
        num_stages=shape.stages,
    )
    _merge[(triton.cdiv(rows, _MERGED_ROWS),)](
        parts.token,
        parts.score,
        parts.logit,
        parts.peak,
        parts.second,
        parts.total,
        parts.weighted,
        found.token,
        found.score,
        found.logit,
        found.peak,
        found.second,
        found.total,
        found.weighted,
        rows,
        first,
        splits,
        noisy,
        spread,
        _MERGED_ROWS,
        triton.next_power_of_2(splits),
    )
    return found


def _empty(
    shape: tuple[int, ...], like: Tensor, token: torch.dtype, *, noisy: bool, spread: bool
) -> HeadStatistics:
    """Room for statistics; without `noisy` or `spread` what they need is not there."""

    def room(dtype: torch.dtype, there: bool = True) -> Tensor:
        return torch.empty(shape if there else (1,), dtype=dtype, device=like.device)

    wide = torch.float32
    return HeadStatistics(
        token=room(token),
        score=room(torch.float64, noisy),
        logit=room(wide),
        peak=room(wide),
        second=room(wide, spread),
        total=room(wide),
        weighted=room(wide, spread),
    )


@triton.jit
def _mix(x):
    x = (x ^ (x >> 30)) * _MIX_1
    x = (x ^ (x >> 27)) * _MIX_2
    return x ^ (x >> 31)


@triton.jit
def uniform(keys, tokens):
    """The numbers of uint64 keys for int64 tokens, as `sampling.noise.uniform` has them."""
    bits = _mix(keys + (tokens + 1).to(tl.uint64) * _GOLDEN)
    return ((bits >> 11).to(tl.int64).to(tl.float64) + 0.5) * _TO_UNIT


@triton.jit
def _among(tokens, ids, count):
    """Which of the tokens are among the first `count` of `ids`."""
    found = tokens < 0
    for i in range(count):
        found = found | (tokens == tl.load(ids + i))
    return found


@triton.jit
def _halves(x):
    """The left and the right columns."""
    halves = tl.reshape(x, [x.shape[0], 2, x.shape[1] // 2])
    return tl.split(tl.permute(halves, (0, 2, 1)))


@triton.jit
def _noised_best(logits, keys, temperature, first, start, token, score, logit):
    """The best token so far, by logit / T + Gumbel noise where T is above 0."""
    column = tl.arange(0, logits.shape[1])
    ids = first + start + column
    gumbel = -tl.log(-tl.log(uniform(keys[:, None], ids[None, :])))
    clean = logits.to(tl.float64)
    noised = clean / tl.where(temperature > 0, temperature, 1.0)[:, None] + gumbel
    noised = tl.where((temperature > 0)[:, None], noised, clean)
    highest, place = tl.max(noised, axis=1, return_indices=True)
    value = tl.max(tl.where(column[None, :] == place[:, None], logits, float("-inf")), axis=1)
    better = highest > score
    token = tl.where(better, (start + place).to(tl.int32), token)
    return token, tl.where(better, highest, score), tl.where(better, value, logit)


# The same code for any number of rows, so that it rounds the same; what lies next to each other for
# each row may begin anywhere.
@triton.jit(
    do_not_specialize=[
        "keys",
        "temperature",
        "no_eos",
        "late_eos",
        "num_rows",
        "num_eos",
        "num_stop",
    ]
)
def _reduce(
    hidden,
    weight,
    keys,
    temperature,
    no_eos,
    late_eos,
    eos,
    stop,
    token_out,
    score_out,
    logit_out,
    peak_out,
    second_out,
    total_out,
    weighted_out,
    num_rows,
    num_tokens,
    width,
    first,
    mask,
    num_eos,
    num_stop,
    tiles,
    NOISY: tl.constexpr,
    SPREAD: tl.constexpr,
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
    score_type: tl.constexpr = tl.float64 if NOISY else tl.float32
    token = tl.zeros([ROWS], tl.int32)
    score = tl.full([ROWS], _LOWEST, score_type)
    logit = tl.full([ROWS], _LOWEST, tl.float32)
    peak = tl.full([ROWS], _LOWEST, tl.float32)
    second = tl.full([ROWS], _LOWEST, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    weighted = tl.zeros([ROWS], tl.float32)
    forbids = tl.load(no_eos + row, mask=row < tl.where(num_eos > 0, num_rows, 0), other=0) != 0
    uncounted = (
        tl.load(late_eos + row, mask=row < tl.where(num_stop > 0, num_rows, 0), other=0) != 0
    )
    if NOISY:
        key = tl.load(keys + row, mask=live, other=0).to(tl.uint64)
        heat = tl.load(temperature + row, mask=live, other=0.0)
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
            # A quarter at a time: noise of the whole tile would not fit into the registers.
            left, right = _halves(choosable)
            for half in tl.static_range(2):
                quarters = _halves(right if half else left)
                for i in tl.static_range(2):
                    begin = start + (2 * half + i) * (TILE // 4)
                    token, score, logit = _noised_best(
                        quarters[i], key, heat, first, begin, token, score, logit
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
        if SPREAD:
            # Equal ones count apart.
            is_largest = logits == largest[:, None]
            below = tl.max(tl.where(is_largest, float("-inf"), logits), axis=1)
            twice = tl.sum(is_largest.to(tl.int32), axis=1) > 1
            next_largest = tl.where(twice, largest, below)
            second = tl.maximum(tl.maximum(second, next_largest), tl.minimum(peak, largest))
        higher = tl.maximum(peak, largest)
        shifted = logits - higher[:, None]
        mass = tl.exp(shifted)
        rescale = tl.exp(peak - higher)
        if SPREAD:
            moved = weighted + (peak - higher) * total
            # A forbidden token has logit −inf and weight 0; it adds nothing, not NaN.
            inner = tl.sum(mass * tl.where(mass > 0, shifted, 0.0), axis=1)
            weighted = rescale * moved + inner
        total = rescale * total + tl.sum(mass, axis=1)
        peak = higher
    out = row * tl.num_programs(1) + split
    tl.store(token_out + out, token, mask=live)
    if NOISY:
        tl.store(score_out + out, score, mask=live)
    tl.store(logit_out + out, logit, mask=live)
    tl.store(peak_out + out, peak, mask=live)
    tl.store(total_out + out, total, mask=live)
    if SPREAD:
        tl.store(second_out + out, second, mask=live)
        tl.store(weighted_out + out, weighted, mask=live)


@triton.jit(do_not_specialize=["num_rows"])
def _merge(
    tokens,
    scores,
    logits,
    peaks,
    seconds,
    totals,
    weighteds,
    token_out,
    score_out,
    logit_out,
    peak_out,
    second_out,
    total_out,
    weighted_out,
    num_rows,
    first,
    splits,
    NOISY: tl.constexpr,
    SPREAD: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # What `sampling.merge` does with two parts, with all splits of a row at once.
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = row < num_rows
    split = tl.arange(0, BLOCK)[None, :]
    there = live[:, None] & (split < splits)
    place = row[:, None] * splits + split
    token = tl.load(tokens + place, mask=there, other=0)
    logit = tl.load(logits + place, mask=there, other=_LOWEST)
    wide = logit.to(tl.float64)
    score = tl.load(scores + place, mask=there, other=_LOWEST) if NOISY else wide
    # The leftmost of equal ones.
    best, at = tl.max(score, axis=1, return_indices=True)
    is_best = split == at[:, None]
    chosen = tl.sum(tl.where(is_best, token, 0), axis=1)
    tl.store(token_out + row, first + chosen.to(tl.int64), mask=live)
    tl.store(score_out + row, best, mask=live)
    tl.store(logit_out + row, tl.sum(tl.where(is_best, logit, 0.0), axis=1), mask=live)

    part_peak = tl.load(peaks + place, mask=there, other=_LOWEST)
    part_total = tl.load(totals + place, mask=there, other=0.0)
    peak = tl.max(part_peak, axis=1)
    below = part_peak - peak[:, None]
    scale = tl.exp(below)
    tl.store(peak_out + row, peak, mask=live)
    tl.store(total_out + row, tl.sum(scale * part_total, axis=1), mask=live)
    second = tl.full([ROWS], _LOWEST, tl.float32)
    weighted = tl.zeros([ROWS], tl.float32)
    if SPREAD:
        is_peak = part_peak == peak[:, None]
        lower = tl.max(tl.where(is_peak, _LOWEST, part_peak), axis=1)
        twice = tl.sum(is_peak.to(tl.int32), axis=1) > 1
        part_second = tl.load(seconds + place, mask=there, other=_LOWEST)
        second = tl.maximum(tl.max(part_second, axis=1), tl.where(twice, peak, lower))
        part_weighted = tl.load(weighteds + place, mask=there, other=0.0)
        weighted = tl.sum(scale * (part_weighted + below * part_total), axis=1)
    tl.store(second_out + row, second, mask=live)
    tl.store(weighted_out + row, weighted, mask=live)


def _logits_of(
    hidden: Tensor, weight: Tensor, first: int, choice: Choice, tokens: Tensor
) -> Tensor:
    """Logits of each row's own [rows, K] tokens, −∞ where there is none or it does not count."""
    rows, count = tokens.shape
    found = torch.empty(rows, count, dtype=torch.float32, device=hidden.device)
    if rows:
        _listed[(rows,)](
            hidden,
            weight,
            tokens.contiguous(),
            found,
            len(weight),
            hidden.shape[1],
            first,
            count,
            triton.next_power_of_2(count),
            _LISTED_DEPTH,
        )
    for rows_without, ids in ((choice.no_eos, choice.eos), (choice.late_eos, choice.stop)):
        if rows_without is not None:
            found.masked_fill_(rows_without[:, None] & torch.isin(tokens, ids), -torch.inf)
    return found


@triton.jit(do_not_specialize=["tokens"])
def _listed(
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
