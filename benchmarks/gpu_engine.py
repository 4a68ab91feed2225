"""Measures the engine end to end on models of real shape with random weights; see `gpu`.

Random weights are never sure of a token: a threshold of 0.9 commits one per step, so it shows the
cost of the rule, not its gain. Fewer steps, which commit several tokens each, stand in for parallel
decoding.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from dllm_engine import Engine, Prompt, SamplingParams
from dllm_engine.memory.plan import PeakMeter
from dllm_engine.request import Request

from benchmarks.throughput import POLICIES


@dataclasses.dataclass(frozen=True)
class Point:
    """One load on the engine."""

    policy: str = "dual"
    #: Concurrent requests.
    requests: int = 32
    prompt_length: int = 128
    gen_length: int = 128
    block_length: int = 32
    #: Tokens that the schedule commits per step: 1, or more to stand in for parallel decoding.
    tokens_per_step: int = 1
    confidence_threshold: float | None = None

    def params(self) -> SamplingParams:
        """Parameters of each request."""
        return SamplingParams(
            gen_length=self.gen_length,
            block_length=self.block_length,
            steps=self.gen_length // self.tokens_per_step,
            confidence_threshold=self.confidence_threshold,
            ignore_eos=True,
            **POLICIES[self.policy],
        )


def important_points() -> list[Point]:
    """Points to measure in any case, the most important first."""
    points = [Point(requests=n) for n in (32, 1, 8, 64, 128)]
    points += [Point(policy) for policy in ("delayed", "sparse", "prefix", "none")]
    points += [Point(requests=n, tokens_per_step=4) for n in (32, 1, 128)]
    return [*points, Point(confidence_threshold=0.9)]


def further_points() -> list[Point]:
    """Points to measure while there is time: longer ones first, then the whole grid."""
    first = [Point(prompt_length=1024), Point(gen_length=512)]
    first += [Point(policy, prompt_length=1024) for policy in ("delayed", "sparse")]
    first += [Point(policy, n) for policy in ("delayed", "sparse") for n in (128, 64, 8, 1)]
    rest = [
        Point(policy, n, prompt, gen, confidence_threshold=threshold)
        for threshold in (None, 0.9)
        for prompt, gen in ((128, 128), (1024, 128), (128, 512), (1024, 512))
        for policy in POLICIES
        for n in (32, 1, 8, 64, 128)
    ]
    known = set(important_points())
    return [point for point in dict.fromkeys(first + rest) if point not in known]


@dataclasses.dataclass
class Outcome:
    """Results of a load."""

    seconds: float
    #: Committed tokens.
    tokens: int
    #: Latencies of the finished requests, in seconds.
    latencies: list[float]
    #: Whether time ran out before all requests finished.
    cut: bool
    #: Peak memory above that before the load, in bytes.
    peak_bytes: int = 0

    def summary(self) -> dict[str, Any]:
        """Fields for the results file."""
        found = self.latencies
        return {
            "tokens_per_second": self.tokens / self.seconds,
            "p50_seconds": float(np.percentile(found, 50)) if found else None,
            "p99_seconds": float(np.percentile(found, 99)) if found else None,
            "finished": len(found),
            "cut": self.cut,
            "peak_bytes": self.peak_bytes,
        }


class Load:
    """Sends equal requests to an engine, in real time."""

    def __init__(self, engine: Engine, point: Point) -> None:
        self._engine, self._point = engine, point
        self._generator = torch.Generator().manual_seed(1)

    def closed(self, count: int, limit: float) -> Outcome:
        """Closed loop: `count` requests in all, as many concurrent ones as the point says."""
        return self._run([0.0] * count, self._point.requests, limit)

    def open(self, arrivals: Sequence[float], limit: float) -> Outcome:
        """Open loop: requests that arrive at these seconds, whatever is still running."""
        return self._run(arrivals, len(arrivals), limit)

    def _request(self) -> Request:
        # Ids well below those of special tokens.
        most, length = self._engine.spec.mask_token_id // 2, self._point.prompt_length
        ids = torch.randint(0, most, (length,), generator=self._generator).tolist()
        return self._engine.make_request(Prompt(ids), self._point.params())

    def _run(self, arrivals: Sequence[float], at_once: int, limit: float) -> Outcome:
        engine = self._engine
        waiting = [self._request() for _ in arrivals][::-1]
        came: dict[int, float] = {}
        latencies, tokens = [], 0
        with PeakMeter(engine.runner.plan.device) as meter:
            began = time.perf_counter()
            while waiting or came:
                now = time.perf_counter() - began
                if now > limit:
                    break
                while waiting and len(came) < at_once:
                    due = arrivals[-len(waiting)]
                    if due > now:
                        break
                    request = waiting.pop()
                    # In a closed loop a request arrives when it is sent.
                    came[request.request_id] = due if at_once == len(arrivals) else now
                    engine.add(request)
                if not came:
                    time.sleep(max(0.0, arrivals[-len(waiting)] - now))
                    continue
                for update in engine.step():
                    if update.error is not None:
                        raise update.error
                    now = time.perf_counter() - began
                    latencies.append(now - came.pop(update.request_id))
                    tokens += int((update.confidence >= 0).sum())
            seconds = time.perf_counter() - began
        cut = bool(waiting or came)
        for request_id in came:
            left = engine.cancel(request_id)
            assert left is not None
            tokens += int((left.confidence >= 0).sum())
        return Outcome(seconds, tokens, latencies, cut, meter.peak)


class Measurement:
    """Measures points on one engine while there is time.

    Args:
        left: remaining seconds.
        point_seconds: limit for one point.
        done: gets all rows so far after each point.
    """

    def __init__(
        self,
        engine: Engine,
        left: Callable[[], float],
        point_seconds: float,
        done: Callable[[list[dict[str, Any]]], None],
    ) -> None:
        self._engine, self._left, self._done = engine, left, done
        self._point_seconds = point_seconds
        self._warm: set[Point] = set()
        self.rows: list[dict[str, Any]] = []

    def run(self, points: Sequence[Point]) -> None:
        """Measure each point once, a single request several times."""
        for point in points:
            if self._left() <= 0:
                return
            self._warm_up(point)
            limit = min(self._point_seconds, max(1.0, self._left()))
            outcome = Load(self._engine, point).closed(max(point.requests, 3), limit)
            self._record(point, outcome.summary())

    def poisson(self, point: Point, capacity: float, seconds: float, share: float = 0.8) -> None:
        """Poisson arrivals at a share of `capacity` tokens/s."""
        if self._left() <= 0:
            return
        seconds = min(seconds, max(1.0, self._left() / 2))
        rate = share * capacity / point.gen_length
        gaps = np.random.default_rng(1).exponential(1 / rate, max(1, math.ceil(rate * seconds)))
        # Half of the time is for requests still running at the last arrival.
        outcome = Load(self._engine, point).open(gaps.cumsum().tolist(), max(1.0, self._left()))
        self._record(
            point,
            {"arrivals": "Poisson", "share_of_capacity": share, "requests_per_second": rate}
            | outcome.summary(),
        )

    def _warm_up(self, point: Point) -> None:
        """Run two steps of each of two blocks: compiles kernels before they are timed."""
        length = min(point.gen_length, 2 * point.block_length)
        warm = dataclasses.replace(
            point,
            requests=min(point.requests, 16),
            gen_length=length,
            tokens_per_step=max(1, point.block_length // 2),
            confidence_threshold=None,
        )
        if warm not in self._warm:
            Load(self._engine, warm).closed(warm.requests, self._point_seconds)
            self._warm.add(warm)

    def _record(self, point: Point, found: dict[str, Any]) -> None:
        self.rows.append(dataclasses.asdict(point) | found)
        self._done(self.rows)
