"""The trained checkpoints answer, by rules of every family, with a cache and without."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
from dllm_engine import LLM, SamplingParams

from demo import corpus, evaluate

FOLDER = Path(__file__).parents[3] / "model_repository/dllm/1"
#: What all have learned well.
TASKS = ("comparison", "month", "weekday", "definition")
RULES: list[dict[str, Any]] = [
    {},
    {"confidence_threshold": 0.9},
    {"alg": "origin"},
    {"alg": "entropy", "alg_temp": 0.1},
    {"cache": "sparse", "retention_ratio": 0.75},
    {"cache": "dual", "confidence_threshold": 0.9},
]


#: Keys and values of a block-wise model are exact; it takes no other cache.
BLOCKWISE_RULES: list[dict[str, Any]] = [
    {},
    {"remasking": "low_confidence"},
    {"remasking": "sequential", "cache": "none"},
    {"entropy_bound": 0.1},
]
CASES = [
    *((name, rule) for name in ("demo_checkpoint", "demo_checkpoint_dream") for rule in RULES),
    *(("demo_checkpoint_sdar", rule) for rule in BLOCKWISE_RULES),
]


@functools.cache
def opened(name: str) -> LLM:
    """The checkpoint of this name."""
    return LLM(FOLDER / name)


@pytest.mark.parametrize(("name", "rule"), CASES, ids=str)
def test_four_of_five_easy_questions_are_answered(name: str, rule: dict[str, Any]) -> None:
    """Held-out questions of the tasks that the checkpoints know best, word for word."""
    asked = [e for task in TASKS for e in corpus.held_out_set(task, 6)]
    answers = opened(name).generate(
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


def test_the_block_wise_checkpoint_decodes_as_its_plain_loop() -> None:
    """The engine answers word for word as a loop that computes every pass from the start."""
    asked = [e.question for task in TASKS for e in corpus.held_out_set(task, 3)]
    plain = evaluate.answers(
        evaluate.open_checkpoint(FOLDER / "demo_checkpoint_sdar"),
        asked,
        evaluate.Decoding(length=32, block=32, steps=32),
    )
    params = SamplingParams(gen_length=32, remasking="low_confidence")
    given = opened("demo_checkpoint_sdar").generate(asked, params, chat=True, progress=False)
    assert [answer.text.strip() for answer in given] == plain
