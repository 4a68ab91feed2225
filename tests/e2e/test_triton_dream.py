"""A checkpoint of the second family behind the same server: `MODEL_PATH` is all that differs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.e2e.triton_calls import generate
from tests.support.servers import REPOSITORY, triton_server

TWIN = REPOSITORY / "dllm/1/demo_checkpoint_dream"
QUESTIONS = ["What is AI?", "Explain ML.", "What is the capital of France?"]
RULES: list[dict[str, Any]] = [
    {},
    {"confidence_threshold": 0.9, "cache": "dual"},
    {"alg": "entropy", "temperature": 0.2, "top_p": 0.95, "seed": 1},
]


def test_the_dream_twin_answers_through_triton_as_in_the_engine(tmp_path: Path) -> None:
    """Over the generate endpoint, by both families' rules: text and tokens of the engine."""
    from dllm_engine import LLM, SamplingParams

    llm = LLM(TWIN, device="cpu")
    with triton_server(TWIN, log_file=tmp_path / "triton.log") as server:
        for rule in RULES:
            params = SamplingParams(gen_length=32, **rule)
            expected = llm.generate(QUESTIONS, params, chat=True, progress=False)
            for question, own in zip(QUESTIONS, expected, strict=True):
                messages = json.dumps([{"role": "user", "content": question}])
                answer = generate(server, messages=messages, gen_length=32, **rule)
                assert answer.text == own.text != ""
                assert answer.token_ids == own.token_ids.tolist()
                if question == QUESTIONS[-1]:
                    assert "Paris" in answer.text
