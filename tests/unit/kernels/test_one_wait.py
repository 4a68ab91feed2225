"""Between its first and its last operation a step never waits for the device."""

import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from dllm_engine import LLM, Prompt, SamplingParams
from dllm_engine.ops.dispatch import choose_operations
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support.checkpoints import write_llada
from tests.unit.kernels.cases import DEVICE, SMALL

OPTIONS = {"device": DEVICE, "dtype": "float32", **SMALL}

aten = torch.ops.aten
#: Their result, or its size, depends on what a tensor holds.
QUESTIONS = {
    aten._local_scalar_dense,
    aten.nonzero,
    aten.masked_select,
    aten._unique2,
    aten.unique_dim,
    aten.unique_consecutive,
}


class Questions(TorchDispatchMode):
    """Records operations that make the host wait for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Note the place and go on."""
        kwargs = kwargs or {}
        asks = func.overloadpacket in QUESTIONS
        if func.overloadpacket in (aten.index, aten.index_put_):
            asks = any(i is not None and i.dtype == torch.bool for i in args[1])
        if func is aten.repeat_interleave.Tensor:
            asks = kwargs.get("output_size") is None
        if asks:
            frames = [f for f in traceback.extract_stack() if "dllm_engine" in f.filename]
            self.asked.append(f"{func} at {frames[-1].filename}:{frames[-1].lineno}")
        return func(*args, **kwargs)


#: Methods that bring what a tensor holds to the host; on a CPU no operation stands for them.
READS = ("tolist", "numpy", "cpu", "item", "__bool__", "__int__", "__float__", "__index__")


