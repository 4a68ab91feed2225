"""Forward passes replayed at a larger size equal the model called with the step itself."""

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from dllm_engine import LLM
from dllm_engine.execution import rank_model
from dllm_engine.execution.graphs import GRAPH_BYTES, ForwardGraphs, cuda_recorder, graph_sizes
from dllm_engine.memory.kv_cache import KVPages
from dllm_engine.models.base import DiffusionModel
from dllm_engine.models.loader import load_model, read_spec
from dllm_engine.ops.dispatch import choose_operations
from dllm_engine.ops.layout import FlatLayout, FlatSelection, LayerPages
from torch import Tensor

from tests.support.checkpoints import write_dream, write_llada
from tests.unit.kernels.cases import DEVICE, SMALL, near
from tests.unit.kernels.test_engine_on_kernels import MIXTURE, PROMPTS

MAX_SEQUENCES, MAX_PAGES, PAGE_SIZE = 6, 5, 8


def run_again(work: Callable[[], None]) -> Callable[[], None]:
    """Stands for recording and replaying without a GPU."""
    work()
    return work


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> DiffusionModel:
    """A tiny LLaDA on kernels."""
    folder = write_llada(tmp_path_factory.mktemp("llada"))
    return load_model(
        Path(folder),
        read_spec(folder),
        device=DEVICE,
        dtype=torch.float32,
        operations=choose_operations("triton", DEVICE, torch.float32),
    )


def random_pages(model: DiffusionModel) -> KVPages:
    """A pool with random contents."""
    pages = KVPages.allocate(
        dataclasses.replace(model.spec, max_model_len=MAX_PAGES * PAGE_SIZE),
        num_pages=MAX_SEQUENCES * MAX_PAGES,
        page_size=PAGE_SIZE,
        num_slots=MAX_SEQUENCES,
        device=DEVICE,
        dtype=torch.float32,
    )
    generator = torch.Generator().manual_seed(0)
    pages.keys.copy_(torch.randn(pages.keys.shape, generator=generator))
    pages.values.copy_(torch.randn(pages.values.shape, generator=generator))
    return pages


def by_layer(pages: KVPages) -> list[LayerPages]:
    """The pages per layer, as the model takes them."""
    return [LayerPages(k, v) for k, v in zip(pages.keys, pages.values, strict=True)]


def step_of(counts: list[int], kv_lens: list[int], rows: int) -> tuple[Tensor, Tensor, FlatLayout]:
    """Sequences with `counts` rows; those with `kv_lens` above 0 also store theirs behind these."""
    block_tables = torch.arange(len(counts) * MAX_PAGES, device=DEVICE).view(len(counts), MAX_PAGES)
    places = []
    for index, (count, stored) in enumerate(zip(counts, kv_lens, strict=True)):
        first = index * MAX_PAGES * PAGE_SIZE + stored - count
        places += range(first, first + count) if stored else [-1] * count
    places += [-1] * (rows - len(places))
    generator = torch.Generator().manual_seed(sum(counts))
    layout = dataclasses.replace(
        FlatLayout.of(counts, 32, DEVICE),
        kv_lens=torch.tensor(kv_lens, device=DEVICE),
        block_tables=block_tables[:, : MAX_PAGES - 1],
        slot_mapping=torch.tensor(places, device=DEVICE),
    )
    ids = torch.randint(0, 500, (rows,), generator=generator).to(DEVICE)
    return ids, torch.arange(rows, device=DEVICE) % 30, layout


