"""A model split over several processes answers as one does, and dies as one does."""

import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self
from unittest.mock import MagicMock

import numpy as np
import psutil
import pytest
import torch
from dllm_engine import (
    LLM,
    CanvasUpdate,
    CheckpointError,
    Engine,
    EngineConfig,
    EngineDead,
    EngineThread,
    InvalidConfig,
    Prompt,
    SamplingParams,
)
from dllm_engine.models import loader
from dllm_engine.models.loader import load_model, read_spec
from dllm_engine.parallel.group import Group
from dllm_engine.parallel.ranks import Ranks
from dllm_engine.watchdog import Watchdog
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from tests.support.budget import examples
from tests.support.cases import Case, cases, run_with_arrivals
from tests.support.checkpoints import write_dream, write_llada
from tests.support.servers import eventually, has_ended
from tests.unit.engine.test_parity import NO_SHRINK


def ranks_of(pid: int) -> list[psutil.Process]:
    """The rank processes that a process has started."""
    children = psutil.Process(pid).children()
    return [
        p
        for p in children
        if any("dllm_engine.execution.rank_worker" in part for part in p.cmdline())
    ]


@pytest.fixture(scope="module", params=["llada", "dream"])
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[LLM, LLM]]:
    """The same checkpoint in one process and in two; in float64, with small pages.

    Split sums are added up in another order, which in float32 moves the last bits, and two
    positions or tokens that are equal but for these then change places. In float64 that would
    take a coincidence of 1 in 10^12.
    """
    write = write_llada if request.param == "llada" else write_dream
    folder = write(tmp_path_factory.mktemp(request.param))
    common = {"dtype": "float64", "max_num_batched_tokens": 150, "max_num_seqs": 6}
    one = LLM(folder, kv_page_size=8, **common)
    with LLM(folder, kv_page_size=8, tensor_parallel_size=2, **common) as two:
        yield one, two


@settings(
    max_examples=examples(12),
    phases=NO_SHRINK,
    suppress_health_check=[HealthCheck.filter_too_much],
)
@given(batch=st.lists(cases(gen_length=14, prompt_length=20, caches=True), min_size=1, max_size=8))
def test_two_ranks_decode_what_one_does(pair: tuple[LLM, LLM], batch: list[Case]) -> None:
    """Any mix of policies, guidance, rules, samplings, gaps and arrivals: the same tokens and
    log-probabilities."""
    one, two = (run_with_arrivals(llm, batch) for llm in pair)
    for i in range(len(batch)):
        assert two[i].token_ids.tolist() == one[i].token_ids.tolist()
        assert two[i].confidence.tolist() == pytest.approx(one[i].confidence.tolist(), abs=1e-6)
        assert two[i].usage == one[i].usage
        assert two[i].reveal_steps.tolist() == one[i].reveal_steps.tolist()
        if (ours := one[i].log_probs) is not None:
            theirs = two[i].log_probs
            assert theirs is not None
            for name, values in vars(ours).items():
                np.testing.assert_allclose(getattr(theirs, name), values, atol=1e-5)


@pytest.mark.slow
def test_float32_over_three_ranks_and_several_tiles(tmp_path: Path) -> None:
    """In float32, with a head tied to the embedding and slices of more than a tile each."""
    sizes = {"d_model": 96, "n_heads": 6, "n_kv_heads": 3, "mlp_hidden_size": 192}
    folder = write_llada(
        tmp_path, embedding_size=12_600, vocab_size=12_600, weight_tying=True, **sizes
    )
    generator = torch.Generator().manual_seed(4)
    lengths = [3, 44, 5, 6, 7, 8]  # of a short one `sparse` would keep all
    prompts = [torch.randint(0, 12_600, (n,), generator=generator).tolist() for n in lengths]
    kinds = [
        {},
        # Without guidance: of nothing but masks all positions score alike, to the last bits.
        {"cache": "sparse"},
        {"temperature": 0.9, "seed": 1, "cfg_scale": 1.0},
        {"cache": "dual", "remasking": "margin"},
        {"cache": "delayed", "remasking": "entropy"},
        {"confidence_threshold": 0.05, "credit": True},
    ]
    params = [SamplingParams(gen_length=12, ignore_eos=True, **kind) for kind in kinds]  # type: ignore[arg-type]
    alone = LLM(folder).generate(prompts, params, progress=False)
    with LLM(folder, tensor_parallel_size=3) as llm:
        split = llm.generate(prompts, params, progress=False)
    for one, three in zip(alone, split, strict=True):
        assert three.token_ids.tolist() == one.token_ids.tolist()
        assert three.confidence.tolist() == pytest.approx(one.confidence.tolist(), abs=1e-4)


