"""A discrete-event simulator of the engine: the real scheduler, with a cost model as its model.

It covers loads that no machine at hand can run: thousands of requests, other budgets, other
devices. A step costs `base + per_row · rows` seconds; `CostModel.fit` reads both from real steps.
"""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Iterable, Sequence

import numpy as np
from dllm_engine.loop.scheduler import Scheduler
from dllm_engine.memory.kv_cache import PageAllocator
from dllm_engine.request import Prompt, Request
from dllm_engine.sampling_params import SamplingParams


@dataclasses.dataclass(frozen=True)
class CostModel:
    """Seconds of a step, from its number of rows."""

    base: float
    per_row: float
    #: Rows included in the base: a GPU reads the weights for one row or a few hundred alike.
    free_rows: int = 0

    def seconds(self, rows: int) -> float:
        """Seconds of one step."""
        return self.base + self.per_row * max(0, rows - self.free_rows)

    def sustainable_step(self, rows_per_second: float) -> float:
        """Seconds of the mean step that just keeps up with this many rows per second.

        Shorter steps process fewer rows per second, since each pays the base. So a request of n
        steps takes at least n times this while such a load lasts. Infinite if no step keeps up.
        """
        left = 1 - self.per_row * rows_per_second
        if left <= 0:
            return float("inf")
        return max(self.base, (self.base - self.per_row * self.free_rows) / left)

    @classmethod
    def fit(cls, steps: Sequence[tuple[int, float]]) -> CostModel:
        """Fit by least squares over (rows, seconds) of real steps.

        The slowest tenth is left out: on a shared machine other programs cause it.
        """
        per_row = [seconds / max(1, rows) for rows, seconds in steps]
        limit = np.quantile(per_row, 0.9)
        kept = [step for step, cost in zip(steps, per_row, strict=True) if cost <= limit]
        rows = np.array([r for r, _ in kept], dtype=float)
        seconds = np.array([s for _, s in kept])
        slope, base = np.polyfit(rows, seconds, 1)
        return cls(max(0.0, float(base)), max(1e-9, float(slope)))


@dataclasses.dataclass(frozen=True)
class Arrival:
    """A request and its time of arrival; it takes one step per token."""

    seconds: float
    prompt_length: int
    gen_length: int
    block_length: int = 32
    #: A cache policy; `block`: the model is block-wise, and `block_length` at most `gen_length`.
    cache: str = "dual"
    #: Rows of a prompt that a step of a block-wise model computes.
    chunk: int = 512

    def params(self) -> SamplingParams:
        """The request's parameters."""
        return SamplingParams(
            gen_length=self.gen_length,
            block_length=min(self.block_length, self.gen_length),
            steps=self.gen_length,
            cache=self.cache,
            ignore_eos=True,
        )