def note_reads(patch: pytest.MonkeyPatch, asked: list[str]) -> None:
    """Record where the engine's own lines read a tensor; the kernels' interpreter may read."""

    def watched(name: str, read: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            caller = sys._getframe(1)
            place = f"{name} at {caller.f_code.co_filename}:{caller.f_lineno}"
            reads = name != "to" or "cpu" in [a for a in args if isinstance(a, str)]
            # transfer.py sends to the device, and reads in one method.
            sends = "transfer.py" in place and caller.f_code.co_name != "array"
            if reads and "dllm_engine" in place and not sends:
                asked.append(place)
            return read(*args, **kwargs)

        return call

    for name in (*READS, "to"):
        patch.setattr(torch.Tensor, name, watched(name, getattr(torch.Tensor, name)))


@contextmanager
def no_waiting() -> Iterator[list[str]]:
    """On a GPU, waiting is an error; elsewhere, collect the operations that would wait."""
    if DEVICE == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        with Questions() as mode, pytest.MonkeyPatch.context() as patch:
            note_reads(patch, mode.asked)
            yield mode.asked
    finally:
        if DEVICE == "cuda":
            torch.cuda.set_sync_debug_mode("default")


def test_no_question_inside_a_step(tmp_path: Path) -> None:
    """No request parameter makes the host wait between launch and finish of a step."""
    engine = LLM(write_llada(tmp_path), kernels="triton", **OPTIONS).engine
    for params in (
        SamplingParams(gen_length=6, block_length=3, cfg_scale=1.0),
        SamplingParams(gen_length=6, block_length=3, cache="sparse", temperature=0.7),
        SamplingParams(gen_length=6, cache="delayed", confidence_threshold=0.5, credit=True),
        SamplingParams(gen_length=6, block_length=3, cache="dual", remasking="random"),
        SamplingParams(gen_length=6, cache="prefix", entropy_bound=0.1, logits_eos_inf=True),
        SamplingParams(gen_length=6, alg="entropy", alg_temp=0.3),
        SamplingParams(gen_length=6, alg="origin", temperature=0.5, top_k=3, logits_eos_inf=True),
        SamplingParams(gen_length=6, temperature=0.7, top_p=0.8, confidence_eos_eot_inf=True),
        SamplingParams(gen_length=6, confidence_threshold=0.9, low_threshold=0.3),
        SamplingParams(gen_length=6, anchor_threshold=0.5, confidence_eos_eot_inf=True),
    ):
        engine.add(engine.make_request(Prompt([1, 2, 3]), params))
    engine.step()
    for _ in range(2):
        slots = [r.slot for r in engine.scheduler.schedule() if r.slot is not None]
        with no_waiting() as asked:
            report = engine.runner.launch(slots)
        assert asked == [], "\n".join(asked)
        engine.runner.finish(report)


class Work(TorchDispatchMode):
    """Counts operations on the device, except views and allocations."""

    count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Count it and go on."""
        results = [r.alias_info for r in func._schema.returns]
        is_view = any(alias is not None and not alias.is_write for alias in results)
        allocates = func.overloadpacket in (aten.empty, aten.new_empty, aten.empty_like)
        self.count += not (is_view or allocates)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("requests", [1, 8])
def test_the_device_lays_out_nothing(tmp_path: Path, requests: int) -> None:
    """Before the forward pass the device runs at most three operations, for any number of
    requests."""
    engine = LLM(write_llada(tmp_path), kernels="triton", **OPTIONS).engine
    for i in range(requests):
        params = SamplingParams(gen_length=6 + i, block_length=3, cache=("dual", "sparse")[i % 2])
        engine.add(engine.make_request(Prompt([1, 2, 3]), params))
    model, before = engine.runner.rank.model, []
    forward = model.forward
    with pytest.MonkeyPatch.context() as patch, Work() as work:

        def noted(*args: Any, **kwargs: Any) -> Any:
            before.append(work.count)
            hidden = forward(*args, **kwargs)
            work.count = 0
            return hidden

        patch.setattr(model, "forward", noted)
        engine.step()
        work.count = 0
        engine.step()
    assert len(before) == 2
    assert before[1] <= 3


def test_a_read_would_be_seen() -> None:
    """`note_reads` records every kind of read in a line of the engine."""
    source = "x.tolist(); x.to('cpu'); bool(x[0]); x.to(torch.int32)"
    code = compile(source, "dllm_engine/anything.py", "exec")
    with pytest.MonkeyPatch.context() as patch:
        asked: list[str] = []
        note_reads(patch, asked)
        exec(code, {"x": torch.ones(2), "torch": torch})
    assert [place.split()[0] for place in asked] == ["tolist", "to", "__bool__"]


def test_a_step_reads_the_device_once(tmp_path: Path) -> None:
    """A step reads its results with one copy, however many requests it ends and streams."""
    engine = LLM(write_llada(tmp_path), **OPTIONS).engine
    fetched = []
    for count in (1, 5):
        for length in range(2, 2 + count):
            params = SamplingParams(gen_length=length, ignore_eos=True)
            request = engine.make_request(Prompt([1, 2, 3]), params, stream_interval=0.0)
            engine.add(request)
        engine.step()
        with pytest.MonkeyPatch.context() as patch:
            asked: list[str] = []
            note_reads(patch, asked)
            assert len(engine.step()) == count
        fetched.append([place.split()[0] for place in asked])
        while engine.has_work:
            engine.step()
    assert fetched == [["numpy"]] * 2


def test_newcomers_are_laid_out_while_a_step_is_in_flight(tmp_path: Path) -> None:
    """A request that gets a slot is laid out between a step's launch and the wait for its end."""
    engine = LLM(write_llada(tmp_path), **OPTIONS).engine
    runner, order = engine.runner, []

    def noted(name: str, call: Any) -> Any:
        def noting(*args: Any) -> Any:
            order.append(name)
            return call(*args)

        return noting

    with pytest.MonkeyPatch.context() as patch:
        for name in ("launch", "start", "finish"):
            patch.setattr(runner, name, noted(name, getattr(runner, name)))
        launch = runner.launch

        def launch_as_another_comes(slots: list[int]) -> Any:
            if len(order) == 1:
                engine.add(engine.make_request(Prompt([4, 5]), SamplingParams(gen_length=4)))
            return launch(slots)

        patch.setattr(runner, "launch", launch_as_another_comes)
        engine.add(engine.make_request(Prompt([1, 2, 3]), SamplingParams(gen_length=4)))
        engine.step()
        engine.step()
    assert order == ["start", "launch", "start", "finish", "launch", "finish"]


def test_a_gpu_without_kernels_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    """Where a GPU falls back to torch's operations, the log says so at start, and why."""
    assert not choose_operations("auto", "cuda:0", torch.float64).kernels
    assert "torch's operations: triton has no kernels for float64" in caplog.text
