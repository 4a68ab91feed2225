"""Draws tokens under filters: a program per row, whose logits stay in the L2 cache.

Where torch sorts, the kernel finds the least kept logit by bisection. Logits are compared as
integers of the same order, so as many passes over the row as such an integer has bits end at the
exact logit; each pass adds up the mass, or the number, of the tokens from a bound on. A row's
result does not depend on other rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dllm_engine.ops.head_types import LOWEST, Filters, HeadOptions, HeadStatistics
from dllm_engine.ops.kernels.noise import gumbel

#: Tokens that a program reads at once, and its warps.
_BLOCK, _WARPS = 4096, 16
#: Bits of a logit as float32 that are not always 0.
_BITS = {torch.float32: 32, torch.float16: 19, torch.bfloat16: 16}
_LOWEST = tl.constexpr(LOWEST)


def draw_bytes(vocab_size: int, element_size: int) -> tuple[int, int]:
    """See `ops.draw.draw_bytes`."""
    return vocab_size * element_size, 0


def draw(logits: Tensor, options: HeadOptions, filters: Filters) -> HeadStatistics:
    """See `ops.draw.draw`. Takes logits of any type; the host never waits."""
    rows, vocab_size = logits.shape

    def empty(dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(rows, dtype=dtype, device=logits.device)

    found = HeadStatistics(empty(torch.int64), *(empty() for _ in range(6)))
    # The kernel never reads what no row needs, but is compiled for the type of its pointer.
    unused = filters.tempered
    forbids, uncounted = options.logits_eos_inf, options.confidence_eos_eot_inf
    noisy = options.inverse_temperature is not None
    _draw[(rows,)](
        logits,
        options.keys if noisy else filters.top_k,
        options.inverse_temperature if noisy else found.score,
        filters.top_p,
        filters.top_k,
        filters.tempered,
        unused if forbids is None else forbids,
        unused if uncounted is None else uncounted,
        options.eos,
        options.stop,
        *list(vars(found).values())[:-1],
        logits.stride(0),
        vocab_size,
        options.mask,
        0 if forbids is None else len(options.eos),
        0 if uncounted is None else len(options.stop),
        int(noisy),
        min(_BLOCK, triton.next_power_of_2(vocab_size)),
        _BITS[logits.dtype],
        num_warps=_WARPS,
    )
    return found


@triton.jit
def _key(logits, BITS: tl.constexpr):
    """Integers in the order of the logits; adding 0 turns −0 into 0."""
    bits = (logits + 0.0).to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)) >> (32 - BITS)


@triton.jit
def _mass(logits, highest, scale):
    return tl.exp((logits - highest) * scale)


@triton.jit
def _reach(
    row,
    num_tokens,
    target,
    highest,
    scale,
    COUNTS: tl.constexpr,
    BLOCK: tl.constexpr,
    BITS: tl.constexpr,
):
    """The largest key that tokens of at least `target` mass, or number, reach."""
    low = tl.full([], -(2 ** (BITS - 1)), tl.int64)
    high = tl.full([], 2 ** (BITS - 1), tl.int64)
    for _ in range(BITS):
        middle = (low + high) // 2
        sums = tl.zeros([BLOCK], tl.float32)
        for start in range(0, num_tokens, BLOCK):
            token = start + tl.arange(0, BLOCK)
            logits = tl.load(row + token, mask=token < num_tokens, other=float("-inf"))
            logits = logits.to(tl.float32)
            weight = 1.0 if COUNTS else _mass(logits, highest, scale)
            reaches = (token < num_tokens) & (_key(logits, BITS) >= middle)
            sums += tl.where(reaches, weight, 0.0)
        enough = tl.sum(sums, axis=0) >= target
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
    return low


@triton.jit
def _forbid(row, ids, count):
    for i in range(count):
        tl.store(row + tl.load(ids + i), float("-inf"))


@triton.jit
def _second(first, second):
    """The two largest of all lanes' two largest numbers; equal ones count separately."""
    largest = tl.max(first, axis=0)
    is_largest = first == largest
    others = tl.max(tl.where(is_largest, second, first), axis=0)
    twice = tl.sum(is_largest.to(tl.int32), axis=0) > 1
    return largest, tl.where(twice, largest, others)


