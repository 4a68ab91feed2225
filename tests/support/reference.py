"""The decoding loop as the papers define it, slowly and plainly, one request at a time.

Written from the definition of LLaDA's `generate`: one full forward per step, no batching, no
cache. Deviations that the engine documents are made here too: the mask token is never chosen,
equal confidences go to the leftmost position, and a last block may be shorter.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable

import torch
from torch import Tensor

#: Token ids [length] to logits [length, vocab].
Forward = Callable[[Tensor], Tensor]


@dataclasses.dataclass
class ReferenceResult:
    """Tokens and confidences of the canvas."""

    tokens: list[int]
    confidence: list[float]
    forward_passes: int


def split_evenly(total: int, parts: int) -> list[int]:
    """`total` in `parts` shares, the remainder to the first."""
    base, extra = divmod(total, parts)
    return [base + 1] * extra + [base] * (parts - extra)


def block_steps(gen_length: int, block_length: int, steps: int) -> list[tuple[int, int, int]]:
    """(start, end, steps) of each block, the steps spread evenly over the canvas."""
    edges = [*range(0, gen_length, block_length), gen_length]
    shares = []
    for start, end in itertools.pairwise(edges):
        shares.append((start, end, end * steps // gen_length - start * steps // gen_length))
    return shares


def generate(
    forward: Forward,
    prompt: list[int],
    *,
    mask_id: int,
    gen_length: int,
    block_length: int,
    steps: int,
    cfg_scale: float = 0.0,
    threshold: float | None = None,
) -> ReferenceResult:
    """LLaDA's fixed-schedule low-confidence decoding at temperature 0, or by threshold."""
    x = torch.tensor(prompt + [mask_id] * gen_length)
    start_of_canvas = len(prompt)
    is_masked = torch.tensor([False] * len(prompt) + [True] * gen_length)
    kept = torch.full((gen_length,), -1.0, dtype=torch.float64)
    passes = 0

    def logits() -> Tensor:
        nonlocal passes
        passes += 1
        conditional = forward(x)
        if cfg_scale == 0:
            return conditional
        passes += 1
        blind = x.clone()
        blind[:start_of_canvas] = mask_id
        unconditional = forward(blind)
        return unconditional + (cfg_scale + 1) * (conditional - unconditional)

    for start, end, num_steps in block_steps(gen_length, block_length, steps):
        block = range(start_of_canvas + start, start_of_canvas + end)
        shares = split_evenly(sum(bool(is_masked[i]) for i in block), num_steps)
        step = 0
        while any(bool(is_masked[i]) for i in block):
            scores = logits()
            probability = scores.softmax(-1)
            scores = scores.clone()
            scores[:, mask_id] = -torch.inf
            choice = scores.argmax(-1)
            open_positions = [i for i in block if is_masked[i]]
            confidence = {i: float(probability[i, choice[i]]) for i in open_positions}
            ranked = sorted(open_positions, key=lambda i: (-confidence[i], i))
            if threshold is None:
                chosen = ranked[: shares[step]]
            else:
                chosen = ranked[:1] + [i for i in ranked[1:] if confidence[i] >= threshold]
            for i in chosen:
                x[i] = choice[i]
                is_masked[i] = False
                kept[i - start_of_canvas] = confidence[i]
            step += 1
    return ReferenceResult(x[start_of_canvas:].tolist(), kept.tolist(), passes)


def generate_dream(
    forward: Forward, prompt: list[int], *, mask_id: int, gen_length: int, steps: int, alg: str
) -> ReferenceResult:
    """Dream's `_sample` at temperature 0 without alg_temp: one canvas, its own time schedule.

    Written from the definition; `forward` gives logits that are shifted already. As in the engine
    the mask token is never chosen, and ties go to the leftmost position.
    """
    x = torch.tensor(prompt + [mask_id] * gen_length)
    start = len(prompt)
    open_positions = list(range(start, start + gen_length))
    kept = torch.full((gen_length,), -1.0, dtype=torch.float64)
    times = torch.linspace(1, 1e-3, steps + 1)
    passes = 0
    for i in range(steps):
        share = 1 - times[i + 1] / times[i]
        left = torch.tensor(float(len(open_positions)))
        count = len(open_positions) if i == steps - 1 else int(left * share)
        if count == 0:
            continue  # the reference runs the model and commits nothing
        passes += 1
        logits = forward(x).clone()
        probability = logits.softmax(-1)
        logits[:, mask_id] = -torch.inf
        ordered = probability.sort(dim=-1, descending=True).values
        score = {
            "maskgit_plus": probability.gather(1, logits.argmax(-1, keepdim=True))[:, 0],
            "topk_margin": ordered[:, 0] - ordered[:, 1],
            "entropy": torch.special.xlogy(probability, probability).sum(-1),
        }[alg]
        ranked = sorted(open_positions, key=lambda p: (-float(score[p]), p))
        for position in ranked[:count]:
            x[position] = logits[position].argmax()
            kept[position - start] = probability[position, x[position]]
            open_positions.remove(position)
    return ReferenceResult(x[start:].tolist(), kept.tolist(), passes)


def generate_credit(
    forward: Forward,
    prompt: list[int],
    *,
    mask_id: int,
    gen_length: int,
    block_length: int,
    threshold: float,
) -> ReferenceResult:
    """dInfer's credit decoding at temperature 0, with the credit matrix written out in full."""
    beta, gamma, alpha = 0.8, 0.2, 0.7
    x = torch.tensor(prompt + [mask_id] * gen_length)
    first = len(prompt)
    kept = torch.full((gen_length,), -1.0, dtype=torch.float64)
    open_positions = set(range(first, first + gen_length))
    passes = 0
    for start in range(first, first + gen_length, block_length):
        block = range(start, min(start + block_length, first + gen_length))
        credit: Tensor | None = None
        while inside := sorted(open_positions & set(block)):
            logits = forward(x).double()
            passes += 1
            credit = torch.zeros_like(logits) if credit is None else beta * credit
            found = {}
            for p in inside:
                allowed = logits[p].clone()
                allowed[mask_id] = -torch.inf
                best = int(allowed.argmax())
                credit[p, best] += logits[p].softmax(-1)[best] ** gamma
                fused = logits[p] + alpha * credit[p].log1p()
                probability = fused.softmax(-1)
                fused[mask_id] = -torch.inf
                token = int(fused.argmax())
                found[p] = (float(probability[token]), token)
            ranked = sorted(found, key=lambda p: (-found[p][0], p))
            for p in ranked[:1] + [p for p in ranked[1:] if found[p][0] >= threshold]:
                kept[p - first], x[p] = found[p]
                open_positions.remove(p)
    return ReferenceResult(x[first:].tolist(), kept.tolist(), passes)
