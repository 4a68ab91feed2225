"""Selects the masked positions that a step commits, by the rules in `decoding`.

A row is a request, a column a position of its active block. Requests with different rules share a
step: each rule in use is computed for all rows, then taken for the rows that use it.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from dllm_engine.decoding import Rule, Score
from dllm_engine.ops import noise
from dllm_engine.sampling import rules


@dataclasses.dataclass(frozen=True)
class BlockStatistics:
    """Candidates of the active blocks, and earlier commits; all [R, block]."""

    #: bool; positions that may be committed. Only these have meaningful values below.
    masked: Tensor
    confidence: Tensor
    entropy: Tensor
    margin: Tensor
    #: Confidence of committed positions at their commit; −1 elsewhere. Only LocalLeap reads it.
    committed: Tensor


@dataclasses.dataclass(frozen=True)
class CommitPlan:
    """Decoding rules and schedules of R requests for one step; tensors are [R]."""

    #: int64, a `Score` and a `Rule`.
    score: Tensor
    rule: Tensor
    #: Rules and scores in use, and whether any row has an `alg_temp` above 0; known on the host
    #: without asking the device.
    rules_in_use: frozenset[Rule]
    scores_in_use: frozenset[Score]
    draws: bool
    #: int64; positions that the schedule commits.
    count: Tensor
    #: float32; chance of each masked position (Dream's `origin`).
    chance: Tensor
    #: float64; the rule's parameters: threshold, factor, entropy bound or anchor threshold; and
    #: low threshold or neighbour threshold.
    threshold: Tensor
    second_threshold: Tensor
    #: float64; above 0, positions are drawn by softmax(score / alg_temp) (Dream).
    alg_temp: Tensor
    #: int64.
    seed: Tensor
    step: Tensor
    #: int64; absolute position of the block's first column.
    block_start: Tensor


def select_commits(block: BlockStatistics, plan: CommitPlan) -> Tensor:
    """Positions to commit: bool [R, block]."""
    counted = torch.zeros_like(block.masked)
    if plan.rules_in_use & {Rule.COUNT, Rule.LOCAL_LEAP, Rule.DYNAMIC}:
        counted = rules.fixed_count(_scores(block, plan), block.masked, plan.count)
    chosen = counted
    for rule in plan.rules_in_use - {Rule.COUNT}:
        here = (plan.rule == rule).unsqueeze(1)
        chosen = torch.where(here, _apply(rule, block, plan, counted), chosen)
    return chosen


def _apply(rule: Rule, block: BlockStatistics, plan: CommitPlan, counted: Tensor) -> Tensor:
    masked, threshold, second = block.masked, plan.threshold, plan.second_threshold
    match rule:
        case Rule.COUNT:
            return counted
        case Rule.SPECULATIVE:
            return masked  # the canvas keeps what the next step confirms
        case Rule.THRESHOLD:
            return rules.threshold(block.confidence, masked, threshold)
        case Rule.DYNAMIC:
            return rules.dynamic(block.confidence, masked, threshold, counted)
        case Rule.FACTOR:
            return rules.factor(block.confidence, masked, threshold)
        case Rule.ENTROPY_BOUND:
            return rules.entropy_bound(block.entropy, masked, threshold)
        case Rule.HIERARCHICAL:
            return rules.hierarchical(block.confidence, masked, second, threshold)
        case Rule.LOCAL_LEAP:
            return rules.local_leap(
                counted, block.confidence, block.committed, masked, threshold, second
            )
        case Rule.ORIGIN:
            return masked & (_uniform(masked.shape[1], plan) < plan.chance.unsqueeze(1))


def _scores(block: BlockStatistics, plan: CommitPlan) -> Tensor:
    """float64 [R, block]; larger is committed first."""
    score = _score_of(Score.CONFIDENCE, block, plan)
    for kind in plan.scores_in_use - {Score.CONFIDENCE}:
        here = (plan.score == kind).unsqueeze(1)
        score = torch.where(here, _score_of(kind, block, plan), score)
    if not plan.draws:
        return score
    drawn = (plan.alg_temp > 0).unsqueeze(1)
    # The n largest of score / T + Gumbel noise are n draws without replacement from
    # softmax(score / T) (Kool et al. 2019): torch.multinomial's distribution, with our noise.
    temperature = torch.where(plan.alg_temp > 0, plan.alg_temp, 1.0).unsqueeze(1)
    gumbel = -(-_uniform(block.masked.shape[1], plan).log()).log()
    return torch.where(drawn, score / temperature + gumbel, score)


def _score_of(kind: Score, block: BlockStatistics, plan: CommitPlan) -> Tensor:
    match kind:
        case Score.CONFIDENCE:
            return block.confidence.to(torch.float64)
        case Score.RANDOM:
            return _uniform(block.masked.shape[1], plan)
        case Score.ENTROPY:
            return -block.entropy.to(torch.float64)
        case Score.MARGIN:
            return block.margin.to(torch.float64)
        case Score.POSITION:
            columns = torch.arange(block.masked.shape[1], device=block.masked.device)
            return -columns.to(torch.float64).expand_as(block.masked)


def _uniform(width: int, plan: CommitPlan) -> Tensor:
    """A number in (0, 1) for each position of each block: float64 [R, width]."""
    columns = torch.arange(width, device=plan.seed.device)
    position = (plan.block_start.unsqueeze(1) + columns).flatten()
    seed, step = (x.repeat_interleave(width) for x in (plan.seed, plan.step))
    keys = noise.row_keys(seed, step, position, noise.STREAM_ORDER)
    return noise.uniform(keys).view(-1, width)