@torch.inference_mode()
def test_a_replay_is_the_forward_pass(model: DiffusionModel) -> None:
    """Hidden states and stored rows equal those of the model, whatever was replayed before."""
    replayed, called = random_pages(model), random_pages(model)
    graphs = ForwardGraphs(
        model,
        by_layer(replayed),
        sizes=graph_sizes(48),
        block_m=32,
        max_sequences=MAX_SEQUENCES,
        max_pages=MAX_PAGES,
        record=run_again if DEVICE == "cpu" else cuda_recorder(),
    )
    for counts, kv_lens in (
        ([5, 40], [0, 0]),
        ([3, 9], [20, 0]),
        ([8, 1, 2, 10], [8, 17, 30, 31]),
        ([16], [16]),
    ):
        rows = -(-sum(counts) // 16) * 16
        ids, positions, layout = step_of(counts, kv_lens, rows)
        found = graphs.run(ids, positions, layout)
        assert found is not None
        hidden = model(ids, positions, layout, pages=by_layer(called))
        real = slice(0, sum(counts))
        near(found[real], model.head_input(hidden)[real], torch.float32)
        near(replayed.keys, called.keys, torch.float32)
        near(replayed.values, called.values, torch.float32)


@torch.inference_mode()
def test_a_replay_has_no_sequence_of_an_earlier_step(model: DiffusionModel) -> None:
    """Sequences behind the step's own have neither rows nor stored rows, so that no program reads
    keys for them."""
    graphs = ForwardGraphs(
        model,
        by_layer(random_pages(model)),
        sizes=[48],
        block_m=32,
        max_sequences=MAX_SEQUENCES,
        max_pages=MAX_PAGES,
        record=lambda work: work,
    )
    seen: list[FlatLayout] = []
    hook = model.register_forward_pre_hook(lambda _, args: seen.append(args[2]))
    graphs.run(*step_of([8, 1, 2, 10], [8, 17, 30, 31], 32))
    graphs.run(*step_of([16], [16], 16))
    hook.remove()
    assert seen[-1].query_lens.tolist()[1:] == [0] * (MAX_SEQUENCES - 1)
    assert seen[-1].kv_lens.tolist()[1:] == [0] * (MAX_SEQUENCES - 1)


def test_what_has_no_graph_is_left_to_the_model(model: DiffusionModel) -> None:
    """Steps larger than the largest graph, and steps that store a selection, are not replayed."""
    graphs = ForwardGraphs(
        model,
        by_layer(random_pages(model)),
        sizes=[16],
        block_m=32,
        max_sequences=MAX_SEQUENCES,
        max_pages=MAX_PAGES,
        record=lambda work: work,
    )
    assert graphs.run(*step_of([20], [0], 32)) is None
    ids, positions, layout = step_of([10], [0], 16)
    one = torch.ones(1, dtype=torch.int64)
    selection = FlatSelection(one, one, one, one, one, 4)
    chosen = FlatLayout(**{**vars(layout), "selection": selection})
    assert graphs.run(ids, positions, chosen) is None


def test_sizes() -> None:
    """A step above the smallest size is at most doubled."""
    sizes = graph_sizes(500)
    assert sizes[0] == 16
    assert sizes[-1] == 384
    for smaller, larger in itertools.pairwise(sizes):
        assert smaller < larger <= 2 * smaller
    assert graph_sizes(0) == graph_sizes(15) == []


def test_the_largest_is_recorded_first(model: DiffusionModel) -> None:
    """The largest graph is recorded first, so that the shared pool is as large as planned."""
    recorded = []

    def record(work: Callable[[], None]) -> Callable[[], None]:
        recorded.append(work.args[0])  # type: ignore[attr-defined]
        return work

    ForwardGraphs(
        model,
        by_layer(random_pages(model)),
        sizes=[16, 32, 48],
        block_m=32,
        max_sequences=MAX_SEQUENCES,
        max_pages=MAX_PAGES,
        record=record,
    )
    assert recorded == [48, 32, 16]


@pytest.mark.parametrize("write", [write_llada, pytest.param(write_dream, marks=pytest.mark.slow)])
def test_an_engine_with_graphs(
    write: Callable[[Path], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An engine with graphs decodes the same as one without, and its memory plan includes the
    graphs."""
    checkpoint = write(tmp_path)
    options = {"dtype": "float32", "kv_page_size": 8, "max_num_seqs": 6, "device": DEVICE}
    options |= {"memory_limit": "400MiB", **SMALL}
    plain = LLM(checkpoint, kernels="torch", **options)
    if DEVICE == "cpu":
        monkeypatch.setattr(rank_model, "largest_graph", lambda *_: 32)
        monkeypatch.setattr(rank_model, "cuda_recorder", lambda: run_again)
    else:
        options["cuda_graph_rows"] = 32
    llm = LLM(checkpoint, kernels="triton", **options)
    graphs = llm.engine.runner.rank.graphs  # type: ignore[union-attr]
    assert graphs is not None
    replays, run = [], graphs.run

    def count(*step: object) -> Tensor | None:
        hidden = run(*step)  # type: ignore[arg-type]
        replays.append(hidden is not None)
        return hidden

    monkeypatch.setattr(graphs, "run", count)
    pairs = zip(
        llm.generate(PROMPTS[1:4], MIXTURE[1:4], progress=False),
        plain.generate(PROMPTS[1:4], MIXTURE[1:4], progress=False),
        strict=True,
    )
    for mine, theirs in pairs:
        assert mine.token_ids.tolist() == theirs.token_ids.tolist()
        np.testing.assert_allclose(mine.confidence, theirs.confidence, rtol=1e-4, atol=1e-6)
    assert set(replays) == {True, False}
    plan, without = llm.engine.runner.plan, plain.engine.runner.plan
    assert plan.graphs >= len(graph_sizes(32)) * GRAPH_BYTES > without.graphs == 0
    used = plan.weights + plan.activations + plan.logits + plan.graphs
    assert used + plan.pages <= plan.limit == without.limit
    assert "DLLM_CUDA_GRAPH_ROWS" in str(plan)
