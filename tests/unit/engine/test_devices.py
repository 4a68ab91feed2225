"""Which GPU an engine is on, and which thread knows it. No GPU is needed: CUDA is patched."""

import re
import threading
from pathlib import Path

import pytest
import torch
from dllm_engine import LLM, Engine, EngineConfig, EngineThread, InvalidConfig, SamplingParams
from dllm_engine.execution.devices import rank_device

from tests.support.engines import runner_of

#: Devices made current, with the name of the thread they were made so for.
Bindings = list[tuple[str, str]]


class OutOfReach(Exception):
    """What a machine without GPUs cannot do."""


@pytest.fixture
def bindings(monkeypatch: pytest.MonkeyPatch) -> Bindings:
    """Filled by `torch.cuda.set_device`."""
    made: Bindings = []

    def note(device: torch.device) -> None:
        made.append((str(device), threading.current_thread().name))

    monkeypatch.setattr(torch.cuda, "set_device", note)
    return made


def pretend_gpus(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """So many GPUs are visible; their memory is not."""

    def fail(_: object) -> None:
        raise OutOfReach

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "mem_get_info", fail)


def test_loading_makes_the_gpu_current_before_it_asks_for_memory(
    checkpoint: Path, bindings: Bindings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An engine on the second GPU leaves the first alone."""
    pretend_gpus(monkeypatch, 2)
    with pytest.raises(OutOfReach):
        LLM(checkpoint, device="cuda:1")
    assert bindings == [("cuda:1", threading.current_thread().name)]


def test_w8a8_is_for_cpus(
    checkpoint: Path, bindings: Bindings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU it is refused by name, before anything is loaded."""
    pretend_gpus(monkeypatch, 1)
    with pytest.raises(InvalidConfig, match="DLLM_QUANTIZATION: w8a8 is for CPUs; on cuda"):
        LLM(checkpoint, quantization="w8a8")
    assert bindings == []


def test_the_threads_that_step_are_on_the_engines_gpu(checkpoint: Path, bindings: Bindings) -> None:
    """The engine's thread, and a thread that calls `generate`, select the engine's GPU."""
    llm = LLM(checkpoint, device="cpu")
    runner_of(llm.engine).rank.device = "cuda:1"
    llm.generate([[1]], SamplingParams(gen_length=1), progress=False)
    assert bindings == [("cuda:1", threading.current_thread().name)]
    EngineThread(llm.engine).close()
    assert bindings[1:] == [("cuda:1", "dllm-engine")]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_no_device_is_made_current_where_none_is_named(
    checkpoint: Path, bindings: Bindings, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    """A CPU has none, and of the GPUs it is the one that the process has chosen."""
    if device == "cuda":
        pretend_gpus(monkeypatch, 2)
        with pytest.raises(OutOfReach):
            LLM(checkpoint, device=device)
    else:
        worker = EngineThread(Engine(EngineConfig(model_path=checkpoint, device=device)))
        worker.close()
    assert not bindings


@pytest.mark.parametrize(
    ("device", "devices"),
    [
        ("cpu", ["cpu", "cpu"]),
        ("auto", ["cuda:0", "cuda:1"]),
        ("cuda", ["cuda:0", "cuda:1"]),
        ("cuda:2", ["cuda:2", "cuda:3"]),
    ],
)
def test_ranks_have_gpus_in_a_row(
    monkeypatch: pytest.MonkeyPatch, device: str, devices: list[str]
) -> None:
    """From the one that is named on."""
    pretend_gpus(monkeypatch, 4)
    config = EngineConfig(model_path=Path(), device=device, tensor_parallel_size=2)
    assert [rank_device(config, rank) for rank in range(2)] == devices


def test_the_second_instance_of_a_split_model_is_told_what_to_write(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Triton gives instances neighbouring GPUs, of which each wants several."""
    pretend_gpus(monkeypatch, 5)
    config = EngineConfig(model_path=Path(), device="cuda:4", tensor_parallel_size=2)
    groups = (
        "instance_group [ { count: 1 kind: KIND_GPU gpus: [ 0 ] }, "
        "{ count: 1 kind: KIND_GPU gpus: [ 2 ] } ]"
    )
    with pytest.raises(
        InvalidConfig,
        match=rf"^DLLM_TENSOR_PARALLEL_SIZE: 2 ranks from cuda:4 .* has 5\..*{re.escape(groups)}$",
    ):
        rank_device(config, 0)


def test_more_ranks_than_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """No way to write it helps."""
    pretend_gpus(monkeypatch, 2)
    config = EngineConfig(model_path=Path(), device="auto", tensor_parallel_size=4)
    with pytest.raises(InvalidConfig, match="4 ranks from cuda:0 on need a GPU each; .* has 2$"):
        rank_device(config, 0)
