"""What the memory plan says, held against what steps and weights take."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from dllm_engine import Engine, EngineConfig, Prompt, SamplingParams
from dllm_engine.sampling.candidates import sample_candidates
from dllm_engine.sampling.full_logits import least_bytes
from dllm_engine.sampling.rows import Candidates

from benchmarks.allocations import AllocationMeter
from tests.support.checkpoints import write_llada

MIB = 2**20
LONGEST = 2048


def make_engine(
    directory: Path, settings: dict[str, Any] | None = None, **overrides: Any
) -> Engine:
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
    common: dict[str, Any] = {
        "device": "cpu",
        "memory_limit": "1GiB",
        "max_num_seqs": 4,
        "max_num_batched_tokens": LONGEST,
        "logits_budget_mb": 1,
    }
    return Engine(EngineConfig(model_path=directory, **common | (settings or {})))


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
    plan = engine.runner.plan
    peak = peak_of(engine, 2, cfg_scale=1.0, **params)
    assert plan.activations / 2 < peak <= plan.activations + plan.logits


#: Of steps of Reuses: tokens of a sequence, rows of a step, and a model whose steps take little
#: else.
HELD, ROWS = 250, 512
NARROW = {
    "max_sequence_length": 256,
    "mlp_hidden_size": 64,
    "embedding_size": 512,
    "vocab_size": 512,
}


@pytest.mark.parametrize(
    ("count", "params"),
    [
        (ROWS // 32, {"cache": "dual", "block_length": 32}),
        (ROWS // 2, {"cache": "dual", "block_length": 2}),
        (ROWS // 33, {"cache": "delayed", "block_length": 33}),
        (2, {"cache": "prefix", "gen_length": HELD - 1}),
        (ROWS // 32, {"cache": "sparse", "block_length": 32, "retention_ratio": 1.0}),
    ],
    ids=str,
)
def test_a_step_of_reuses_takes_no_more_than_was_planned(
    tmp_path: Path, count: int, params: dict[str, Any]
) -> None:
    """As many sequences in the midst of their blocks as the token budget has room for, whatever
    they hold and however few rows each has."""
    settings = {"max_num_seqs": count, "max_num_batched_tokens": ROWS}
    engine = make_engine(tmp_path, settings, **NARROW)
    asked = {"gen_length": 66, "ignore_eos": True} | params
    prompt = Prompt([1] * (HELD - asked["gen_length"]))
    for _ in range(count):
        engine.add(engine.make_request(prompt, SamplingParams(**asked)))
    runner, slots = engine.runner, []
    for request in engine.scheduler.admit():
        assert request.slot is not None
        runner.start(request.slot, request.prompt, request.params, request.pages)
        slots.append(request.slot)
    assert len(slots) == count
    for slot in slots:
        runner.finish(runner.launch([slot]))
    with AllocationMeter() as meter:
        runner.finish(runner.launch(slots))
    plan = engine.runner.plan
    assert meter.peak <= plan.activations + plan.logits


def held_by_weights(engine: Engine) -> int:
    """Bytes of parameters and of what was packed from them, each once."""
    model = engine.runner.rank.model
    packed: list[torch.Tensor] = list(model.head.tiles) if model.head.packed else []
    for module in model.modules():
        form = getattr(module, "packed", None)
        packed += [form] if isinstance(form, torch.Tensor) else form or []
    plain = list(model.parameters())
    if not (model.head.packed or model.spec.tied_head):
        plain += model.head.tiles
    return sum(weight.nbytes for weight in [*plain, *packed])


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("sizes", [{}, {"vocab_size": 512, "embedding_size": 512}], ids=str)
def test_weights_take_what_was_planned(tmp_path: Path, sizes: dict[str, int], tied: bool) -> None:
    """Packed ones too; of a head tied to the embedding both are there, where it is packed."""
    engine = make_engine(tmp_path, weight_tying=tied, mlp_hidden_size=1024, **sizes)
    assert engine.runner.rank.model.head.packed == (not sizes)
    assert held_by_weights(engine) == engine.runner.plan.weights


def test_whole_rows_take_no_more_than_was_planned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a budget too small for the rows that the head makes at once, these are planned for."""
    words = 2**15
    engine = make_engine(tmp_path, vocab_size=words, embedding_size=words, n_layers=1)
    assert engine.runner.plan.logits == least_bytes(words, 4) == 4 * MIB
    peaks = []

    def measured(*args: Any, **named: Any) -> Candidates:
        with AllocationMeter() as meter:
            found = sample_candidates(*args, **named)
        peaks.append(meter.peak)
        return found

    monkeypatch.setattr("dllm_engine.execution.rank_model.sample_candidates", measured)
    params = SamplingParams(gen_length=20, temperature=1.0, top_p=0.9, top_k=5, ignore_eos=True)
    engine.add(engine.make_request(Prompt([1, 2, 3]), params))
    engine.step()
    # Some KiB are the rows' own: keys, tokens, statistics.
    assert least_bytes(words, 4) / 2 < max(peaks) <= 1.02 * engine.runner.plan.logits
