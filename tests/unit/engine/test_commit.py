"""Scores, schedules and the table of rules: the positions that a whole step commits."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest
import torch
from dllm_engine import LLM, SamplingParams
from dllm_engine.decoding import ALG, REMASKING, Rule, Score
from dllm_engine.sampling.commit import BlockStatistics, CommitPlan, select_commits
from dllm_engine.sampling.schedule import dream_chances, dream_count, linear_count
from hypothesis import given
from hypothesis import strategies as st

from tests.support.decoder import split_evenly


def block(confidence: list[float], entropy: list[float], margin: list[float]) -> BlockStatistics:
    """One block with every position masked."""
    row = torch.tensor([confidence])
    return BlockStatistics(
        masked=torch.ones_like(row, dtype=torch.bool),
        confidence=row,
        entropy=torch.tensor([entropy]),
        margin=torch.tensor([margin]),
        committed=-torch.ones_like(row),
    )


def plan(rows: int = 1, **columns: float) -> CommitPlan:
    """One position by confidence in each of `rows` equal rows, unless given otherwise."""
    defaults: dict[str, float] = {"score": 0, "rule": 0, "count": 1, "seed": 0, "step": 0}
    defaults |= {"block_start": 0, "chance": 0.0, "threshold": 0.0, "second_threshold": 0.0}
    values = defaults | {"alg_temp": 0.0} | columns
    real = {"chance", "threshold", "second_threshold", "alg_temp"}
    return CommitPlan(
        rules_in_use=frozenset({Rule(int(values["rule"]))}),
        scores_in_use=frozenset({Score(int(values["score"]))}),
        draws=values["alg_temp"] > 0,
        **{
            name: torch.full((rows,), value, dtype=torch.float64 if name in real else torch.int64)
            for name, value in values.items()
        },
    )


def chosen(statistics: BlockStatistics, **columns: float) -> list[int]:
    """Columns committed in a block of one request."""
    return select_commits(statistics, plan(**columns))[0].nonzero().flatten().tolist()


@given(st.integers(0, 300), st.integers(1, 300))
def test_llada_splits_masks_evenly_remainder_first(num_masks: int, steps: int) -> None:
    """The counts of all steps are the even split of the block's masks (LLaDA)."""
    counts = linear_count(np.full(steps, num_masks), np.full(steps, steps), np.arange(steps))
    assert counts.tolist() == split_evenly(num_masks, steps)


@given(st.integers(1, 300), st.integers(1, 600))
def test_dreams_schedule_is_its_own_loop(num_masks: int, steps: int) -> None:
    """Counts follow ⌊masks (1 − s/t)⌋ in float32, everything in the last step (Dream)."""
    times = torch.linspace(1, 1e-3, steps + 1)
    left = num_masks
    for i, chance in enumerate(dream_chances(steps)):
        masks = torch.tensor(float(left))
        share = 1 - times[i + 1] / times[i]
        expected = left if i == steps - 1 else int(masks * share)
        assert dream_count(np.array([left]), chance).tolist() == [expected]
        left -= expected
    assert left == 0


def test_each_score_ranks_by_its_statistic() -> None:
    """Confidence and margin: larger first; entropy: smaller first."""
    statistics = block([0.9, 0.5, 0.1], [1.0, 0.2, 2.0], [0.1, 0.2, 0.3])
    for score, best in ((Score.CONFIDENCE, 0), (Score.ENTROPY, 1), (Score.MARGIN, 2)):
        assert chosen(statistics, score=score) == [best]


def committed_sets(scores: list[float], draws: int, **columns: float) -> Counter[tuple[int, ...]]:
    """Count how often each set of columns is committed, over `draws` seeds."""
    statistics = block(scores, [0.0] * len(scores), [0.0] * len(scores))
    rows = plan(draws, **columns)
    rows.seed.copy_(torch.arange(draws))
    repeated = BlockStatistics(
        **{name: value.expand(draws, -1) for name, value in vars(statistics).items()}
    )
    chosen = select_commits(repeated, rows)
    return Counter(tuple(row.nonzero().flatten().tolist()) for row in chosen)


def chi_square(counts: Counter[tuple[int, ...]], expected: dict[tuple[int, ...], float]) -> float:
    """Pearson's statistic of counts against expected counts."""
    assert set(counts) <= set(expected)
    return sum((counts[key] - value) ** 2 / value for key, value in expected.items())


def test_random_order_ignores_statistics_and_follows_the_seed() -> None:
    """`random` commits every pair of positions equally often over seeds, and a seed repeats its
    pair."""
    draws = 6000
    asked = {"score": Score.RANDOM, "count": 2}
    counts = committed_sets([0.9, 0.1, 0.1, 0.1], draws, **asked)
    pairs = list(itertools.combinations(range(4), 2))
    assert chi_square(counts, dict.fromkeys(pairs, draws / 6)) < 20.5  # 0.999, 5 degrees
    assert counts == committed_sets([0.9, 0.1, 0.1, 0.1], draws, **asked)