@pytest.mark.parametrize("write", [write_llada, write_dream])
def test_every_rank_reads_its_part_of_the_weights(tmp_path: Path, write: object) -> None:
    """The parts of two ranks, put together, are the whole; what is not split each has itself."""
    folder = write(tmp_path)  # type: ignore[operator]
    spec = read_spec(folder)
    options = {"device": "cpu", "dtype": torch.float64}  # as they were read: nothing is packed
    whole = dict(load_model(folder, spec, **options).named_parameters())
    half = spec.split(2)
    parts = [
        dict(load_model(folder, half, **options, group=Group(r, 2, "cpu", None)).named_parameters())
        for r in range(2)
    ]
    heads = [spec.num_heads, spec.num_kv_heads, spec.num_kv_heads]
    sections = {"qkv": [n * spec.head_dim for n in heads], "gate_up": [spec.intermediate_size] * 2}
    for name, full in whole.items():
        mine = [part[name] for part in parts]
        kind = name.split(".")[-2] if "." in name else name
        if kind in sections:
            pieces = [p.split([n // 2 for n in sections[kind]]) for p in mine]
            joined = torch.cat([half for pair in zip(*pieces, strict=True) for half in pair])
        elif kind in ("out", "down"):
            joined = torch.cat(mine, dim=1)
        else:
            assert torch.equal(mine[0], mine[1])
            joined = mine[0]
        assert torch.equal(joined, full), name
    assert half.weight_bytes(1) < 0.65 * spec.weight_bytes(1)


class Counted:
    """A file of tensors that counts the numbers that are taken from it."""

    def __init__(self, file: Any, taken: list[int]) -> None:
        self._file, self._taken = file, taken

    def __enter__(self) -> Self:
        self._file.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._file.__exit__(*error)

    def keys(self) -> list[str]:
        """Names of the tensors."""
        return list(self._file.keys())

    def get_tensor(self, name: str) -> torch.Tensor:
        """A whole one."""
        return self._count(self._file.get_tensor(name))

    def get_slice(self, name: str) -> Any:
        """What is known of a tensor, and parts of it by index."""
        view = self._file.get_slice(name)
        counted = MagicMock(wraps=view)
        counted.__getitem__.side_effect = lambda index: self._count(view[index])
        return counted

    def _count(self, tensor: torch.Tensor) -> torch.Tensor:
        self._taken.append(tensor.numel())
        return tensor


@pytest.mark.parametrize("write", [write_llada, write_dream])
def test_no_rank_reads_the_part_of_another(
    tmp_path: Path, write: Callable[[Path], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the files come as many numbers as the rank has parameters, and not one more."""
    taken: list[int] = []
    monkeypatch.setattr(
        loader, "safe_open", lambda *args, **named: Counted(safe_open(*args, **named), taken)
    )
    folder = write(tmp_path)
    half = read_spec(folder).split(2)
    for rank in range(2):
        taken.clear()
        group = Group(rank, 2, "cpu", None)
        load_model(folder, half, device="cpu", dtype=torch.float64, group=group)
        assert sum(taken) == half.weight_bytes(1)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (0, "DLLM_TENSOR_PARALLEL_SIZE: must be at least 1"),
        (4, r"DLLM_TENSOR_PARALLEL_SIZE: .*key/value heads \(2\); got 4"),
        (3, r"heads \(4\), key/value heads \(2\), vocabulary \(512\); got 3"),
    ],
)
def test_a_size_that_does_not_divide_is_refused(checkpoint: Path, size: int, message: str) -> None:
    """The message names the setting and everything that does not divide."""
    with pytest.raises(InvalidConfig, match=message):
        LLM(checkpoint, tensor_parallel_size=size)


def test_memory_is_planned_per_rank(checkpoint: Path) -> None:
    """Ranks share a CPU's memory: each takes half, and a page holds half of the heads."""
    common = {"memory_limit": "60MiB", "logits_budget_mb": 4, "cache": "dual"}
    one = LLM(checkpoint, **common).engine.runner.plan
    with LLM(checkpoint, tensor_parallel_size=2, **common) as llm:
        two = llm.engine.runner.plan
        assert llm.engine.allocator.num_pages == two.num_pages
    assert (two.limit, two.page) == (one.limit // 2, one.page // 2)
    assert two.weights < one.weights
    used = two.weights + two.requests + two.activations + two.logits + two.pages
    assert used <= two.limit


@pytest.mark.parametrize(
    ("number", "running", "why"),
    [
        (signal.SIGKILL, True, "was killed by signal 9"),
        (signal.SIGKILL, False, "was killed by signal 9"),
        (signal.SIGSTOP, True, "did not answer within 1 s"),
    ],
    ids=["killed", "killed while idle", "hung"],
)
def test_a_lost_rank_ends_the_engine(
    checkpoint: Path, number: int, running: bool, why: str
) -> None:
    """Whether it is dead or hangs, at work or idle: running requests fail with a reason that names
    the rank, the owner hears of it, new requests are refused, and no process is left."""
    config = EngineConfig(
        model_path=checkpoint, tensor_parallel_size=2, tensor_parallel_timeout=1.0
    )
    before = {p.pid for p in ranks_of(os.getpid())}
    deaths: queue.Queue[EngineDead] = queue.Queue()
    worker = EngineThread(Engine(config), on_death=deaths.put)
    (rank,) = [p for p in ranks_of(os.getpid()) if p.pid not in before]
    updates: queue.Queue[CanvasUpdate] = queue.Queue()

    def ask() -> None:
        params = SamplingParams(gen_length=200, ignore_eos=True)
        request = worker.engine.make_request(Prompt([1]), params, stream_interval=0)
        worker.submit(request, updates.put)

    if running:
        ask()
        assert updates.get(timeout=60).error is None
    rank.send_signal(number)
    reason = str(deaths.get(timeout=60))
    assert reason.startswith(f"rank 1 of 2 (process {rank.pid})")
    assert why in reason
    if running:
        last = next(u for u in iter(updates.get, None) if u.finished)
        assert isinstance(last.error, EngineDead)
        assert str(last.error) == reason
    with pytest.raises(EngineDead, match="rank 1 of 2"):
        ask()
    assert has_ended(rank)


@pytest.mark.slow
def test_a_rank_that_hangs_a_gpu_ends_the_engine(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There it is the device that waits, and knows no time-out: a step that takes too long is given
    up, the requests are told which rank is silent, and the device is let go."""
    aborted = threading.Event()

    def wait_for_ever(_: Group, part: torch.Tensor) -> torch.Tensor:
        assert aborted.wait(60)
        return part

    monkeypatch.setattr(Group, "waits", False)
    monkeypatch.setattr(Group, "abort", lambda _: aborted.set())
    config = EngineConfig(
        model_path=checkpoint, tensor_parallel_size=2, tensor_parallel_timeout=1.0
    )
    before = {p.pid for p in ranks_of(os.getpid())}
    deaths: queue.Queue[EngineDead] = queue.Queue()
    worker = EngineThread(Engine(config), on_death=deaths.put)
    (rank,) = [p for p in ranks_of(os.getpid()) if p.pid not in before]
    updates: queue.Queue[CanvasUpdate] = queue.Queue()
    rank.send_signal(signal.SIGSTOP)
    monkeypatch.setattr(Group, "sum", wait_for_ever)
    worker.submit(worker.engine.make_request(Prompt([1]), SamplingParams()), updates.put)
    error = updates.get(timeout=60).error
    assert isinstance(error, EngineDead)
    assert str(error).startswith(f"rank 1 of 2 (process {rank.pid}) did not answer within 1 s")
    assert str(deaths.get(timeout=60)) == str(error)
    assert has_ended(rank)


def test_an_alarm_rings_for_long_blocks_only() -> None:
    """However many short ones there were; once; and never when it is closed."""
    rung = threading.Event()
    watchdog = Watchdog(0.4, rung.set)
    for _ in range(1000):
        with watchdog:
            pass
    assert not rung.wait(0.6)
    with watchdog:
        assert rung.wait(30)
    rung.clear()
    closed = Watchdog(0.01, rung.set)
    closed.close()
    with closed, watchdog:
        assert not rung.wait(0.6)


@pytest.mark.slow
def test_what_a_rank_cannot_do_is_told(checkpoint: Path) -> None:
    """A rank that meets an error at its start says so, with its number, before it ends."""
    ranks = Ranks(2, threads=1, timeout=5, task="no task")
    try:
        with pytest.raises(EngineDead, match=r"rank 1 of 2 \(process \d+\): AssertionError"):
            ranks.collect()
    finally:
        ranks.close()
    damaged = checkpoint.parent / "damaged"
    write_llada(damaged)
    (damaged / "model.safetensors").write_bytes(b"nothing")
    before = len(ranks_of(os.getpid()))
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        LLM(damaged, tensor_parallel_size=2)
    assert len(ranks_of(os.getpid())) == before


@pytest.mark.slow
def test_a_rank_may_take_longer_to_load_than_a_step(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others wait for it; the time-out is for steps."""
    (tmp_path / "sitecustomize.py").write_text(
        "import safetensors, time\n"
        "open_now = safetensors.safe_open\n"
        "safetensors.safe_open = lambda *a, **k: (time.sleep(5), open_now(*a, **k))[1]\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    params = SamplingParams(gen_length=1, ignore_eos=True)
    with LLM(checkpoint, tensor_parallel_size=2, tensor_parallel_timeout=2.0) as llm:
        assert len(llm.generate([[5]], params, progress=False)[0].token_ids) == 1


def test_ranks_leave_with_the_engine(checkpoint: Path, tmp_path: Path) -> None:
    """They share its threads; after kill -9 of it they end, and no file of theirs stays."""
    program = (
        "import sys, time, torch; from dllm_engine import LLM\n"
        "torch.set_num_threads(6)\n"
        "llm = LLM(sys.argv[1], tensor_parallel_size=2)\n"
        "print(torch.get_num_threads(), flush=True)\n"
        "time.sleep(600)"
    )
    settings = {"PYTHONPATH": os.pathsep.join(sys.path), "TMPDIR": str(tmp_path)}
    engine = subprocess.Popen(
        [sys.executable, "-c", program, str(checkpoint)],
        stdout=subprocess.PIPE,
        env=os.environ | settings,
    )
    assert engine.stdout is not None
    with engine:
        try:
            assert engine.stdout.readline() == b"3\n"
            (rank,) = ranks_of(engine.pid)
            assert rank.environ()["OMP_NUM_THREADS"] == "3"
        finally:
            engine.kill()
    eventually(lambda: has_ended(rank), "the rank has ended")
    eventually(lambda: not list(tmp_path.iterdir()), "its files are gone")
