"""Which positions a step commits, by rule, schedule and threshold."""

import pytest
import torch
from dllm_engine import LLM, SamplingParams
from dllm_engine.sampling.commit import RULES, CommitPlan, select_commits, transfer_count
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.support.reference import split_evenly


def plan(rows: int = 1, **columns: float | str) -> CommitPlan:
    """A plan of `rows` equal rows: one position by confidence unless said otherwise."""
    rule = RULES[str(columns.pop("rule", "low_confidence"))]
    whole = {"rule": rule, "count": 1, "seed": 0, "step": 0, "block_start": 0} | columns
    threshold = float(whole.pop("threshold", torch.inf))
    return CommitPlan(
        threshold=torch.full((rows,), threshold, dtype=torch.float64),
        **{name: torch.full((rows,), int(value)) for name, value in whole.items()},
    )


def chosen(
    confidence: list[float], masked: list[int] | None = None, **columns: float | str
) -> list[int]:
    """Columns committed in a block of one request."""
    scores = torch.tensor([confidence])
    mask = torch.tensor([[True] * len(confidence) if masked is None else list(map(bool, masked))])
    found: Tensor = select_commits(scores, mask, plan(**columns))
    return found[0].nonzero().flatten().tolist()


@given(st.integers(0, 300), st.integers(1, 300))
def test_the_schedule_splits_masks_evenly_remainder_first(num_masks: int, steps: int) -> None:
    """The shares of all steps are the even split of the block's masks (LLaDA)."""
    counts = transfer_count(
        torch.full((steps,), num_masks), torch.full((steps,), steps), torch.arange(steps)
    )
    assert counts.tolist() == split_evenly(num_masks, steps)


def test_the_most_confident_masked_positions_are_committed() -> None:
    """The schedule's count goes to the best masked positions; committed ones are out."""
    assert chosen([0.1, 0.9, 0.5, 0.7], count=2) == [1, 3]
    assert chosen([0.1, 0.9, 0.5, 0.7], masked=[1, 0, 1, 1], count=2) == [2, 3]


def test_equal_confidences_go_to_the_leftmost() -> None:
    """Ties are broken by position, whatever the sort does."""
    assert chosen([0.5] * 40, count=7) == list(range(7))


def test_a_count_beyond_the_masks_commits_no_other_position() -> None:
    """Positions that are not masked are never written, however large the count."""
    assert chosen([0.9, 0.8, 0.1], masked=[0, 0, 1], count=3) == [2]
    assert chosen([0.9, 0.8], masked=[0, 0], count=2) == []


def test_a_threshold_commits_everything_above_it_and_always_the_best() -> None:
    """Fast-dLLM's rule: all at or above the threshold, the best one even below it."""
    assert chosen([0.95, 0.2, 0.9, 0.89], threshold=0.9) == [0, 2]
    assert chosen([0.1, 0.2, 0.05], threshold=0.9) == [1]
    assert chosen([0.99, 0.2, 0.1], masked=[0, 1, 1], threshold=0.9) == [1]


def test_random_order_ignores_confidence_and_follows_the_seed() -> None:
    """`random` picks by noise of (seed, step, position): repeatable, and uniform over seeds."""
    confidence = [0.9, 0.1, 0.1, 0.1]
    picks = [chosen(confidence, rule="random", seed=seed)[0] for seed in range(400)]
    assert picks == [chosen(confidence, rule="random", seed=seed)[0] for seed in range(400)]
    counts = torch.bincount(torch.tensor(picks), minlength=4)
    assert counts.min() > 60  # 100 expected each


def test_rows_with_different_rules_do_not_mix() -> None:
    """Each row of a batch follows its own rule, count and threshold."""
    scores = torch.tensor([[0.3, 0.9, 0.6]] * 3)
    mixed = CommitPlan(
        rule=torch.tensor([RULES["low_confidence"], RULES["random"], RULES["low_confidence"]]),
        count=torch.tensor([2, 3, 1]),
        threshold=torch.tensor([torch.inf, torch.inf, 0.5], dtype=torch.float64),
        seed=torch.arange(3),
        step=torch.zeros(3, dtype=torch.int64),
        block_start=torch.zeros(3, dtype=torch.int64),
    )
    found = select_commits(scores, torch.ones(3, 3, dtype=torch.bool), mixed)
    assert found.tolist() == [[False, True, True], [True, True, True], [False, True, True]]


@pytest.mark.parametrize("rule", sorted(RULES))
def test_every_rule_fills_the_canvas_in_exactly_its_steps(llm: LLM, rule: str) -> None:
    """`steps` steps decode the whole canvas, the last block shorter, whatever the rule."""
    params = SamplingParams(
        gen_length=29, block_length=8, steps=11, remasking=rule, ignore_eos=True, seed=1
    )
    answer = llm.generate([[4, 5]], params, progress=False)[0]
    assert answer.usage.steps == 11
    assert (answer.confidence >= 0).all()
