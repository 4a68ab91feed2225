"""Memory of tensors, counted by torch itself as it is taken and given back."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Self

from torch.profiler import ProfilerActivity, profile


class AllocationMeter:
    """By how much the memory of tensors on the CPU rises at most inside a `with` block.

    Of resident memory this is the part that a program decides: the rest is what malloc keeps for
    later, which depends on what the process did before and differs from run to run. What a library
    allocates by itself (oneDNN's packing buffers, some MiB) is not counted.
    """

    def __init__(self) -> None:
        self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        #: Bytes, once the block is left.
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
        # The public tables add up what each operation took, not what was held at a time.
        recorded: Any = self._profile.profiler
        events = [e for e in recorded.kineto_results.events() if e.name() == "[memory]"]
        held = 0
        for event in sorted(events, key=lambda event: int(event.start_ns())):
            held += event.nbytes()
            self.peak = max(self.peak, held)
