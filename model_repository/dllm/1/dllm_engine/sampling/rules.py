"""The decoding rules: pure functions that say which masked positions are committed.

All take matrices [R, block]: a row is a request, a column a position of its active block. Scores
of positions that are not masked are ignored. Ties go to the leftmost position.

`threshold`, `factor`, `entropy_bound` and `hierarchical` commit at least one position of each row
that has a masked one. The others may commit none: `fixed_count` if its count is 0, `local_leap`
then too unless there is an anchor, and Dream's `origin` (in `commit.py`) by chance. They still end,
since the last step of their schedules commits all that is left.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rank_of(score: Tensor, masked: Tensor) -> Tensor:
    """Place of each position when masked ones are ordered by falling score: int64, 0 is best."""
    order = score.masked_fill(~masked, -torch.inf).argsort(dim=1, descending=True, stable=True)
    places = torch.arange(score.shape[1], device=score.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, places)


def fixed_count(score: Tensor, masked: Tensor, count: Tensor) -> Tensor:
    """The `count` ([R] int64) best positions: a transfer schedule (LLaDA, generate.py)."""
    return masked & (rank_of(score, masked) < count.unsqueeze(1))


def threshold(confidence: Tensor, masked: Tensor, tau: Tensor) -> Tensor:
    """Every position with confidence ≥ `tau` ([R]), and always the best (Fast-dLLM, 3.3)."""
    best = rank_of(confidence, masked) == 0
    return masked & (best | (confidence >= tau.to(confidence.dtype).unsqueeze(1)))


def dynamic(confidence: Tensor, masked: Tensor, tau: Tensor, counted: Tensor) -> Tensor:
    """Every position above `tau` ([R]), or `counted` if that is more (SDAR, generate.py).

    Args:
        counted: bool [R, block]; the schedule's count of the most confident, as `fixed_count` has.
    """
    above = masked & (confidence > tau.to(confidence.dtype).unsqueeze(1))
    enough = above.sum(dim=1, keepdim=True) >= counted.sum(dim=1, keepdim=True)
    return torch.where(enough, above, counted)


def factor(confidence: Tensor, masked: Tensor, f: Tensor) -> Tensor:
    """Fast-dLLM's factor rule: the n most confident, n the longest run with c₍ₙ₎ ≥ 1 − f/(n+1).

    The greedy choice of n tokens at once equals their joint maximum when (n + 1)(1 − c) ≤ 1
    (Fast-dLLM, theorem 1); `f` ([R]) relaxes that. The best is always committed.
    """
    rank = rank_of(confidence, masked)
    needed = 1 - f.to(confidence.dtype).unsqueeze(1) / (rank + 2)
    passes = masked & ((rank == 0) | (confidence >= needed))
    first_failure = torch.where(masked & ~passes, rank, rank.shape[1]).amin(dim=1, keepdim=True)
    return masked & (rank < first_failure)


def entropy_bound(entropy: Tensor, masked: Tensor, gamma: Tensor) -> Tensor:
    """The most certain positions while the entropies before them sum to at most `gamma` ([R]).

    EB-sampler (arXiv 2505.24857, eq. 5 and algorithm 1): with entropies ascending, the error of
    committing j positions together is bounded by ΣH − max H, the sum of all but the last.
    """
    entropy = entropy.masked_fill(~masked, torch.inf)
    rank = rank_of(-entropy, masked)
    ordered = entropy.gather(1, rank.argsort(dim=1))
    finite = ordered.masked_fill(~torch.isfinite(ordered), 0.0)
    before = (finite.cumsum(dim=1) - finite).gather(1, rank)
    return masked & (before <= gamma.to(entropy.dtype).unsqueeze(1))


def hierarchical(confidence: Tensor, masked: Tensor, low: Tensor, tau: Tensor) -> Tensor:
    """dInfer's hierarchical decoding (arXiv 2510.08666): spread commits over the runs of masks.

    Of each maximal run of consecutive masked positions its most confident one, if above `low`
    ([R]); besides every position above `tau` ([R]), and always the best of all.
    """
    starts = masked & ~torch.cat([torch.zeros_like(masked[:, :1]), masked[:, :-1]], dim=1)
    run = starts.to(torch.int64).cumsum(dim=1)
    width = masked.shape[1]
    score = confidence.masked_fill(~masked, -torch.inf)
    peaks = torch.full((len(run), width + 1), -torch.inf, dtype=score.dtype, device=score.device)
    peaks.scatter_reduce_(1, run, score, "amax")
    at_peak = masked & (score == peaks.gather(1, run))
    leftmost = torch.full((len(run), width + 1), width, dtype=torch.int64, device=score.device)
    columns = torch.arange(width, device=score.device).expand_as(run)
    leftmost.scatter_reduce_(1, run, torch.where(at_peak, columns, width), "amin")
    is_peak = at_peak & (columns == leftmost.gather(1, run))
    enough = confidence > low.to(confidence.dtype).unsqueeze(1)
    sure = confidence > tau.to(confidence.dtype).unsqueeze(1)
    best = rank_of(confidence, masked) == 0
    return masked & ((is_peak & enough) | sure | best)


def local_leap(
    chosen: Tensor,
    confidence: Tensor,
    committed_confidence: Tensor,
    masked: Tensor,
    anchor: Tensor,
    neighbour: Tensor,
    radius: int = 4,
) -> Tensor:
    """LocalLeap on a schedule: around sure positions, commit the fairly sure ones too.

    The variant of dlmserve, not the rule of the paper (arXiv 2510.07081), which has no schedule:
    there every candidate that is sure enough is an anchor and is committed, as by `threshold`. Here
    a schedule commits its usual count, and anchors are positions of the active block committed
    before, or in `chosen` now, with a confidence of at least `anchor` ([R]). Masked positions
    within `radius` of one are committed where their confidence is at least `neighbour` ([R]).

    Args:
        chosen: bool [R, block]; what the schedule commits in this step.
        confidence: of the candidates of masked positions.
        committed_confidence: what earlier positions were committed with; −1 elsewhere.
    """
    least = anchor.to(confidence.dtype).unsqueeze(1)
    sure = (chosen & (confidence >= least)) | (~masked & (committed_confidence >= least))
    window = torch.nn.functional.max_pool1d(
        sure.to(confidence.dtype).unsqueeze(1), 2 * radius + 1, stride=1, padding=radius
    ).squeeze(1)
    fair = confidence >= neighbour.to(confidence.dtype).unsqueeze(1)
    return masked & (chosen | ((window > 0) & fair))
