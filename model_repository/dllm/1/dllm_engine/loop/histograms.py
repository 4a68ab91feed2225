"""Distributions of times and sizes since the start, in the shape of Prometheus' histograms."""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Sequence

#: Upper ends of buckets: seconds of a step or per token, seconds of a request, and requests.
SHORT = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0)
LONG = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Histogram:
    """Counts values by bucket. One thread observes; others may read."""

    def __init__(self, ends: Sequence[float]) -> None:
        #: Upper ends of the buckets, the last infinite.
        self.ends = (*ends, math.inf)
        self._counts = [0] * len(self.ends)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        """Count a value."""
        self._counts[bisect.bisect_left(self.ends, value)] += 1
        self.sum += value

    @property
    def cumulative(self) -> list[int]:
        """How many values are at most each of `ends`; the last is how many there are."""
        return list(itertools.accumulate(self._counts))


class Histograms:
    """The engine's distributions."""

    def __init__(self) -> None:
        #: Seconds from arrival to a slot.
        self.queue_time = Histogram(LONG)
        #: Seconds from arrival to the first token that is final and in its place.
        self.time_to_first_token = Histogram(LONG)
        #: Seconds per token of an answer, from its slot to its end.
        self.time_per_output_token = Histogram(SHORT)
        #: Seconds from arrival to the end of an answer.
        self.e2e_latency = Histogram(LONG)
        #: Seconds of a step, and requests in it.
        self.step_time = Histogram(SHORT)
        self.step_requests = Histogram(SIZES)