class SimulatedRequest:
    """One request's phases, as the engine would report them."""

    def __init__(self, number: int, arrival: Arrival) -> None:
        self.arrival = arrival
        prompt = Prompt([0] * arrival.prompt_length)
        params = dataclasses.replace(arrival.params(), delay_steps=0, refresh_interval=0)
        self.request = Request(number, prompt, params)
        self._step = 0
        #: Of a block-wise model: positions whose keys and values are final, and decided ones.
        self._final, self._decided = 0, arrival.prompt_length
        if arrival.cache == "block":
            self._plan_block_step()
        #: The engine's step count when it last ran or was admitted.
        self.seen = 0

    def take_step(self) -> bool:
        """Account for one step; returns whether the request is finished."""
        request, arrival = self.request, self.arrival
        request.rows_run += request.step_cost
        request.steps_run += 1
        if arrival.cache == "block":
            return self._take_block_step()
        self._step += 1
        block = min(arrival.block_length, arrival.gen_length)
        age = self._step % block
        begin = arrival.prompt_length + self._step - age
        width = min(block, request.length - begin)
        request.next_is_refresh = arrival.cache == "none" or age == 0
        reuse = {
            "none": request.length,
            "prefix": request.length - begin,
            "dual": width,
            "sparse": width,
            # The masked positions, and the one committed last.
            "delayed": min(width, width - age + 1),
        }[arrival.cache]
        request.next_rows = request.length if request.next_is_refresh else reuse
        return self._step == arrival.gen_length

    def _take_block_step(self) -> bool:
        """A step that reads a chunk of the prompt, or decides one position of the block."""
        size, rows = self.arrival.block_length, self.request.next_rows
        assert rows is not None
        start, end = self._decided // size * size, self._final + rows
        self._decided += end > start
        self._final = min(end, start)
        self._plan_block_step()
        return self._decided == self.arrival.prompt_length + self.arrival.gen_length

    def _plan_block_step(self) -> None:
        """Rows up to the end of the active block, or of a chunk (`state.scope.BlockScope`)."""
        size = self.arrival.block_length
        chunk = max(self.arrival.chunk // size, 1) * size
        start = self._decided // size * size
        end = start + size
        if end - self._final > chunk:
            end = min((self._final // chunk + 1) * chunk, start)
        self.request.next_rows, self.request.next_is_refresh = end - self._final, False


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Results of a load."""

    #: Latency of each request in seconds, in the order of arrival.
    latencies: list[float]
    #: Rows of each step.
    rows: list[int]
    #: Most steps in a row for which a running request was skipped.
    longest_idle: int


def simulate(
    scheduler: Scheduler,
    arrivals: Iterable[Arrival],
    cost: CostModel,
    *,
    run_to_completion: int | None = None,
    padded: bool = False,
) -> Outcome:
    """Run `scheduler` over `arrivals`.

    Args:
        run_to_completion: start up to this many requests when nothing runs, and no others before
            all of them are done; None: requests join at every step.
        padded: all requests of such a batch get its longest canvas, as in a static batch.
    """
    waiting = [(a.seconds, i, a) for i, a in enumerate(arrivals)]
    heapq.heapify(waiting)
    arrived: list[tuple[float, int, Arrival]] = []
    running: dict[int, SimulatedRequest] = {}
    latencies = [0.0] * len(waiting)
    rows: list[int] = []
    longest_idle = 0
    now = 0.0
    while waiting or arrived or running:
        while waiting and waiting[0][0] <= now:
            arrived.append(heapq.heappop(waiting))
        if run_to_completion is None or not running:
            batch = arrived[:run_to_completion]
            del arrived[:run_to_completion]
            longest = max((a.gen_length for _, _, a in batch), default=0) if padded else 0
            for _, number, arrival in batch:
                length = max(longest, arrival.gen_length)
                one = SimulatedRequest(number, dataclasses.replace(arrival, gen_length=length))
                scheduler.add(one.request)
                running[number] = one
        for request in scheduler.admit():
            running[request.request_id].seen = len(rows)
        chosen = scheduler.schedule()
        if not chosen:
            now = waiting[0][0]
            continue
        rows.append(sum(request.step_cost for request in chosen))
        now += cost.seconds(rows[-1])
        for request in chosen:
            one = running[request.request_id]
            longest_idle = max(longest_idle, len(rows) - 1 - one.seen)
            one.seen = len(rows)
            if one.take_step():
                scheduler.remove(request)
                del running[request.request_id]
                latencies[request.request_id] = now - one.arrival.seconds
    return Outcome(latencies, rows, longest_idle)


class FcfsScheduler(Scheduler):
    """First come, first served: the oldest requests that fit the budget, whatever their phase.

    A baseline for the phase-multiplexed scheduler: it does not spread Refreshes, and requests
    keep their order of arrival (the original dLLM-Serve's policy).
    """

    def schedule(self) -> list[Request]:
        """Requests in order of arrival, up to the first that does not fit."""
        if any(request.in_flight for request in self._running):
            return []
        chosen: list[Request] = []
        used = 0
        for request in sorted(self._running, key=lambda r: r.request_id):
            if chosen and used + request.step_cost > self._token_budget:
                break
            chosen.append(request)
            used += request.step_cost
        return chosen


def without_pages() -> PageAllocator:
    """An allocator without pages, for simulations that ignore memory."""
    return PageAllocator(0, 1)
