"""Picks the requests that take the next denoising step, under a token budget. No torch."""

from __future__ import annotations

import dataclasses
from collections import deque

from .request import Prompt, SamplingParams


@dataclasses.dataclass(eq=False)
class Request:
    """One request inside the engine."""

    request_id: int
    prompt: Prompt
    params: SamplingParams
    #: Seconds between updates while running; 0: every step; None: only the final one.
    stream_interval: float | None = None
    #: Row of the canvas table while running; None while waiting.
    slot: int | None = None
    steps_run: int = 0
    #: Tokens from the left that are final, short of an end-of-text token.
    num_ready: int = 0
    ended_by_token: bool = False
    #: When the last update was made, or the request admitted (seconds, monotonic).
    last_update: float = 0.0

    @property
    def length(self) -> int:
        """Prompt, canvas and suffix, in tokens."""
        given = len(self.prompt.ids) + len(self.prompt.suffix_ids)
        return given + self.params.gen_length

    @property
    def forwards_per_step(self) -> int:
        """Sequences per step: guidance needs an unconditional twin."""
        return 2 if self.params.cfg_scale > 0 else 1

    def is_due(self, now: float) -> bool:
        """Whether an update is due at `now` (seconds, monotonic); if so, the next is later."""
        if self.stream_interval is None:
            return False
        due = now - self.last_update >= self.stream_interval
        if due:
            self.last_update = now
        return due

    @property
    def rows_per_step(self) -> int:
        """Rows that one step pushes through the model."""
        return self.length * self.forwards_per_step


class Scheduler:
    """Waiting requests, running requests and the free slots between them.

    Running requests take turns: a step goes to those that have waited longest, as many as fit
    the budget; whoever did not fit stands first next time. A request larger than the budget
    runs alone when its turn comes.
    """

    def __init__(self, num_slots: int, token_budget: int) -> None:
        self._token_budget = token_budget
        self._waiting: deque[Request] = deque()
        self._running: deque[Request] = deque()
        self._free_slots = list(range(num_slots - 1, -1, -1))
        self._num_slots = num_slots

    @property
    def num_waiting(self) -> int:
        """Requests without a slot."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Requests with a slot."""
        return len(self._running)

    def add(self, request: Request) -> None:
        """Queue a request behind all others."""
        self._waiting.append(request)

    def admit(self) -> list[Request]:
        """Give free slots to waiting requests, first come first served; returns the admitted."""
        admitted = []
        while self._waiting and self._free_slots:
            request = self._waiting.popleft()
            request.slot = self._free_slots.pop()
            self._running.append(request)
            admitted.append(request)
        return admitted

    def schedule(self) -> list[Request]:
        """The requests of the next step; empty only when nothing runs."""
        chosen: list[Request] = []
        passed_over: deque[Request] = deque()
        budget = self._token_budget
        while self._running:
            request = self._running.popleft()
            cost = request.rows_per_step
            if cost <= budget or not (chosen or passed_over):
                chosen.append(request)
                budget -= cost
            else:
                passed_over.append(request)
        self._running = passed_over
        self._running.extend(chosen)
        return chosen

    def remove(self, request: Request) -> None:
        """Forget a finished or cancelled request and free its slot."""
        if request.slot is None:
            self._waiting.remove(request)
            return
        self._running.remove(request)
        self._free_slots.append(request.slot)
        request.slot = None

    def check_integrity(self) -> None:
        """Every slot is free or held by exactly one running request.

        Raises:
            AssertionError: it is not so.
        """
        held = [r.slot for r in self._running]
        slots = sorted(s for s in [*held, *self._free_slots] if s is not None)
        assert slots == list(range(self._num_slots)), f"held {held}, free {self._free_slots}"
        assert all(r.slot is None for r in self._waiting)
