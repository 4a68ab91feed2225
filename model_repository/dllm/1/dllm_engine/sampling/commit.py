"""Which masked positions are committed in a step: pure functions over one matrix.

A row is a request, a column a position of its active block. Rules give each position a score;
the best are committed: a fixed number per step (the transfer schedule), or every one above a
threshold.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from . import noise

RULE_LOW_CONFIDENCE = 0
RULE_RANDOM = 1
#: Rule name to the number that stands for it in tensors.
RULES = {"low_confidence": RULE_LOW_CONFIDENCE, "random": RULE_RANDOM}


@dataclasses.dataclass(frozen=True)
class CommitPlan:
    """What a step may commit, for each of R requests; tensors of [R] unless stated."""

    #: int64; index into `RULES`.
    rule: Tensor
    #: int64; how many positions the schedule commits.
    count: Tensor
    #: float64; commit all at least this confident instead of a fixed number; inf is off.
    threshold: Tensor
    #: int64.
    seed: Tensor
    step: Tensor
    #: int64; absolute position of the block's first column.
    block_start: Tensor


def transfer_count(num_masks: Tensor, steps: Tensor, step: Tensor) -> Tensor:
    """How many positions step `step` of `steps` commits in a block that began with `num_masks`.

    Equal shares, the remainder to the first steps (LLaDA, `get_num_transfer_tokens`).
    All int64 [R].
    """
    return num_masks // steps + (step < num_masks % steps).to(torch.int64)


def select_commits(confidence: Tensor, masked: Tensor, plan: CommitPlan) -> Tensor:
    """Positions to commit: bool [R, block].

    `low_confidence` keeps the most confident positions and re-masks the rest; `random` ranks by
    U(0, 1) instead (LLaDA, generate.py). Equal scores go to the leftmost. With a threshold every
    position at or above it is committed, and always the best one (Fast-dLLM, section 3.3).

    Args:
        confidence: float [R, block]; probability of each candidate.
        masked: bool [R, block]; positions that may be committed.
        plan: rule, count and threshold of each row.
    """
    score = confidence.to(torch.float64)
    is_random = plan.rule == RULE_RANDOM
    if bool(is_random.any()):
        score = torch.where(is_random.unsqueeze(1), _random_order(score.shape[1], plan), score)
    score = score.masked_fill(~masked, -torch.inf)
    order = score.argsort(dim=1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(
        1, order, torch.arange(score.shape[1], device=score.device).expand_as(order)
    )
    threshold = plan.threshold.to(confidence.dtype).unsqueeze(1)
    by_threshold = (rank == 0) | (confidence >= threshold)
    has_threshold = torch.isfinite(threshold)
    return masked & torch.where(has_threshold, by_threshold, rank < plan.count.unsqueeze(1))


def _random_order(width: int, plan: CommitPlan) -> Tensor:
    columns = torch.arange(width, device=plan.seed.device)
    position = (plan.block_start.unsqueeze(1) + columns).flatten()
    seed, step = (x.repeat_interleave(width) for x in (plan.seed, plan.step))
    keys = noise.row_keys(seed, step, position, noise.STREAM_ORDER)
    return noise.uniform(keys, 1).view(-1, width)
