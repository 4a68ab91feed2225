"""Runs requests: takes them in, steps them together, returns updates of their canvases."""

from __future__ import annotations

import bisect
import collections
import contextlib
import dataclasses
import functools
import itertools
import logging
import time
import traceback
from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

import torch

from dllm_engine.config import EngineConfig
from dllm_engine.errors import EngineDead, QueueTimeout, RequestFailed
from dllm_engine.execution.runner import ModelRunner
from dllm_engine.execution.tensor_parallel import load_runner
from dllm_engine.loop.histograms import Histograms
from dllm_engine.loop.scheduler import Scheduler
from dllm_engine.loop.validation import RequestLimits, check_cache, longest_sequence
from dllm_engine.memory.kv_cache import PageAllocator
from dllm_engine.memory.prefix_cache import PrefixCache, prefix_chain
from dllm_engine.models.loader import read_spec
from dllm_engine.request import CanvasUpdate, FinishReason, Prompt, Request, Usage
from dllm_engine.sampling_params import SamplingParams
from dllm_engine.state.canvas import Canvas, StepResult
from dllm_engine.structured.compiler import Compiler
from dllm_engine.tokenizer import Tokenizer, find_stop

logger = logging.getLogger("dllm_engine")

#: How often the engine checks waiting requests for expired timeouts and updates that are due.
WAITING_CHECK_SECONDS = 0.1
#: What a request is told whose logits hold NaN or infinity.
NOT_FINITE = (
    "the model's logits are not finite; a smaller cfg_scale, or DLLM_DTYPE float32, may help"
)
#: Most steps in flight.
MAX_INFLIGHT_STEPS = 2


@dataclasses.dataclass
class EngineStats:
    """Totals since the start."""

    steps: int = 0
    #: Sequences pushed through the model.
    forward_passes: int = 0
    #: Rows pushed through the model.
    batched_tokens: int = 0
    #: Refreshes, counted per request and step.
    refreshes: int = 0
    #: Tokens of finished answers.
    completion_tokens: int = 0
    requests_admitted: int = 0
    requests_finished: int = 0
    requests_cancelled: int = 0
    requests_failed: int = 0
    #: Tokens of admitted prompts that were looked up in the prefix cache, and found.
    prefix_cache_queries: int = 0
    prefix_cache_hits: int = 0
    #: Requests whose pages were given to older ones.
    preemptions: int = 0
    #: Seconds that admitted requests had waited for a slot, in total.
    queue_seconds: float = 0.0
    #: Seconds spent in steps.
    step_seconds: float = 0.0


class _Step(NamedTuple):
    """A step in flight."""

    by_slot: dict[int, Request]
    inflight: Any
    began: float


