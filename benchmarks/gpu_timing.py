"""Times work on a device, and measures the device's ceilings."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from benchmarks.gpu_arithmetic import Ceilings

#: Larger than the L2 cache of any card.
_COLD_BYTES = 256 * 2**20
#: More cycles than a GPU runs per second, so that a wait counted in cycles is long enough.
_CYCLES_PER_SECOND = 2e9


class Timer:
    """Median time of some work.

    On a GPU it measures between two events, with none of the inputs in the L2 cache and without
    the host's time: the device waits until everything is launched. If the work itself waits for
    the device, the host's time is included.
    """

    def __init__(self, device: str, *, repeats: int = 20, seconds: float = 0.15) -> None:
        self.device = device
        self._repeats, self._seconds = repeats, seconds
        on_gpu = device.startswith("cuda")
        self._cold = torch.zeros(_COLD_BYTES // 4 if on_gpu else 0, device=device)

    def seconds(self, work: Callable[[], object]) -> float:
        """Median seconds of several runs on a GPU (fewer for slow work); one run elsewhere."""
        on_gpu = self.device.startswith("cuda")
        for _ in range(3 if on_gpu else 0):
            work()
        self._wait()
        began = time.perf_counter()
        work()
        launch = time.perf_counter() - began
        self._wait()
        whole = time.perf_counter() - began
        repeats = max(3, min(self._repeats, int(self._seconds / whole))) if on_gpu else 1
        return self._on_gpu(work, repeats, launch) if on_gpu else whole

    def _on_gpu(self, work: Callable[[], object], repeats: int, launch: float) -> float:
        cycles = int(1.5 * launch * _CYCLES_PER_SECOND)
        pairs = []
        for _ in range(repeats):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            # Read rather than write: writes would still drain to memory while the work runs.
            self._cold.sum()
            torch.cuda._sleep(cycles)  # torch's own tests use this to keep a device busy
            begin.record()
            work()
            end.record()
            pairs.append((begin, end))
        self._wait()
        return statistics.median(begin.elapsed_time(end) / 1e3 for begin, end in pairs)

    def _wait(self) -> None:
        if self.device.startswith("cuda"):
            torch.cuda.synchronize()


def host_seconds(work: Callable[[], object], *, seconds: float = 0.3) -> float:
    """Median time of work on a CPU."""
    for _ in range(3):
        work()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while not times or time.perf_counter() < end:
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def measure_ceilings(timer: Timer, *, copied: int = 2**30, width: int = 8192) -> Ceilings:
    """Bandwidth of a copy of `copied` bytes, rate of a bfloat16 product of `width` squared."""
    source, target = torch.empty(2, copied, dtype=torch.uint8, device=timer.device)
    bandwidth = 2 * copied / timer.seconds(lambda: target.copy_(source))
    left, right = torch.randn(2, width, width, device=timer.device).to(torch.bfloat16)
    out = torch.empty_like(left)
    rate = 2 * width**3 / timer.seconds(lambda: torch.mm(left, right, out=out))
    return Ceilings(bandwidth, rate)
