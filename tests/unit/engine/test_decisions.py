"""Decisions and scores offline: what a plain forward per question gives."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dllm_engine import LLM, InvalidRequest
from dllm_engine.decisions import LETTERS, WORDINGS

from tests.support.checkpoints import MASK
from tests.support.family_checkpoints import write_family
from tests.support.reference import Forward

TEXT = "The sky is blue."
LEVELS = [{"label": "bad"}, {"label": "good", "description": "as it should be"}]
TEN = [{"value": f"v{i}"} for i in range(10)]
MANY = [{"value": f"o{'ab'[: i % 3]}{i}"} for i in range(11)]
QUESTIONS: list[dict[str, Any]] = [
    {"type": "predicate", "instructions": "Is it blue?", "name": "blue"},
    {"type": "choice", "instructions": "Which?", "choices": TEN},
    {"type": "choice", "instructions": "Which?", "choices": [{"value": True}, {"value": "true"}]},
    {"type": "choice", "instructions": "Which?", "choices": MANY},
    {"type": "score", "instructions": "How good?", "levels": LEVELS},
]


def logs_at(llm: LLM, forward: Forward, content: str, masks: int) -> torch.Tensor:
    """Log-softmax at the masks that follow a chat's prompt: [masks, vocabulary]."""
    tokenizer = llm.engine.tokenizer
    assert tokenizer is not None
    ids = tokenizer.encode_messages(json.dumps([{"role": "user", "content": content}]))
    return forward(torch.tensor(ids + [MASK] * masks))[len(ids) :].log_softmax(dim=-1)


def ids_of(llm: LLM, text: str) -> list[int]:
    assert llm.engine.tokenizer is not None
    return llm.engine.tokenizer.encode_suffix(text)


def test_decisions_equal_a_plain_forward_each(llm64: LLM, oracle64: Forward) -> None:
    """Yes and no in several wordings, letters up to ten options, the options' own tokens above."""
    blue, ten, typed, many, good = llm64.decide(TEXT, QUESTIONS)
    logs = logs_at(llm64, oracle64, f"{TEXT}\n\nIs it blue?\nAnswer yes or no.", 1)[0]
    words = torch.tensor([[ids_of(llm64, w)[0] for w in pair] for pair in WORDINGS])
    expected = logs[words].mean(dim=0).softmax(dim=0)[0].item()
    assert blue == {
        "type": "predicate",
        "name": "blue",
        "probability": pytest.approx(expected, abs=1e-6),
    }
    lines = [f"{letter}. {c['value']}" for letter, c in zip(LETTERS, TEN, strict=True)]
    content = "\n".join([f"{TEXT}\n", "Which?", *lines, "Answer with the letter."])
    letters = torch.tensor([ids_of(llm64, letter)[0] for letter in LETTERS])
    p = logs_at(llm64, oracle64, content, 1)[0][letters].softmax(dim=0)
    assert [x["probability"] for x in ten["probabilities"]] == pytest.approx(p.tolist(), abs=1e-6)
    assert ten["choice"] == f"v{int(p.argmax())}"
    assert ten["confidence"] == pytest.approx(p.max().item(), abs=1e-6)
    assert [x["value"] for x in typed["probabilities"]] == [True, "true"]
    assert len(many["probabilities"]) == 11
    assert sum(x["probability"] for x in many["probabilities"]) == pytest.approx(1)
    lines = ["- bad", "- good: as it should be"]
    content = "\n".join([f"{TEXT}\n", "How good?", *lines, "Answer with one of these."])
    bad, fine = ids_of(llm64, "bad"), ids_of(llm64, "good")
    logs = logs_at(llm64, oracle64, content, max(len(bad), len(fine)))
    means = [logs[range(len(t)), t].mean().item() for t in (bad, fine)]
    p = torch.tensor(means).softmax(dim=0)
    assert good["score"] == pytest.approx(p[1].item(), abs=1e-5)
    assert [x["value"] for x in good["probabilities"]] == [0, 1]


def test_an_answer_does_not_depend_on_other_questions(llm: LLM) -> None:
    """Alone, or among others in the same steps: the same numbers."""
    together = llm.decide(TEXT, QUESTIONS)
    assert together == [llm.decide(TEXT, [question])[0] for question in QUESTIONS]