class Engine:
    """One model and the requests running on it. Not thread-safe: see `EngineThread`.

    Args:
        config: the settings.
        runner: runs the steps; None: the checkpoint's model is loaded.

    Raises:
        CheckpointError: the checkpoint cannot be served.
        InvalidConfig: a setting does not fit the checkpoint or the machine.
    """

    def __init__(self, config: EngineConfig, runner: ModelRunner | None = None) -> None:
        spec = read_spec(config.model_path)
        check_cache(config, spec)
        longest = longest_sequence(config, spec)
        self.tokenizer = Tokenizer.load(config.model_path, spec.mask_token_id, longest)
        stop_ids = {*spec.eos_token_ids, *(self.tokenizer.stop_token_ids if self.tokenizer else ())}
        #: Tokens that end an answer: end of text, and of a turn.
        self.stop_token_ids = tuple(sorted(stop_ids))
        self.config = config
        spec = dataclasses.replace(spec, max_model_len=longest)
        self.spec = spec = spec.split(config.tensor_parallel_size)
        self.stats = EngineStats()
        self.histograms = Histograms()
        self.runner = runner or load_runner(config, spec, self.stop_token_ids)
        self.allocator = PageAllocator(self.runner.plan.num_pages, config.kv_page_size)
        #: None: the model's keys and values are never final, or the setting is off.
        self._prefix_cache = None
        if config.prefix_cache and spec.blocks is not None:
            self._prefix_cache = PrefixCache(self.allocator)
        self._limits = RequestLimits(
            config,
            spec,
            self.allocator,
            has_text=self.tokenizer is not None,
            token_budget=self.runner.token_budget,
        )
        self.scheduler = Scheduler(
            config.max_num_seqs,
            self.runner.token_budget,
            self.allocator,
            overlap_rows=self.runner.overlap_rows,
            prefix_cache=self._prefix_cache,
        )
        self._requests: dict[int, Request] = {}
        self._ids = itertools.count()
        self._next_check = 0.0
        #: Updates not yet returned; a step that raises leaves some.
        self._ready: list[CanvasUpdate] = []
        #: Steps in flight, oldest first; and when the last one ended.
        self._inflight: collections.deque[_Step] = collections.deque()
        self._lost = self._inflight
        self._last_end = 0.0

    @property
    def has_work(self) -> bool:
        """Whether any request is unfinished, or an update is not yet returned."""
        return bool(self._requests or self._ready)

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
        cache_salt: str = "",
    ) -> Request:
        """Check a request against this model's limits, without queueing it. Thread-safe.

        Args:
            prompt: the given tokens; without any before the canvas, the start token is put there.
            params: how to denoise; not used if the prompt has `reads`.
            stream_interval: seconds between updates, also while the request waits; 0: one per
                step; None: only the final one.
            priority: 0 goes first, larger numbers later.
            exclusive: run the request while nothing else runs.
            timeout: seconds the request may wait for a slot before it fails with QueueTimeout.
            name: the caller's name for it, used in the log.
            cache_salt: requests share cached beginnings only if their salts are equal.

        Raises:
            InvalidRequest: names the field and the limit.
        """
        start = self.tokenizer.start_token_id if self.tokenizer else None
        if not prompt.ids and start is not None:
            prompt = dataclasses.replace(prompt, ids=[start])
        if prompt.reads is not None:
            params = self._limits.reading(prompt)
        resolved = self._limits.check(prompt, params)
        form = None
        if resolved.structured_outputs is not None:
            form = self._compiler.automaton(resolved.structured_outputs, resolved.gen_length)
        request = Request(
            next(self._ids),
            prompt,
            resolved,
            stream_interval=stream_interval,
            priority=priority,
            exclusive=exclusive,
            timeout=timeout,
            name=name,
            cache_salt=cache_salt,
            form=form,
        )
        request.num_pages = self._limits.check_pages(
            resolved, request.length, copies=request.forwards_per_step
        )
        if resolved.cache == "block":
            self._take_pages_by_block(request)
        return request

    def _take_pages_by_block(self, request: Request) -> None:
        """Let a request of a block-wise model begin with pages for its prompt and a block."""
        block_length, blocks = request.params.block_length, self.spec.blocks
        assert block_length is not None
        assert blocks is not None
        first = self.allocator.pages_for(len(request.prompt.ids) + block_length)
        request.num_pages, request.grows = min(request.num_pages, first), True
        if self._prefix_cache is not None:
            request.chain = prefix_chain(
                request.prompt.ids,
                blocks,
                block_length=block_length,
                page_size=self.config.kv_page_size,
                identity=[str(self.config.model_path), "", request.cache_salt],
            )

    @functools.cached_property
    def _compiler(self) -> Compiler:
        """Compiles structured outputs, on the threads that make requests."""
        ends = tuple(dict.fromkeys([*self.spec.eos_token_ids, *self.stop_token_ids]))
        vocabulary = self.tokenizer.vocabulary(ends) if self.tokenizer else None
        return Compiler(vocabulary, self.spec.vocab_size)

    def headroom(self, request: Request) -> int:
        """How many tokens longer the prompt could be. Thread-safe."""
        return self._limits.headroom(
            request.params, request.length, copies=request.forwards_per_step
        )

    def add(self, request: Request) -> None:
        """Queue a request from `make_request`."""
        request.queued_at = request.last_update = time.monotonic()
        self._requests[request.request_id] = request
        self.scheduler.add(request)

    def cancel(self, request_id: int) -> CanvasUpdate | None:
        """End a request now; None if it has finished already."""
        request = self._requests.get(request_id)
        if request is not None and request.in_flight:  # the step still uses its slot
            self._end_steps()
            request = self._requests.get(request_id)
        if request is None:
            return None
        # The step that ended may have left an update, which must not follow the last one.
        self._ready = [update for update in self._ready if update.request_id != request_id]
        self.stats.requests_cancelled += 1
        return self._finish(request, FinishReason.CANCELLED)

    def abort_all(self, error: Exception) -> list[CanvasUpdate]:
        """Fail every unfinished request with `error`, without using the device.

        Returns:
            Their final updates, after the updates that were ready before the error.
        """
        # Keeps the steps alive: freeing memory that a lost device may still write to ends the
        # process.
        self._lost, self._inflight = self._inflight, collections.deque()
        self.stats.requests_failed += len(self._requests)
        failed = [self._finish(r, None, error) for r in list(self._requests.values())]
        return self._take_ready() + failed

    def reject_waiting(self, error: Exception) -> list[CanvasUpdate]:
        """Fail the requests that get no slot now; returns their final updates."""
        self._admit()
        waiting = self.scheduler.waiting
        self.stats.requests_failed += len(waiting)
        return self._take_ready() + [self._finish(request, None, error) for request in waiting]

    def step(self) -> list[CanvasUpdate]:
        """Run a denoising step for as many requests as the token budget allows.

        With two steps in flight, this launches the newer one and ends the older one.

        Returns:
            Updates of running and waiting requests that finished, failed or are due for one.

        Raises:
            EngineDead: the device is lost; no request can go on.
        """
        self._admit()
        self._ready += self._check_waiting()
        for _ in range(MAX_INFLIGHT_STEPS - len(self._inflight)):
            if chosen := self.scheduler.schedule():
                self._launch(chosen)
        if self._inflight:
            # Sets up newcomers while a GPU is busy.
            self._admit()
            self._end_step()
        return self._take_ready()

    def _take_ready(self) -> list[CanvasUpdate]:
        ready, self._ready = self._ready, []
        return ready

    def _check_waiting(self) -> list[CanvasUpdate]:
        now = time.monotonic()
        if now < self._next_check:
            return []
        self._next_check = now + WAITING_CHECK_SECONDS
        updates = []
        for request in self.scheduler.preempted:
            if request.is_due(now):
                updates.append(self._update(request))
        for request in self.scheduler.waiting:
            if request.timeout is not None and now - request.queued_at > request.timeout:
                late = QueueTimeout(f"request timeout expired: waited for {request.timeout:g} s")
                self.stats.requests_failed += 1
                updates.append(self._finish(request, None, late))
            elif request.is_due(now):
                updates.append(self._update(request))
        return updates

    def _admit(self) -> None:
        """Give slots to waiting requests and set up their canvases; an error fails one request."""
        now = time.monotonic()
        for request in self.scheduler.admit():
            assert request.slot is not None
            try:
                with _device_errors():
                    self._start(request, request.slot)
            except (RuntimeError, ValueError, MemoryError) as error:
                self._ready.append(self._fail(request, error))
                continue
            request.num_assigned = len(request.pages)
            if request.has_canvas:
                continue
            request.has_canvas = True
            if request.chain is not None:
                self.stats.prefix_cache_queries += len(request.prompt.ids)
                self.stats.prefix_cache_hits += request.cached_tokens
            self.stats.requests_admitted += 1
            self.stats.queue_seconds += now - request.queued_at
            self.histograms.queue_time.observe(now - request.queued_at)
            request.admitted_at = now

    def _start(self, request: Request, slot: int) -> None:
        """Set up the canvas of a new request, or go on with a preempted one."""
        cached = 0 if request.chain is None else request.num_entered * request.chain.unit
        if request.has_canvas:
            rows = self.runner.resume(slot, request.pages, cached)
        else:
            rows = self.runner.start(
                slot, request.prompt, request.params, request.pages, cached, request.form
            )
        request.next_rows, request.next_is_refresh = rows

    def _launch(self, chosen: list[Request]) -> None:
        by_slot = {r.slot: r for r in chosen if r.slot is not None}
        for slot, request in by_slot.items():
            if request.num_assigned < len(request.pages):
                self.runner.assign(slot, request.pages)
                request.num_assigned = len(request.pages)
        began = time.perf_counter()
        with _device_errors():
            try:
                inflight = self.runner.launch(list(by_slot))
            except torch.AcceleratorError:
                raise
            except (RuntimeError, ValueError, MemoryError) as error:
                # A library may report a lost device first, in its own words; `wait` raises then.
                self.runner.wait()
                # Frees the failed step's memory for the retries.
                traceback.clear_frames(error.__traceback__)
                self._retry_individually(chosen, error)
                return
        for request in chosen:
            request.in_flight = True
        self._inflight.append(_Step(by_slot, inflight, began))

    def _end_step(self) -> None:
        """Wait for the oldest step in flight and collect its updates."""
        step = self._inflight.popleft()
        with _device_errors():
            result = self.runner.finish(step.inflight)
        now = time.perf_counter()
        for request in step.by_slot.values():
            request.in_flight = False
        self._count(step.by_slot.values(), now - max(step.began, self._last_end))
        self._last_end = now
        self._ready += self._process_outputs(step.by_slot, result)

    def _end_steps(self) -> None:
        while self._inflight:
            self._end_step()

    def _retry_individually(self, chosen: list[Request], error: Exception) -> None:
        """After a failed step, run each of its requests alone to find the ones that fail."""
        if len(chosen) > 1:
            logger.warning("step failed requests=%d; retrying each alone: %s", len(chosen), error)
            for request in chosen:
                self._launch([request])
                self._end_steps()
        else:
            self._ready.append(self._fail(chosen[0], error))

    def _fail(self, request: Request, error: Exception) -> CanvasUpdate:
        """Fail a request with an error of its own."""
        logger.error("request failed request_id=%s", request.name, exc_info=error)
        self.stats.requests_failed += 1
        return self._finish(request, None, RequestFailed(f"{type(error).__name__}: {error}"))

    def _count(self, chosen: Collection[Request], seconds: float) -> None:
        self.stats.steps += 1
        self.stats.preemptions = self.scheduler.num_preemptions
        self.stats.step_seconds += seconds
        self.histograms.step_time.observe(seconds)
        self.histograms.step_requests.observe(len(chosen))
        for request in chosen:
            request.steps_run += 1
            request.rows_run += request.step_cost
            self.stats.forward_passes += request.forwards_per_step
            self.stats.batched_tokens += request.step_cost
            self.stats.refreshes += request.next_is_refresh

    def _process_outputs(
        self, by_slot: dict[int, Request], result: StepResult
    ) -> list[CanvasUpdate]:
        """Finish the requests that a step completed; returns the updates that are due."""
        now = time.monotonic()
        updates = []
        for i, slot in enumerate(result.slots):
            request = by_slot[slot]
            request.next_rows, request.next_is_refresh = (
                result.next_rows[i],
                result.next_is_refresh[i],
            )
            if result.not_finite[i]:
                # Its keys and values may be the cause: the next request must not inherit them.
                if self._prefix_cache is not None and request.chain is not None:
                    self._prefix_cache.forget(request.chain)
                updates.append(self._fail(request, FloatingPointError(NOT_FINITE)))
                continue
            if slot in result.read:
                self._enter_prefix(request, result.final[i])
                update = self._finish(request, FinishReason.READ)
                updates.append(dataclasses.replace(update, read=result.read[slot]))
                continue
            if request.grows:
                needed = self.allocator.pages_for(result.next_end[i])
                request.num_pages = max(request.num_pages, needed)
            before, request.num_ready = request.num_ready, result.num_ready[i]
            if request.num_ready and not before:
                self.histograms.time_to_first_token.observe(now - request.queued_at)
            stop = self._stop_in(request, before) if request.num_ready > before else None
            if stop is not None:
                request.num_ready = stop
            self._enter_prefix(request, result.final[i])
            if stop is not None:
                updates.append(self._finish(request, FinishReason.STOP))
            elif result.ended[i]:
                request.ended_by_token = True
                updates.append(self._finish(request, FinishReason.STOP))
            elif result.complete[i]:
                # A text with a form is complete, whether or not an end token found room.
                whole = FinishReason.LENGTH if request.form is None else FinishReason.STOP
                updates.append(self._finish(request, whole))
            elif request.is_due(now):
                updates.append(self._update(request))
        return updates

    def _enter_prefix(self, request: Request, final: int) -> None:
        """Offer to other requests what has become final, up to a stop string."""
        chain = request.chain
        if chain is None or self._prefix_cache is None:
            return
        count = min(final, len(request.prompt.ids) + request.num_ready)
        units = range(request.num_entered, count // chain.unit)
        if not units:
            return
        assert request.slot is not None
        if units.stop > len(chain.keys):
            chain.extend(self.runner.tokens(request.slot, count))
        if self._prefix_cache.enter(chain, units, request.pages):
            self.runner.assign(request.slot, request.pages)
        request.num_entered = units.stop

    def _stop_in(self, request: Request, before: int) -> int | None:
        """How many tokens the first stop string ends after; the first `before` hold none."""
        if not request.params.stop:
            return None
        assert self.tokenizer is not None
        assert request.slot is not None
        ready = self.runner.canvas(request.slot).tokens[: request.num_ready]
        decode, stop = self.tokenizer.decode, request.params.stop
        if find_stop(decode(ready), stop) is None:
            return None
        # Bisected: decoding every prefix of a long canvas would hold up all other requests.
        counts = range(before + 1, request.num_ready)
        place = bisect.bisect_left(
            counts, True, key=lambda count: find_stop(decode(ready[:count]), stop) is not None
        )
        return before + 1 + place

    def _finish(
        self, request: Request, reason: FinishReason | None, error: Exception | None = None
    ) -> CanvasUpdate:
        update = self._update(request, reason, error)
        del self._requests[request.request_id]
        self.scheduler.remove(request)
        if reason is FinishReason.READ:
            self.stats.requests_finished += 1
        if reason in (FinishReason.STOP, FinishReason.LENGTH):
            self.stats.requests_finished += 1
            self._observe_answer(request, update.usage.completion_tokens)
        self.stats.completion_tokens += update.usage.completion_tokens
        return update

    def _observe_answer(self, request: Request, tokens: int) -> None:
        now = time.monotonic()
        self.histograms.e2e_latency.observe(now - request.queued_at)
        if tokens:
            seconds = now - request.admitted_at
            self.histograms.time_per_output_token.observe(seconds / tokens)

    def _update(
        self,
        request: Request,
        reason: FinishReason | None = None,
        error: Exception | None = None,
    ) -> CanvasUpdate:
        if request.slot is not None and request.has_canvas:
            canvas = self.runner.canvas(request.slot)
        else:
            canvas = Canvas.empty(request.params.gen_length, self.spec.mask_token_id)
        usage = Usage(
            prompt_tokens=request.prompt.num_tokens,
            completion_tokens=request.num_ready + request.ended_by_token,
            steps=request.steps_run,
            forward_passes=request.steps_run * request.forwards_per_step,
            cached_tokens=request.cached_tokens,
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
            canvas.reveal_steps,
            canvas.log_probs,
        )


@contextlib.contextmanager
def _device_errors() -> Iterator[None]:
    """Turn an error of the device into EngineDead."""
    try:
        yield
    except torch.AcceleratorError as error:
        raise EngineDead(f"device error: {error}") from error
