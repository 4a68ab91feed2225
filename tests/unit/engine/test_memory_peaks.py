"""What the memory plan says, held against what steps and weights take."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from dllm_engine import Engine, EngineConfig, Prompt, SamplingParams
from dllm_engine.ops import Head
from dllm_engine.sampling import (
    RowSampling,
    SamplingFlags,
    SpecialTokens,
    least_bytes,
    sample_candidates,
)

from benchmarks.allocations import AllocationMeter
from tests.support.checkpoints import write_llada

MIB = 2**20
LONGEST = 2048


def make_engine(directory: Path, **overrides: Any) -> Engine:
    """An engine on a checkpoint of a few MiB, whose logits have as little memory as may be."""
    sizes = {
        "d_model": 128,
        "n_heads": 8,
        "n_kv_heads": 4,
        "mlp_hidden_size": 352,
        "embedding_size": 8192,
        "vocab_size": 8192,
        "max_sequence_length": LONGEST,
    }
    write_llada(directory, tokenizer=False, **sizes | overrides)
    return Engine(
        EngineConfig(
            model_path=directory,
            device="cpu",
            memory_limit="1GiB",
            max_num_seqs=4,
            max_num_batched_tokens=LONGEST,
            logits_budget_mb=1,
        )
    )


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """One whose steps may have 4,096 rows: a request as long as may be, and its twin."""
    torch.set_num_threads(1)
    return make_engine(tmp_path_factory.mktemp("steps"))


def peak_of(engine: Engine, steps: int, gen_length: int, **params: Any) -> int:
    """The most bytes of tensors that one of the first steps of a request takes."""
    prompt = Prompt([1] * (LONGEST - gen_length))
    asked = SamplingParams(gen_length=gen_length, ignore_eos=True, **params)
    request = engine.make_request(prompt, asked)
    engine.add(request)
    peaks = []
    for _ in range(steps):
        with AllocationMeter() as meter:
            engine.step()
        peaks.append(meter.peak)
    engine.cancel(request.request_id)
    return max(peaks)


@pytest.mark.parametrize(
    "params",
    [
        {"cache": "none", "gen_length": 64},
        {"cache": "dual", "gen_length": 64},
        {"cache": "prefix", "gen_length": 1984, "block_length": 64},
        {"cache": "sparse", "gen_length": 1024, "block_length": 1024},
        {"cache": "delayed", "gen_length": 1024, "block_length": 1024},
        {"temperature": 1.0, "top_p": 0.9, "gen_length": 24},
        {"temperature": 1.0, "entropy_bound": 0.1, "gen_length": 256},
        {"confidence_threshold": 0.9, "credit": True, "gen_length": 256},
    ],
    ids=str,
)
def test_a_step_takes_no_more_than_was_planned(engine: Engine, params: dict[str, Any]) -> None:
    """A Refresh of the longest sequence and its twin, and the step after it, whatever is kept and
    however tokens are chosen; and the plan is no more than twice of what the largest takes."""
    plan = engine.memory_plan
    peak = peak_of(engine, 2, cfg_scale=1.0, **params)
    assert plan.activations / 2 < peak <= plan.activations + plan.logits


def held_by_weights(engine: Engine) -> int:
    """Bytes of parameters and of what was packed from them, each once."""
    model = engine._runner._model
    packed: list[torch.Tensor] = list(model.head._tiles) if model.head._packed else []
    for module in model.modules():
        form = getattr(module, "_packed", None)
        packed += [form] if isinstance(form, torch.Tensor) else form or []
    plain = list(model.parameters())
    if not (model.head._packed or model.spec.tied_head):
        plain += model.head._tiles
    return sum(weight.nbytes for weight in [*plain, *packed])


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("sizes", [{}, {"vocab_size": 512, "embedding_size": 512}], ids=str)
def test_weights_take_what_was_planned(tmp_path: Path, sizes: dict[str, int], tied: bool) -> None:
    """Packed ones too; of a head tied to the embedding both are there, where it is packed."""
    engine = make_engine(tmp_path, weight_tying=tied, mlp_hidden_size=1024, **sizes)
    assert engine._runner._model.head._packed == (not sizes)
    assert held_by_weights(engine) == engine.memory_plan.weights


def test_whole_rows_take_no_more_than_was_planned(tmp_path: Path) -> None:
    """With a budget too small for the rows that the head makes at once, these are planned for."""
    words = 2**15
    engine = make_engine(tmp_path, vocab_size=words, embedding_size=words, n_layers=1)
    assert engine.memory_plan.logits == least_bytes(words, 4) == 4 * MIB
    rows = 20

    def column(value: float, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.full((rows,), value, dtype=dtype)

    sampling = RowSampling(
        temperature=column(1.0, torch.float64),
        seed=column(1),
        step=column(0),
        position=torch.arange(rows),
        top_p=column(0.9, torch.float64),
        top_k=column(5),
        tempered=column(0, torch.bool),
        no_eos=column(0, torch.bool),
        late_eos=column(0, torch.bool),
        flags=SamplingFlags(noisy=True, whole=True, no_eos=False, late_eos=False),
    )
    special = SpecialTokens(words - 1, torch.tensor([words - 2]), torch.tensor([words - 2]))
    head, hidden = Head(torch.ones(words, 128)), torch.ones(rows, 128)
    with torch.inference_mode(), AllocationMeter() as meter:
        sample_candidates(hidden, head, sampling, special, budget_bytes=MIB, with_spread=True)
    # Some KiB are the rows' own: keys, tokens, statistics.
    assert meter.peak <= 1.02 * engine.memory_plan.logits
