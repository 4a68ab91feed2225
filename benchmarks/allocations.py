"""Measures peak tensor memory, counted by torch's profiler."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Self

from torch.profiler import ProfilerActivity, profile


class AllocationMeter:
    """Peak rise of CPU tensor memory inside a `with` block.

    A program controls this part of resident memory. The rest is memory that malloc keeps; it
    depends on the history of the process and differs from run to run. Memory that a library
    allocates itself (oneDNN's packing buffers, some MiB) is not counted.
    """

    def __init__(self) -> None:
        self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        #: Bytes; set when the block ends.
        self.peak = 0

    def __enter__(self) -> Self:
        self._profile.__enter__()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._profile.__exit__(exc_type, exc, traceback)
        # The public tables sum what each operation allocated, not what was allocated at one time.
        recorded: Any = self._profile.profiler
        events = [e for e in recorded.kineto_results.events() if e.name() == "[memory]"]
        held = 0
        for event in sorted(events, key=lambda event: int(event.start_ns())):
            held += event.nbytes()
            self.peak = max(self.peak, held)
