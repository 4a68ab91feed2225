"""Decisions and scores straight from Triton, without the adapter."""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from dllm_engine import LLM

from launcher.tritonserver import TritonServer
from tests.e2e.triton_calls import post
from tests.support.servers import eventually, metric, settled_counters

QUESTIONS: list[dict[str, Any]] = [
    {"type": "predicate", "instructions": "Is it blue?", "name": None},
    {"type": "score", "instructions": "How good?", "levels": [{"label": "a"}, {"label": "bc"}]},
]
DECIDE = json.dumps({"input": "The sky.", "questions": QUESTIONS})
#: Hundreds of steps on the test's model: it runs while it is cancelled.
LONG_SCORE = json.dumps({"pairs": [["a " * 300, "b" * 200]] * 4, "mc_num": 1000})


@pytest.mark.parametrize("model", ["dllm", "dllm_unary"])
def test_answers_equal_the_engine(triton: TritonServer, llm: LLM, model: str) -> None:
    """One response holds all answers as JSON, those of `LLM.decide` and `LLM.score`."""
    body = post(triton, {"decide": DECIDE}, model=model).json()
    assert body["finish_reason"] == "read"
    assert json.loads(body["text_output"])["answers"] == llm.decide("The sky.", QUESTIONS)
    prompt_tokens, completion_tokens, steps, passes, _ = body["usage"]
    assert (completion_tokens, steps, passes) == (0, 2, 2)
    assert prompt_tokens > 0
    score = json.dumps({"pairs": [["one", " two"]], "mc_num": 4, "seed": 1})
    body = post(triton, {"score": score}, model=model).json()
    (here,) = llm.score([("one", " two")], mc_num=4, seed=1)
    assert json.loads(body["text_output"])["scores"] == [vars(here)]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"decide": "x"}, "decide: JSON: cannot be read"),
        ({"decide": "{}"}, 'decide: JSON: must be an object with "input" and "questions"'),
        ({"decide": DECIDE, "score": "{}"}, "decide: cannot be combined with score"),
        ({"decide": DECIDE, "text_input": "x"}, "text_input: cannot be combined with decide"),
        ({"decide": DECIDE, "warmth": 1}, "warmth: no such input"),
        ({"score": '{"pairs": []}'}, "score: pairs: must be a list of 1 to 1000 pairs; got 0"),
        ({"score": '{"pairs": [["a", "b"]], "n": 1}'}, "score: JSON: has no field n"),
    ],
)
def test_refusals_name_the_field(
    triton: TritonServer, fields: dict[str, Any], message: str
) -> None:
    """What cannot be read is an error that names the input, and what is wrong in it."""
    assert re.search(re.escape(message), post(triton, fields).json()["error"])


def test_a_group_is_cancelled_as_a_whole(triton: TritonServer) -> None:
    """A cancel by id ends all of its passes, and it is answered once."""
    before = settled_counters(triton)
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(post, triton, {"score": LONG_SCORE, "id": "scores"})
        eventually(lambda: metric(triton, "dllm_running_requests") > 0, "it runs")
        post(triton, {"cancel": "scores"})
        assert call.result().json()["finish_reason"] == "cancelled"
    eventually(lambda: metric(triton, "dllm_running_requests") == 0, "its places are free")
    assert metric(triton, "dllm_waiting_requests") == 0
    cancelled = "dllm_requests_cancelled_total"
    assert metric(triton, cancelled) > before[cancelled]
