"""Between its first and its last operation a step never waits for the device."""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from dllm_engine import LLM, Prompt, SamplingParams
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support.checkpoints import write_llada
from tests.unit.kernels.cases import DEVICE

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
    """Notes where the host asks the device something."""

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


@contextmanager
def no_waiting() -> Iterator[list[str]]:
    """Waits of a GPU are errors; elsewhere the questions that would be waits are collected."""
    if DEVICE == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        with Questions() as mode:
            yield mode.asked
    finally:
        if DEVICE == "cuda":
            torch.cuda.set_sync_debug_mode("default")


def test_no_question_inside_a_step(tmp_path: Path) -> None:
    """Whatever the requests ask for, but filters, whose rows are sorted out by what they hold."""
    engine = LLM(write_llada(tmp_path), kernels="triton", device=DEVICE, dtype="float32").engine
    for params in (
        SamplingParams(gen_length=6, block_length=3, cfg_scale=1.0),
        SamplingParams(gen_length=6, block_length=3, cache="sparse", temperature=0.7),
        SamplingParams(gen_length=6, cache="delayed", confidence_threshold=0.5, credit=True),
        SamplingParams(gen_length=6, block_length=3, cache="dual", remasking="random"),
        SamplingParams(gen_length=6, cache="prefix", entropy_bound=0.1, logits_eos_inf=True),
        SamplingParams(gen_length=6, alg="entropy", alg_temp=0.3),
        SamplingParams(gen_length=6, confidence_threshold=0.9, low_threshold=0.3),
        SamplingParams(gen_length=6, anchor_threshold=0.5, confidence_eos_eot_inf=True),
    ):
        engine.add(engine.make_request(Prompt([1, 2, 3]), params))
    engine.step()
    for _ in range(2):
        slots = [r.slot for r in engine.scheduler.schedule() if r.slot is not None]
        with no_waiting() as asked:
            report = engine._runner.launch(slots)
        assert asked == [], "\n".join(asked)
        engine._runner.finish(report)
