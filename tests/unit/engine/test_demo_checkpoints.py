"""Both trained checkpoints answer, by rules of either family, with a cache and without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from dllm_engine import LLM, SamplingParams

from demo import corpus

FOLDER = Path(__file__).parents[3] / "model_repository/dllm/1"
#: What both have learned well.
TASKS = ("comparison", "month", "weekday", "definition")
RULES: list[dict[str, Any]] = [
    {},
    {"confidence_threshold": 0.9},
    {"alg": "origin"},
    {"alg": "entropy", "alg_temp": 0.1},
    {"cache": "sparse", "retention_ratio": 0.75},
    {"cache": "dual", "confidence_threshold": 0.9},
]


@pytest.fixture(
    scope="module", params=["demo_checkpoint", "demo_checkpoint_dream", "demo_checkpoint_sdar"]
)
def demo(request: pytest.FixtureRequest) -> LLM:
    """The LLaDA checkpoint, and its twin in Dream's format."""
    return LLM(FOLDER / request.param)


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_four_of_five_easy_questions_are_answered(demo: LLM, rule: dict[str, Any]) -> None:
    """Held-out questions of the tasks that the checkpoints know best, word for word."""
    asked = [e for task in TASKS for e in corpus.held_out_set(task, 6)]
    answers = demo.generate(
        [example.question for example in asked],
        SamplingParams(gen_length=32, seed=0, **rule),
        chat=True,
        progress=False,
    )
    right = [
        answer.text.strip() == example.answer
        for example, answer in zip(asked, answers, strict=True)
    ]
    assert sum(right) >= 0.8 * len(asked)
