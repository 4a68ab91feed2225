"""Picks the requests that take the next denoising step, under a token budget. No torch."""

from __future__ import annotations

import bisect

from dllm_engine.memory.kv_cache import PageAllocator
from dllm_engine.memory.prefix_cache import PrefixCache
from dllm_engine.request import Request

#: One level of priority moves a request back by this many steps; older requests still go first.
PRIORITY_STEPS = 64
#: A request left out of this many steps in a row goes first and ignores the Refresh allowance.
MAX_IDLE_STEPS = 32
#: Steps below this share of the token budget are not evened out.
EVEN_SHARE = 1 / 8


class Scheduler:
    """Gives slots and pages to waiting requests, and picks the running ones for each step.

    Admission is in order: a request that finds no slot or pages holds up all behind it. An
    exclusive request waits until nothing runs, and all behind it wait until it has ended.

    A step takes requests by arrival (a higher priority counts as an earlier arrival) until the
    token budget is full, so that old requests finish instead of all slowing down together. A
    request left out of `MAX_IDLE_STEPS` steps goes before all others, longest first. The first
    request always runs, alone if it exceeds the budget: no running request is left out of more
    than `MAX_IDLE_STEPS` steps plus one for each other request.

    Steps are phase-multiplexed: Refreshes are spread so that all steps are about equally heavy. A
    step takes Refreshes up to the mean load of the running requests, plus what earlier steps left
    unspent (deficit carry-over, as in Sangam's scheduler). A burst of equal requests drifts apart
    within a block or two.

    While a step is in flight, the requests outside it form another one if they have enough rows to
    keep the device as busy: the host then commits one step and sets up the next while the device
    runs the other. Once there are rows for two such steps, a step takes at most half of all rows.

    Most requests reserve their pages at admission. One that `grows` takes pages block by block. If
    none is free, the youngest request gives back all of its pages, keeps its slot and its canvas,
    and waits for pages ahead of younger requests; its keys and values are computed again from what
    the prefix cache still has. The oldest request always gets its pages, so every request ends.

    Args:
        overlap_rows: rows that are enough for a second step; 0: one step at a time.
        prefix_cache: keys and values of earlier requests; None: every request computes its own.
    """

    def __init__(
        self,
        num_slots: int,
        token_budget: int,
        allocator: PageAllocator,
        *,
        overlap_rows: int = 0,
        prefix_cache: PrefixCache | None = None,
    ) -> None:
        self._prefix_cache = prefix_cache
        self._token_budget = token_budget
        self._overlap_rows = overlap_rows
        self._allocator = allocator
        self._waiting: list[Request] = []
        self._running: list[Request] = []
        self._free_slots = list(range(num_slots - 1, -1, -1))
        self._num_slots = num_slots
        self._step = 0
        self._deficit = 0.0
        #: Requests whose pages were taken away, in total.
        self.num_preemptions = 0

    @property
    def waiting(self) -> tuple[Request, ...]:
        """Requests without a slot, in the order of admission."""
        return tuple(self._waiting)

    @property
    def running(self) -> tuple[Request, ...]:
        """Requests with a slot. Thread-safe."""
        return tuple(self._running)

    @property
    def preempted(self) -> tuple[Request, ...]:
        """Running requests whose pages were taken away."""
        return tuple(request for request in self._running if request.preempted)

    def add(self, request: Request) -> None:
        """Queue a request by arrival and priority."""
        request.arrival_order = self._step + PRIORITY_STEPS * request.priority
        bisect.insort(self._waiting, request, key=lambda waiting: waiting.arrival_order)

    def admit(self) -> list[Request]:
        """Give slots and pages to waiting and preempted requests, in order.

        Returns:
            The requests that got theirs. One that was preempted has `has_canvas`: it goes on.
        """
        admitted = []
        while (request := self._next_in_line()) is not None and self._take_pages(request):
            if request.preempted:
                request.preempted = False
            else:
                self._waiting.pop(0)
                request.slot = self._free_slots.pop()
                self._running.append(request)
            request.ready_since = self._step
            admitted.append(request)
        return admitted

    def _next_in_line(self) -> Request | None:
        """The first request that waits for pages, if it lacks nothing else."""
        first = min(self.preempted, key=_age, default=None)
        if not self._waiting or (first is not None and _age(first) < _age(self._waiting[0])):
            return first
        alone = self._waiting[0].exclusive or (self._running and self._running[0].exclusive)
        if not self._free_slots or (self._running and alone):
            return first
        return self._waiting[0]

    def _take_pages(self, request: Request) -> bool:
        """Give a request the pages of its next step, cached ones first; whether it got them.

        Room is left for one more page of each request that grows, so that a newcomer does not take
        the pages that make the next request of them preempt it.
        """
        found: list[int] = []
        if self._prefix_cache is not None and request.chain is not None:
            found = self._prefix_cache.match(request.chain)
        missing = max(0, request.num_pages - len(found))
        room = sum(r.grows and not r.preempted for r in self._running)
        if missing + room * (missing > 0) > self._allocator.num_free:
            self._allocator.release(reversed(found))
            return False
        request.pages = found + self._allocator.reserve(missing)
        if self._prefix_cache is not None and request.chain is not None:
            found_tokens = len(found) * self._allocator.page_size
            request.num_entered = found_tokens // request.chain.unit
            if not request.preempted:
                request.cached_tokens = found_tokens
        return True

    def schedule(self) -> list[Request]:
        """Pick the requests of the next step; none only if none run or a step is in flight."""
        ready = [r for r in self._running if not (r.in_flight or r.preempted)]
        budget = self._budget(ready)
        if not ready or not budget:
            return []
        self._step += 1
        allowance = self._even_load(ready) + self._deficit
        chosen: list[Request] = []
        used = 0
        for request in sorted(ready, key=self._order):
            cost = request.step_cost
            limit = budget
            if request.next_is_refresh and not self._is_late(request):
                limit = min(limit, int(allowance))
            if request.preempted:  # by one before it in this order
                continue
            if (not chosen or used + cost <= limit) and self._grow(request, chosen):
                chosen.append(request)
                used += cost
                request.ready_since = self._step
        left = allowance - used
        if len(chosen) == len(ready):
            left = min(left, 0.0)  # nothing was left out
        self._deficit = min(max(left, -self._token_budget), self._token_budget)
        return chosen

    def _grow(self, request: Request, chosen: list[Request]) -> bool:
        """Give a request the pages that its next step lacks, taking them from younger ones.

        Returns:
            Whether it has them. Requests in flight and those of this step keep theirs.
        """
        missing = request.num_pages - len(request.pages)
        if missing <= 0:
            return True
        while self._allocator.num_free < missing:
            younger = [
                r
                for r in self._running
                if _age(r) > _age(request) and not (r.in_flight or r in chosen) and r.pages
            ]
            if not younger:
                return False
            self._preempt(max(younger, key=_age))
        request.pages += self._allocator.reserve(missing)
        return True

    def _preempt(self, request: Request) -> None:
        self._allocator.release(reversed(request.pages))
        request.pages, request.num_entered, request.preempted = [], 0, True
        self.num_preemptions += 1

    def _budget(self, ready: list[Request]) -> int:
        """Rows that a step of some of these may have; 0: too few to launch one."""
        enough, load = self._overlap_rows, sum(request.step_cost for request in ready)
        if any(request.in_flight for request in self._running):
            return self._token_budget if enough and load >= enough else 0
        if ready and enough:
            half = min(self._token_budget, -(-load // 2))
            # The first request alone may exceed that half; splitting pays only if the rest is
            # enough for a step.
            first = min(ready, key=self._order).step_cost
            if load - max(first, half) >= enough:
                return half
        return self._token_budget

    def _even_load(self, ready: list[Request]) -> float:
        """Rows beyond which a step takes no more Refreshes that can wait."""
        mean = sum(request.mean_cost for request in ready)
        return max(mean, self._token_budget * EVEN_SHARE)

    def _is_late(self, request: Request) -> bool:
        return self._step - request.ready_since > MAX_IDLE_STEPS

    def _order(self, request: Request) -> tuple[bool, int]:
        late = self._is_late(request)
        return not late, request.ready_since if late else request.arrival_order

    def remove(self, request: Request) -> None:
        """Remove a finished or cancelled request and free its slot and pages."""
        if request.slot is None:
            self._waiting.remove(request)
            return
        self._running.remove(request)
        self._free_slots.append(request.slot)
        self._allocator.release(reversed(request.pages))
        request.slot, request.pages, request.preempted = None, [], False

    def check_integrity(self) -> None:
        """Check that each slot is free or held by one request, and each page counted right.

        Raises:
            AssertionError: it is not so.
        """
        held = [r.slot for r in self._running]
        slots = sorted(s for s in [*held, *self._free_slots] if s is not None)
        assert slots == list(range(self._num_slots)), f"held {held}, free {self._free_slots}"
        assert all(r.slot is None and not r.pages for r in self._waiting)
        assert all(not r.pages for r in self._running if r.preempted)
        self._allocator.check_integrity([page for r in self._running for page in r.pages])


def _age(request: Request) -> tuple[int, int]:
    """Orders requests from the oldest to the youngest."""
    return request.arrival_order, request.request_id
