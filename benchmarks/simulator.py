"""A discrete-event simulator of the engine: the real scheduler, a cost model instead of a model.

It answers what no machine at hand can hold: thousands of requests, other budgets, other devices.
A step costs `base + per_row · rows` seconds; `CostModel.fit` reads both from real steps.
"""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Iterable, Sequence

import numpy as np
from dllm_engine.loop.scheduler import Scheduler
from dllm_engine.memory import PageAllocator
from dllm_engine.request import Prompt, Request
from dllm_engine.sampling_params import SamplingParams


@dataclasses.dataclass(frozen=True)
class CostModel:
    """Seconds of a step with a given number of rows."""

    base: float
    per_row: float
    #: Rows that come with the base: a GPU reads the weights for one row as for a few hundred.
    free_rows: int = 0

    def seconds(self, rows: int) -> float:
        """One step."""
        return self.base + self.per_row * max(0, rows - self.free_rows)

    def sustainable_step(self, rows_per_second: float) -> float:
        """Seconds of the mean step at which that many rows are just kept up with.

        Shorter steps have fewer rows, and fewer of them per second, since each pays the base. So a
        request that takes n steps takes n times this at least while such a load lasts. Infinite
        where no step keeps up.
        """
        left = 1 - self.per_row * rows_per_second
        if left <= 0:
            return float("inf")
        return max(self.base, (self.base - self.per_row * self.free_rows) / left)

    @classmethod
    def fit(cls, steps: Sequence[tuple[int, float]]) -> CostModel:
        """Least squares over (rows, seconds) of real steps, in which late ones weigh less.

        The slowest tenth is left out: on a shared machine those are other people's doing.
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
    """A request that comes at a time; it takes one step per token."""

    seconds: float
    prompt_length: int
    gen_length: int
    block_length: int = 32
    cache: str = "dual"

    def params(self) -> SamplingParams:
        """What it asks of the engine."""
        return SamplingParams(
            gen_length=self.gen_length,
            block_length=min(self.block_length, self.gen_length),
            steps=self.gen_length,
            cache=self.cache,
            ignore_eos=True,
        )


class SimulatedRequest:
    """One request's way through its phases, as the engine would report them."""

    def __init__(self, number: int, arrival: Arrival) -> None:
        self.arrival = arrival
        prompt = Prompt([0] * arrival.prompt_length)
        params = dataclasses.replace(arrival.params(), delay_steps=0, refresh_interval=0)
        self.request = Request(number, prompt, params)
        self._step = 0
        #: Steps of the engine when it ran last, or was admitted.
        self.seen = 0

    def take_step(self) -> bool:
        """Account for one step; whether the request is finished."""
        request, arrival = self.request, self.arrival
        request.rows_run += request.step_cost
        request.steps_run += 1
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
            # Masked ones, and the one that was committed last.
            "delayed": min(width, width - age + 1),
        }[arrival.cache]
        request.next_rows = request.length if request.next_is_refresh else reuse
        return self._step == arrival.gen_length


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a load."""

    #: Of each request, in seconds, in the order of the arrivals.
    latencies: list[float]
    #: Of each step.
    rows: list[int]
    #: Most steps in a row that a running request was left out of.
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
        run_to_completion: instead of letting requests join at every step, take up to this many
            when nothing runs, and nobody else before all of them are done.
        padded: these then all have the longest canvas among them, as a static batch has.
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

    What the phase-multiplexed scheduler is measured against: nothing spreads Refreshes, and
    requests keep the order of their arrival (the original dLLM-Serve's policy).
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
    """For simulations in which memory is no matter."""
    return PageAllocator(0, 1)
