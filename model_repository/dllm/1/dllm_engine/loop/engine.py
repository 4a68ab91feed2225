"""The engine: requests in, canvas updates out, one denoising step for many requests at a time."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import itertools
import logging
import time
import traceback
from collections.abc import Callable, Collection, Iterator
from typing import NamedTuple

import torch

from dllm_engine.config import EngineConfig
from dllm_engine.errors import EngineDead, QueueTimeout, RequestFailed
from dllm_engine.execution.runner import Launched, Runner
from dllm_engine.loop.scheduler import Scheduler
from dllm_engine.loop.validation import RequestLimits, longest_sequence
from dllm_engine.memory import PageAllocator
from dllm_engine.memory.plan import MemoryPlan
from dllm_engine.models import read_spec
from dllm_engine.request import CanvasUpdate, FinishReason, Prompt, Request, Usage
from dllm_engine.sampling_params import SamplingParams
from dllm_engine.state.canvas import Canvas, StepResult
from dllm_engine.tokenizer import Tokenizer, find_stop

logger = logging.getLogger("dllm_engine")

#: How often requests that wait are looked at: has one waited for too long, is an update due.
WAITING_LOOK_SECONDS = 0.1
#: Steps that are launched and have not ended, at most.
MAX_UNDER_WAY = 2


@dataclasses.dataclass
class EngineStats:
    """Totals since the start."""

    steps: int = 0
    #: Sequences pushed through the model.
    forward_passes: int = 0
    #: Rows pushed through the model.
    batched_tokens: int = 0
    #: Steps of single requests in which their whole sequence went through the model.
    refreshes: int = 0
    #: Tokens of finished answers.
    completion_tokens: int = 0
    requests_admitted: int = 0
    requests_finished: int = 0
    requests_cancelled: int = 0
    requests_failed: int = 0
    #: Seconds that admitted requests had waited for a place, all together.
    queue_seconds: float = 0.0
    #: Seconds spent in steps.
    step_seconds: float = 0.0


class _Step(NamedTuple):
    """A step that is under way."""

    by_slot: dict[int, Request]
    launched: Launched
    began: float


class Engine:
    """One model and the requests running on it. Not thread-safe: see `EngineWorker`.

    Raises:
        CheckpointError: the checkpoint cannot be served.
        InvalidConfig: a setting does not fit the checkpoint or the machine.
    """

    def __init__(self, config: EngineConfig) -> None:
        spec = read_spec(config.model_path)
        self.codec = Tokenizer.load(config.model_path, spec.mask_token_id)
        stop_ids = {*spec.eos_token_ids, *(self.codec.stop_token_ids if self.codec else ())}
        #: Tokens that end an answer: end of text, and of a turn.
        self.stop_token_ids = tuple(sorted(stop_ids))
        self.config = config
        spec = dataclasses.replace(spec, max_model_len=longest_sequence(config, spec))
        self.spec = spec = spec.split(config.tensor_parallel_size)
        self.stats = EngineStats()
        self._runner = Runner(config, spec, self.stop_token_ids)
        #: Rows that one step may push through the model.
        self.token_budget = self._runner.token_budget
        #: Seconds after which a step that has not ended is to be given up; 0: never.
        self.step_timeout = self._runner.step_timeout
        self.allocator = PageAllocator(self._runner.plan.num_pages, config.kv_page_size)
        self._limits = RequestLimits(config, spec, self.allocator, has_text=self.codec is not None)
        self.scheduler = Scheduler(
            config.max_num_seqs,
            self.token_budget,
            self.allocator,
            overlap_rows=self._runner.overlap_rows,
        )
        self._requests: dict[int, Request] = {}
        self._ids = itertools.count()
        self._next_look = 0.0
        #: Updates that nobody has been given yet; a step that meets an error leaves some.
        self._ready: list[CanvasUpdate] = []
        #: Steps that are launched and have not ended, oldest first; and when the last one ended.
        self._under_way: collections.deque[_Step] = collections.deque()
        self._lost = self._under_way
        self._last_end = 0.0

    @property
    def has_work(self) -> bool:
        """Whether any request is unfinished, or has an update that nobody was given."""
        return bool(self._requests or self._ready)

    def bind_thread(self) -> None:
        """Prepare the calling thread for steps; the one that made the engine is prepared."""
        self._runner.bind_thread()

    def check(self) -> None:
        """Raise EngineDead if a rank of the model has failed since the last step."""
        self._runner.check()

    def on_failure(self, listener: Callable[[], None]) -> None:
        """Call `listener`, on any thread, when `check` begins to raise."""
        self._runner.on_failure(listener)

    def close(self) -> None:
        """End the processes of other ranks; needed with tensor parallelism only."""
        self._runner.close()

    @property
    def num_running(self) -> int:
        """Requests that take steps."""
        return self.scheduler.num_running

    @property
    def num_waiting(self) -> int:
        """Requests that wait for a place."""
        return self.scheduler.num_waiting

    @property
    def num_used_pages(self) -> int:
        """Pages of keys and values that running requests hold."""
        return self.allocator.num_pages - self.allocator.num_free

    @property
    def memory_plan(self) -> MemoryPlan:
        """How memory was shared out at start."""
        return self._runner.plan

    def make_request(
        self,
        prompt: Prompt,
        params: SamplingParams,
        *,
        stream_interval: float | None = None,
        priority: int = 0,
        exclusive: bool = False,
        timeout: float | None = None,
        name: str = "",
    ) -> Request:
        """Check a request against this model's limits; it is not queued yet. Thread-safe.

        Args:
            prompt: the tokens that are given.
            params: how to denoise.
            stream_interval: seconds between updates, while it waits too; 0: one per step; None:
                only the final one.
            priority: 0 goes first, larger ones later.
            exclusive: run it while nothing else runs.
            timeout: seconds that it may wait for a place, after which it fails with QueueTimeout.
            name: what its caller calls it, for the log.

        Raises:
            InvalidRequest: names the field and the limit.
        """
        resolved = self._limits.check(prompt, params)
        request = Request(
            next(self._ids), prompt, resolved, stream_interval, priority, exclusive, timeout, name
        )
        request.num_pages = self._limits.check_pages(
            resolved, request.length, copies=request.forwards_per_step
        )
        return request

    def room(self, request: Request) -> int:
        """By how many tokens its prompt might be longer. Thread-safe."""
        return self._limits.room(request.params, request.length, copies=request.forwards_per_step)

    def add(self, request: Request) -> None:
        """Queue a request from `make_request`."""
        request.queued_at = request.last_update = time.monotonic()
        self._requests[request.request_id] = request
        self.scheduler.add(request)

    def cancel(self, request_id: int) -> CanvasUpdate | None:
        """End a request now; None if it has finished already."""
        request = self._requests.get(request_id)
        if request is not None and request.under_way:  # its place may not be another's before
            self._end_steps()
            request = self._requests.get(request_id)
        if request is None:
            return None
        self.stats.requests_cancelled += 1
        return self._finish(request, FinishReason.CANCELLED)

    def abandon(self, error: Exception) -> list[CanvasUpdate]:
        """Fail every unfinished request with `error`; touches no device.

        Returns:
            Their final updates, and those that were ready when the error was met.
        """
        # Not given up: to free what a lost device may still write to ends the process.
        self._lost, self._under_way = self._under_way, collections.deque()
        self.stats.requests_failed += len(self._requests)
        failed = [self._finish(r, None, error) for r in list(self._requests.values())]
        return self._take_ready() + failed

    def turn_away(self, error: Exception) -> list[CanvasUpdate]:
        """Fail the requests that find no place now; their final updates."""
        self._admit()
        waiting = self.scheduler.waiting
        self.stats.requests_failed += len(waiting)
        return self._take_ready() + [self._finish(request, None, error) for request in waiting]

    def step(self) -> list[CanvasUpdate]:
        """End a denoising step of as many requests as the budget allows, or two, in turns.

        Returns:
            Updates of the requests that finished, failed, or are due for one, waiting ones too.

        Raises:
            EngineDead: the device is lost; no request can go on.
        """
        self._admit()
        self._ready += self._look_at_waiting()
        for _ in range(MAX_UNDER_WAY - len(self._under_way)):
            if chosen := self.scheduler.schedule():
                self._launch(chosen)
        if self._under_way:
            # While a GPU is at work, whoever joins a later step is laid out.
            self._admit()
            self._end_step()
        return self._take_ready()

    def _take_ready(self) -> list[CanvasUpdate]:
        ready, self._ready = self._ready, []
        return ready

    def _look_at_waiting(self) -> list[CanvasUpdate]:
        now = time.monotonic()
        if now < self._next_look:
            return []
        self._next_look = now + WAITING_LOOK_SECONDS
        updates = []
        for request in self.scheduler.waiting:
            if request.timeout is not None and now - request.queued_at > request.timeout:
                late = QueueTimeout(f"request timeout expired: waited for {request.timeout:g} s")
                self.stats.requests_failed += 1
                updates.append(self._finish(request, None, late))
            elif request.is_due(now):
                updates.append(self._update(request))
        return updates

    def _admit(self) -> None:
        """Give places to those that wait, and lay them out; one that cannot be fails alone."""
        now = time.monotonic()
        for request in self.scheduler.admit():
            assert request.slot is not None
            try:
                with _device_errors():
                    self._runner.start(request.slot, request.prompt, request.params, request.pages)
            except (RuntimeError, ValueError, MemoryError) as error:
                # Its place is given back first: what stands there is no canvas of its own.
                self.scheduler.requeue(request)
                self._ready.append(self._fail(request, error))
                continue
            self.stats.requests_admitted += 1
            self.stats.queue_seconds += now - request.queued_at

    def _launch(self, chosen: list[Request]) -> None:
        by_slot = {r.slot: r for r in chosen if r.slot is not None}
        began = time.perf_counter()
        with _device_errors():
            try:
                launched = self._runner.launch(list(by_slot))
            except torch.AcceleratorError:
                raise
            except (RuntimeError, ValueError, MemoryError) as error:
                # A lost device may be met by a library first, which says so in words of its own.
                self._runner.wait()
                # What the step had in memory would be missing when each is run alone.
                traceback.clear_frames(error.__traceback__)
                self._isolate(chosen, error)
                return
        for request in chosen:
            request.under_way = True
        self._under_way.append(_Step(by_slot, launched, began))

    def _end_step(self) -> None:
        """Wait for the oldest step; what it has to tell is added to what is ready."""
        step = self._under_way.popleft()
        with _device_errors():
            result = self._runner.finish(step.launched)
        now = time.perf_counter()
        for request in step.by_slot.values():
            request.under_way = False
        self._count(step.by_slot.values(), now - max(step.began, self._last_end))
        self._last_end = now
        self._ready += self._settle_all(step.by_slot, result)

    def _end_steps(self) -> None:
        while self._under_way:
            self._end_step()

    def _isolate(self, chosen: list[Request], error: Exception) -> None:
        """A step failed and wrote nothing: find whom it concerns by running each alone."""
        if len(chosen) > 1:
            logger.warning("step failed requests=%d; running each alone: %s", len(chosen), error)
            for request in chosen:
                self._launch([request])
                self._end_steps()
        else:
            self._ready.append(self._fail(chosen[0], error))

    def _fail(self, request: Request, error: Exception) -> CanvasUpdate:
        """End a request that met an error that is no other's."""
        logger.error("request failed request_id=%s", request.name, exc_info=error)
        self.stats.requests_failed += 1
        return self._finish(request, None, RequestFailed(f"{type(error).__name__}: {error}"))

    def _count(self, chosen: Collection[Request], seconds: float) -> None:
        self.stats.steps += 1
        self.stats.step_seconds += seconds
        for request in chosen:
            request.steps_run += 1
            request.rows_run += request.step_cost
            self.stats.forward_passes += request.forwards_per_step
            self.stats.batched_tokens += request.step_cost
            self.stats.refreshes += request.next_refresh

    def _settle_all(self, by_slot: dict[int, Request], result: StepResult) -> list[CanvasUpdate]:
        """The updates of a step; ends the requests that are to end."""
        now = time.monotonic()
        updates = []
        for i, slot in enumerate(result.slots):
            request = by_slot[slot]
            request.next_rows, request.next_refresh = result.next_rows[i], result.next_refresh[i]
            before, request.num_ready = request.num_ready, result.num_ready[i]
            stop = self._stop_in(request, before) if request.num_ready > before else None
            if stop is not None:
                request.num_ready = stop
                updates.append(self._finish(request, FinishReason.STOP))
            elif result.ended[i]:
                request.ended_by_token = True
                updates.append(self._finish(request, FinishReason.STOP))
            elif result.complete[i]:
                updates.append(self._finish(request, FinishReason.LENGTH))
            elif request.is_due(now):
                updates.append(self._update(request))
        return updates

    def _stop_in(self, request: Request, before: int) -> int | None:
        """Tokens up to the one that completes a stop string; those up to `before` held none."""
        if not request.params.stop:
            return None
        assert self.codec is not None
        assert request.slot is not None
        ready = self._runner.table.canvas(request.slot).tokens[: request.num_ready]
        if find_stop(self.codec.decode(ready), request.params.stop) is None:
            return None
        for count in range(before + 1, request.num_ready):
            if find_stop(self.codec.decode(ready[:count]), request.params.stop) is not None:
                return count
        return request.num_ready

    def _finish(
        self, request: Request, reason: FinishReason | None, error: Exception | None = None
    ) -> CanvasUpdate:
        update = self._update(request, reason, error)
        del self._requests[request.request_id]
        self.scheduler.remove(request)
        self.stats.requests_finished += reason in (FinishReason.STOP, FinishReason.LENGTH)
        self.stats.completion_tokens += update.usage.completion_tokens
        return update

    def _update(
        self,
        request: Request,
        reason: FinishReason | None = None,
        error: Exception | None = None,
    ) -> CanvasUpdate:
        if request.slot is None:
            canvas = Canvas.empty(request.params.gen_length, self.spec.mask_token_id)
        else:
            canvas = self._runner.table.canvas(request.slot)
        usage = Usage(
            prompt_tokens=request.prompt.num_tokens,
            completion_tokens=request.num_ready + request.ended_by_token,
            steps=request.steps_run,
            forward_passes=request.steps_run * request.forwards_per_step,
        )
        assert request.params.seed is not None
        return CanvasUpdate(
            request.request_id,
            canvas.tokens,
            canvas.confidence,
            request.num_ready,
            usage,
            request.params.seed,
            reason,
            error,
        )


@contextlib.contextmanager
def _device_errors() -> Iterator[None]:
    """An error of the device ends the engine."""
    try:
        yield
    except torch.AcceleratorError as error:
        raise EngineDead(f"device error: {error}") from error
