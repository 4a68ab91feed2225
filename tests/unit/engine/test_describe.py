"""What `dllm inspect` says of a checkpoint, against what an engine does."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch
from dllm_engine import Engine, EngineConfig
from dllm_engine.describe import describe, fit, main, plan_memory
from dllm_engine.models.loader import read_spec

from tests.support.checkpoints import write_llada

GIB = 2**30


@pytest.mark.parametrize("quantization", ["none", "int8"])
def test_the_plan_is_an_engines_own(tmp_path: Path, quantization: str) -> None:
    """Each part of the plan is what an engine reserves at its start; activations come close."""
    wide = {"d_model": 512, "mlp_hidden_size": 1408, "n_heads": 8, "n_kv_heads": 8}
    folder = write_llada(tmp_path, **wide, max_sequence_length=512)
    config = EngineConfig(model_path=folder, device="cpu", quantization=quantization)
    real = Engine(config).runner.plan
    spec = read_spec(folder)
    planned = plan_memory(config, spec, device="cpu", available=real.available, dtype=torch.float32)
    # With `int8`, a process that has run other models measures up to 1.7 times as much.
    assert 0.5 < planned.activations / real.activations < 1.5
    assert dataclasses.replace(planned, activations=real.activations) == real


def test_a_model_that_does_not_fit_is_split(tmp_path: Path) -> None:
    """The fewest cards on which it fits are named; if there are none, why."""
    folder = write_llada(tmp_path)
    config = EngineConfig(model_path=folder, device="cpu", max_num_batched_tokens=512)
    spec = dataclasses.replace(read_spec(folder), num_layers=32, hidden_size=4096, num_heads=32)
    spec = dataclasses.replace(spec, num_kv_heads=32, head_dim=128, intermediate_size=12288)
    args = {"device": "card", "dtype": torch.bfloat16, "ranks": (1, 2, 4)}
    whole = fit(config, spec, memory=20 * GIB, **args)
    assert (whole.num_ranks, whole.problem) == (1, "")
    split = fit(config, spec, memory=8 * GIB, **args)
    assert split.num_ranks == 2
    assert split.plan is not None
    assert split.plan.weights < 0.51 * spec.weight_bytes(2)
    nowhere = fit(config, spec, memory=GIB, **args)
    assert (nowhere.num_ranks, nowhere.plan) == (0, None)
    assert "weights alone take" in nowhere.problem


def test_a_program_prints_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It prints JSON under the settings of the environment, or one line and exit code 1."""
    folder = write_llada(tmp_path)
    monkeypatch.setattr(sys, "argv", ["describe", str(folder)])
    monkeypatch.setenv("DLLM_MAX_NUM_SEQS", "3")
    assert main() == 0
    described = json.loads(capsys.readouterr().out)
    assert described["parameters"] == read_spec(folder).weight_bytes(1)
    assert described["here"]["plan"]["num_pages"] == 3 * 2 * 256 // 32
    assert "H200" in {card["device"] for card in described["cards"]}
    (folder / "config.json").write_text('{"architectures": ["GPT2LMHeadModel"]}')
    assert main() == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("config.json: architecture GPT2LMHeadModel; supported: ")


def test_settings_change_the_plan(tmp_path: Path) -> None:
    """Keys and values of fewer requests take fewer pages, on every card."""
    folder = write_llada(tmp_path)
    few, many = (
        describe(EngineConfig(model_path=folder, device="cpu", max_num_seqs=n)) for n in (1, 64)
    )
    for a, b in zip(few["cards"], many["cards"], strict=True):
        assert a["plan"]["num_pages"] < b["plan"]["num_pages"]