@pytest.mark.parametrize("count", [1, 2])
def test_alg_temp_draws_positions_by_their_scores(count: int) -> None:
    """With `alg_temp` positions are drawn without replacement from softmax(score / alg_temp), as
    `torch.multinomial` does (Dream)."""
    scores, draws = [0.8, 0.5, 0.1], 3000
    weights = (torch.tensor(scores, dtype=torch.float64) / 0.4).softmax(0).tolist()
    expected: dict[tuple[int, ...], float] = {}
    for order in itertools.permutations(range(3), count):
        chance, left = 1.0, 1.0
        for position in order:
            chance *= weights[position] / left
            left -= weights[position]
        key = tuple(sorted(order))
        expected[key] = expected.get(key, 0.0) + chance * draws
    counts = committed_sets(scores, draws, alg_temp=0.4, count=count)
    assert chi_square(counts, expected) < 13.8  # 0.999, 2 degrees


def test_origin_commits_each_position_by_chance() -> None:
    """Dream's `origin` commits every masked position independently with the step's chance."""
    statistics = block([0.5] * 200, [0.0] * 200, [0.0] * 200)
    share = len(chosen(statistics, rule=Rule.ORIGIN, chance=0.3)) / 200
    assert share == pytest.approx(0.3, abs=5 * math.sqrt(0.21 / 200))
    assert len(chosen(statistics, rule=Rule.ORIGIN, chance=1.0)) == 200


def test_rows_with_different_rules_do_not_mix() -> None:
    """Each row of a batch follows its own rule and parameters."""
    row = block([0.3, 0.9, 0.6], [0.5, 0.1, 0.2], [0.0] * 3)
    rows = BlockStatistics(**{name: v.expand(5, -1) for name, v in vars(row).items()})
    order = [Rule.COUNT, Rule.THRESHOLD, Rule.ENTROPY_BOUND, Rule.FACTOR, Rule.HIERARCHICAL]
    mixed = plan(5)
    mixed = CommitPlan(
        **vars(mixed)
        | {
            "rule": torch.tensor([int(r) for r in order]),
            "rules_in_use": frozenset(order),
            "count": torch.tensor([2, 1, 1, 1, 1]),
            "threshold": torch.tensor([0.0, 0.5, 0.15, 0.0, 0.2], dtype=torch.float64),
        }
    )
    found = [set(r.nonzero().flatten().tolist()) for r in select_commits(rows, mixed)]
    assert found == [{1, 2}, {1, 2}, {1, 2}, {1}, {0, 1, 2}]


def test_rows_with_different_scores_do_not_mix() -> None:
    """Each row of a batch is ranked by its own score, drawn or not, as it would be alone."""
    row = block([0.3, 0.9, 0.6], [0.5, 0.6, 0.2], [0.7, 0.1, 0.2])
    scores = [*Score, Score.CONFIDENCE]
    temperatures = [0.0] * len(Score) + [0.5]
    rows = BlockStatistics(**{name: v.expand(len(scores), -1) for name, v in vars(row).items()})
    mixed = CommitPlan(
        **vars(plan(len(scores)))
        | {
            "score": torch.tensor([int(score) for score in scores]),
            "scores_in_use": frozenset(scores),
            "alg_temp": torch.tensor(temperatures, dtype=torch.float64),
            "draws": True,
        }
    )
    alone = [
        chosen(row, score=int(score), alg_temp=temperature)
        for score, temperature in zip(scores, temperatures, strict=True)
    ]
    assert [r.nonzero().flatten().tolist() for r in select_commits(rows, mixed)] == alone
    assert alone[0] == [1]  # most confident
    assert alone[2:4] == [[2], [0]]  # least entropy, largest margin


#: A rule that needs a threshold, and one that only a causal family has.
SPECIAL = {"low_confidence_dynamic", "speculative"}
ALL_RULES = [
    *({"remasking": name} for name in REMASKING if name not in SPECIAL),
    {"remasking": "low_confidence_dynamic", "confidence_threshold": 0.1},
    *({"alg": name} for name in ALG),
    {"alg": "entropy", "alg_temp": 0.5, "temperature": 0.7, "top_p": 0.9, "top_k": 20},
    {"confidence_threshold": 0.1},
    {"confidence_threshold": 0.3, "low_threshold": 0.05},
    {"factor": 1.0},
    {"entropy_bound": 4.0},
    {"anchor_threshold": 0.2, "neighbor_threshold": 0.05},
]


@pytest.mark.parametrize("rule", ALL_RULES, ids=str)
def test_every_rule_fills_the_canvas_within_its_steps(llm: LLM, rule: dict[str, object]) -> None:
    """Every rule fills the canvas within its steps, and its result does not depend on the batch."""
    params = SamplingParams(
        gen_length=29,
        block_length=8,
        steps=14,
        ignore_eos=True,
        seed=1,
        **rule,  # type: ignore[arg-type]
    )
    alone = llm.generate([[4, 5]], params, progress=False)[0]
    assert (alone.confidence >= 0).all()
    parallel = set(rule) & {"confidence_threshold", "factor", "entropy_bound"}
    assert alone.usage.steps <= (29 if parallel else 14)
    others = [SamplingParams(gen_length=12, seed=i, **r) for i, r in enumerate(ALL_RULES)]  # type: ignore[arg-type]
    batch = llm.generate([[4, 5], *[[i, 9] for i in range(len(others))]], [params, *others],
                         progress=False)  # fmt: skip
    assert batch[0].token_ids.tolist() == alone.token_ids.tolist()
    assert batch[0].confidence.tobytes() == alone.confidence.tobytes()
