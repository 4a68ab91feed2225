"""The training script makes checkpoints that the engine serves, in both families' layouts."""

from __future__ import annotations

import functools
import json
import os
import sys
from pathlib import Path

import pytest
from dllm_engine import LLM, SamplingParams

from demo import corpus, train


@pytest.mark.parametrize(
    ("family", "architecture"),
    [
        ("llada", "LLaDAModelLM"),
        pytest.param("dream", "DreamModel", marks=pytest.mark.slow),
        pytest.param("sdar", "SDARForCausalLM", marks=pytest.mark.slow),
    ],
)
def test_a_run_can_be_broken_off_resumed_and_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, architecture: str
) -> None:
    """One step, saved and resumed for a second: the weights change, and the engine loads them with
    their tokenizer and chat template and fills a canvas."""
    # On all the questions, scores take longer than steps.
    monkeypatch.setattr(train, "quick_scores", functools.partial(train.quick_scores, count=2))
    out, state = tmp_path / "checkpoint", tmp_path / "run.pt"

    def run(*options: str) -> bytes:
        fixed = ["--family", family, "--out", out, "--state", state, "--workers", 1]
        monkeypatch.setattr(sys, "argv", ["demo.train", *map(str, fixed), *options])
        train.main()
        return (out / "model.safetensors").read_bytes()

    first = run("--steps", "1")
    assert run("--steps", "2", "--resume", os.fspath(state)) != first
    assert json.loads((out / "config.json").read_text())["architectures"] == [architecture]
    llm = LLM(out)
    question = corpus.held_out_set("addition", 1)[0].question
    params = SamplingParams(gen_length=8, ignore_eos=True)
    answer = llm.generate([question], params, chat=True, progress=False)[0]
    assert answer.usage.completion_tokens == 8
    assert llm.engine.spec.mask_token_id not in answer.token_ids.tolist()
    assert (answer.confidence > 0).all()