@pytest.mark.parametrize(
    ("question", "named"),
    [
        ({"type": "guess", "instructions": "?"}, "questions.0.type"),
        ({"type": "predicate"}, "questions.0.instructions"),
        ({"type": "choice", "instructions": "?", "choices": [{"value": "a"}]}, "2 to 255; got 1"),
        ({"type": "choice", "instructions": "?", "choices": [{"value": "a"}] * 2}, "twice"),
        ({"type": "score", "instructions": "?", "levels": [{"label": 1}] * 2}, "levels.0.label"),
    ],
)
def test_unusable_questions_are_refused(llm: LLM, question: dict[str, Any], named: str) -> None:
    """With the name of the field, before anything runs."""
    with pytest.raises(InvalidRequest, match=named):
        llm.decide(TEXT, [question])
    assert not llm.engine.has_work


def test_too_many_questions_are_refused(llm: LLM) -> None:
    """401 questions are too many; the message has both numbers."""
    with pytest.raises(InvalidRequest, match="1 to 400; got 401"):
        llm.decide(TEXT, [QUESTIONS[0]] * 401)


def test_a_score_is_the_mean_over_random_masks(llm64: LLM, oracle64: Forward) -> None:
    """It approaches the mean over all sets of masks, each weighted n / k (LLaDA's estimate)."""
    context, text = "A text", " ab"
    (found,) = llm64.score([(context, text)], mc_num=300, seed=5)
    given, answer = ids_of(llm64, context), ids_of(llm64, text)
    assert (found.num_tokens, found.method) == (len(answer), "monte_carlo")
    by_count = []
    for count in range(1, len(answer) + 1):
        sums = []
        for hidden in itertools.combinations(range(len(answer)), count):
            canvas = [MASK if i in hidden else token for i, token in enumerate(answer)]
            logs = oracle64(torch.tensor(given + canvas))[len(given) :].log_softmax(dim=-1)
            sums.append(sum(logs[i, answer[i]].item() for i in hidden) * len(answer) / count)
        by_count.append(np.mean(sums))
    assert found.logprob == pytest.approx(np.mean(by_count), rel=0.02)


def test_scores_are_the_same_in_any_call(llm: LLM) -> None:
    """A seed gives the same draws for a pair, alone or beside others; another seed gives others."""
    pairs = [("one", " two"), ("a b ", "c d e"), ("", "begin")]
    together = llm.score(pairs, mc_num=4, seed=7)
    assert together == [llm.score([pair], mc_num=4, seed=7)[0] for pair in pairs]
    assert together != llm.score(pairs, mc_num=4, seed=8)


def test_block_wise_models_score_left_to_right(tmp_path: Path) -> None:
    """A likelihood is the product of its tokens' probabilities."""
    write_family(tmp_path, "sdar")
    llm = LLM(tmp_path, dtype="float64", max_num_seqs=8)
    whole, first, second = llm.score([("a", "bcd"), ("a", "b"), ("ab", "cd")])
    assert whole.method == "left_to_right"
    assert whole.logprob == pytest.approx(first.logprob + second.logprob, abs=1e-5)
    answers = llm.decide(TEXT, QUESTIONS)
    assert answers == [llm.decide(TEXT, [question])[0] for question in QUESTIONS]
    with pytest.raises(InvalidRequest, match="mc_num"):
        llm.score([("a", "b")], mc_num=4)


@pytest.mark.parametrize(
    ("pairs", "arguments", "named"),
    [
        ([], {}, "1 to 1000 pairs; got 0"),
        ([("a", "")], {}, "pair 0"),
        ([("a", "b")], {"mc_num": 1025}, "1 to 1024; got 1025"),
        ([("a", "b")] * 100, {"mc_num": 128}, "4096 forward passes"),
        ([("a", "b")], {"seed": -1}, "seed"),
    ],
)
def test_unusable_scores_are_refused(
    llm: LLM, pairs: list[tuple[str, str]], arguments: dict[str, int], named: str
) -> None:
    """With the name of the field and the limit, before anything runs."""
    with pytest.raises(InvalidRequest, match=named):
        llm.score(pairs, **arguments)