@triton.jit(
    do_not_specialize=[
        "logits_in",
        "keys",
        "inverse_temperature",
        "top_p",
        "top_k",
        "tempered",
        "logits_eos_inf",
        "confidence_eos_eot_inf",
        "token_out",
        "score_out",
        "logit_out",
        "max_logit_out",
        "second_out",
        "sum_exp_out",
        "sum_exp_logit_out",
        "num_eos",
        "num_stop",
        "noisy",
    ],
)
def _draw(
    logits_in,
    keys,
    inverse_temperature,
    top_p,
    top_k,
    tempered,
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
    row_stride,
    num_tokens,
    mask,
    num_eos,
    num_stop,
    noisy,
    BLOCK: tl.constexpr,
    BITS: tl.constexpr,
):
    number = tl.program_id(0).to(tl.int64)
    row = logits_in + number * row_stride
    lane = tl.arange(0, BLOCK)
    nucleus = tl.load(top_p + number)
    best_k = tl.load(top_k + number)
    is_tempered = tl.load(tempered + number) != 0
    inverse = 0.0
    key = best_k
    if noisy > 0:
        inverse = tl.load(inverse_temperature + number)
        key = tl.load(keys + number)
    scale = tl.where(inverse > 0, inverse, 1.0)
    forbids = tl.load(logits_eos_inf + number, mask=num_eos > 0, other=0)
    uncounted = tl.load(confidence_eos_eot_inf + number, mask=num_stop > 0, other=0)
    if forbids != 0:
        _forbid(row, eos, num_eos)
        tl.debug_barrier()
    mask_logit = tl.load(row + mask)
    tl.debug_barrier()
    tl.store(row + mask, float("-inf"))
    tl.debug_barrier()

    largest = tl.full([BLOCK], _LOWEST, tl.float32)
    for start in range(0, num_tokens, BLOCK):
        token = start + lane
        logits = tl.load(row + token, mask=token < num_tokens, other=float("-inf")).to(tl.float32)
        largest = tl.maximum(largest, logits)
    highest = tl.max(largest, axis=0)

    least = tl.full([], -(2 ** (BITS - 1)), tl.int64)
    equals = tl.full([], 2147483647, tl.int64)
    if nucleus < 1.0:
        sums = tl.zeros([BLOCK], tl.float32)
        for start in range(0, num_tokens, BLOCK):
            token = start + lane
            logits = tl.load(row + token, mask=token < num_tokens, other=float("-inf"))
            sums += _mass(logits.to(tl.float32), highest, scale)
        target = tl.sum(sums, axis=0) * nucleus.to(tl.float32)
        least = _reach(row, num_tokens, target, highest, scale, False, BLOCK, BITS)
        # How many of the equal logits at the border it takes.
        above = tl.zeros([BLOCK], tl.float32)
        border = tl.zeros([BLOCK], tl.float32)
        for start in range(0, num_tokens, BLOCK):
            token = start + lane
            logits = tl.load(row + token, mask=token < num_tokens, other=float("-inf"))
            logits = logits.to(tl.float32)
            mass = _mass(logits, highest, scale)
            order = _key(logits, BITS)
            above += tl.where((token < num_tokens) & (order > least), mass, 0.0)
            border = tl.maximum(border, tl.where(order == least, mass, 0.0))
        each = tl.maximum(tl.max(border, axis=0), 1e-38)
        needed = tl.ceil((target - tl.sum(above, axis=0)) / each)
        equals = tl.minimum(tl.maximum(needed, 1.0), 2147483000.0).to(tl.int64)
    if best_k > 0:
        wanted = tl.minimum(best_k, num_tokens).to(tl.float32)
        kth = _reach(row, num_tokens, wanted, highest, scale, True, BLOCK, BITS)
        equals = tl.where(kth > least, 2147483647, equals)
        least = tl.maximum(kth, least)

    score = tl.full([BLOCK], _LOWEST, tl.float32)
    chosen = tl.zeros([BLOCK], tl.int64)
    first = tl.full([BLOCK], _LOWEST, tl.float32)
    second = tl.full([BLOCK], _LOWEST, tl.float32)
    sums = tl.zeros([BLOCK], tl.float32)
    inner = tl.zeros([BLOCK], tl.float32)
    seen = tl.zeros([], tl.int64)
    for start in range(0, num_tokens, BLOCK):
        token = start + lane
        there = token < num_tokens
        logits = tl.load(row + token, mask=there, other=float("-inf")).to(tl.float32)
        order = _key(logits, BITS)
        equal = there & (order == least)
        place = tl.cumsum(equal.to(tl.int32), axis=0) + seen
        seen += tl.sum(equal.to(tl.int32), axis=0)
        kept = there & ((order > least) | (equal & (place <= equals)))
        shifted = tl.where(kept, (logits - highest) * scale, float("-inf"))
        noised = tl.where(inverse > 0, shifted + gumbel(key, token), shifted)
        better = noised > score
        score = tl.where(better, noised, score)
        chosen = tl.where(better, token.to(tl.int64), chosen)
        second = tl.maximum(second, tl.minimum(first, shifted))
        first = tl.maximum(first, shifted)
        mass = tl.exp(shifted)
        sums += mass
        # A dropped token has mass 0; it must add 0, not NaN.
        inner += mass * tl.where(mass > 0, shifted, 0.0)
    best = tl.max(score, axis=0)
    winner = tl.min(tl.where(score == best, chosen, num_tokens), axis=0)
    logit = tl.load(row + winner).to(tl.float32)
    tl.debug_barrier()

    if is_tempered:
        logit = (logit - highest) * scale
    else:
        tl.store(row + mask, mask_logit)
        tl.debug_barrier()
        if uncounted != 0:
            _forbid(row, stop, num_stop)
            tl.debug_barrier()
        first = tl.full([BLOCK], _LOWEST, tl.float32)
        second = tl.full([BLOCK], _LOWEST, tl.float32)
        for start in range(0, num_tokens, BLOCK):
            token = start + lane
            logits = tl.load(row + token, mask=token < num_tokens, other=float("-inf"))
            logits = logits.to(tl.float32)
            second = tl.maximum(second, tl.minimum(first, logits))
            first = tl.maximum(first, logits)
        largest_logit = tl.max(first, axis=0)
        sums = tl.zeros([BLOCK], tl.float32)
        inner = tl.zeros([BLOCK], tl.float32)
        for start in range(0, num_tokens, BLOCK):
            token = start + lane
            logits = tl.load(row + token, mask=token < num_tokens, other=float("-inf"))
            shifted = logits.to(tl.float32) - largest_logit
            mass = tl.exp(shifted)
            sums += mass
            inner += mass * tl.where(mass > 0, shifted, 0.0)
    max_logit, runner_up = _second(first, second)
    tl.store(token_out + number, winner)
    tl.store(score_out + number, best)
    tl.store(logit_out + number, logit)
    tl.store(max_logit_out + number, max_logit)
    tl.store(second_out + number, runner_up)
    tl.store(sum_exp_out + number, tl.sum(sums, axis=0))
    tl.store(sum_exp_logit_out + number, tl.sum(inner, axis=0))
