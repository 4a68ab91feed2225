"""Engines of a test's own, driven step by step, with the checkpoint's model or without one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from dllm_engine import CanvasUpdate, Engine, EngineConfig, Prompt, SamplingParams
from dllm_engine.execution.runner import ModelRunner
from dllm_engine.memory.plan import MemoryPlan
from dllm_engine.state.canvas import Canvas, StepResult

from .checkpoints import MASK

PROMPT = [1, 2, 3]


def make_engine(directory: Path, runner: ModelRunner | None = None, **settings: object) -> Engine:
    """An engine of its own on this checkpoint."""
    return Engine(EngineConfig(model_path=directory, **settings), runner)  # type: ignore[arg-type]


def run(engine: Engine) -> dict[int, CanvasUpdate]:
    """Step until all requests are finished; returns final updates by request id."""
    finished = {}
    while engine.has_work:
        finished |= {u.request_id: u for u in engine.step() if u.finished}
    return finished


def submit(engine: Engine, **params: object) -> int:
    """Queue a request with these parameters; returns its id."""
    request = engine.make_request(Prompt(PROMPT), SamplingParams(**params))  # type: ignore[arg-type]
    engine.add(request)
    return request.request_id


def runner_of(engine: Engine) -> ModelRunner:
    """The runner of an engine that loaded its checkpoint's model."""
    assert isinstance(engine.runner, ModelRunner)
    return engine.runner


def _nothing(*_: object) -> None:
    return


class FakeRunner(ModelRunner):
    """Decodes one position per step, from the left, without a model.

    Position i of a canvas gets token `100 + i`, and the prompt's length more: an answer tells whose
    it is. `on_start` is called with the parameters of each new request, `on_launch` with the
    canvas lengths of each step, `on_wait` with nothing; what they raise, the runner raises.
    """

    def __init__(self, *, overlap_rows: int = 0, step_timeout: float = 0.0) -> None:
        self.token_budget, self.overlap_rows, self.step_timeout = 2048, overlap_rows, step_timeout
        self.plan = MemoryPlan("fake", 0, 0, 0, 0, 0, 0, 0, page=1, num_pages=64, page_size=32)
        self.on_start: Callable[[SamplingParams], None] = _nothing
        self.on_launch: Callable[[list[int]], None] = _nothing
        self.on_wait: Callable[[], None] = _nothing
        self._canvases: dict[int, tuple[Canvas, int, int]] = {}

    def start(
        self,
        slot: int,
        prompt: Prompt,
        params: SamplingParams,
        _pages: list[int],
        _num_cached: int = 0,
        _form: object = None,
    ) -> tuple[int, bool]:
        """Set up a canvas of masks."""
        self.on_start(params)
        canvas = Canvas.empty(params.gen_length, MASK)
        self._canvases[slot] = canvas, 100 + len(prompt.ids), len(prompt.ids)
        return len(prompt.ids) + params.gen_length, True

    def launch(self, slots: list[int]) -> list[int]:
        """Remember the slots."""
        self.on_launch([len(self._canvases[slot][0].tokens) for slot in slots])
        return slots

    def finish(self, step: Any) -> StepResult:
        """Decode one position of each canvas."""
        ready, rows = [], []
        for slot in step:
            canvas, first, given = self._canvases[slot]
            column = int((canvas.confidence < 0).argmax())
            canvas.tokens[column], canvas.confidence[column] = first + column, 0.5
            ready.append(column + 1)
            rows.append(given + len(canvas.tokens))
        complete = [n == len(self._canvases[s][0].tokens) for n, s in zip(ready, step, strict=True)]
        no, yes = [False] * len(step), [True] * len(step)
        none = [0] * len(step)
        return StepResult(step, complete, ready, no, rows, yes, no, none, none)

    def canvas(self, slot: int) -> Canvas:
        """A copy."""
        return Canvas(*map(np.copy, self._canvases[slot][0][:3]))

    def bind_thread(self) -> None:
        """Every thread can run steps."""

    def wait(self) -> None:
        """Call `on_wait`."""
        self.on_wait()
