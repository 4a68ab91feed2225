"""Requests: the prompt, the request inside the engine, updates and results. No torch."""

from __future__ import annotations

import dataclasses
import enum
import functools
import hashlib
from typing import TYPE_CHECKING

import numpy as np

from dllm_engine.sampling_params import SamplingParams
from dllm_engine.structured.token_automaton import TokenAutomaton

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import numpy.typing as npt

#: Least seconds between updates of a waiting request, to which nothing happens.
WAITING_INTERVAL = 1.0


@dataclasses.dataclass(frozen=True)
class Prompt:
    """The given tokens of a sequence: before, in and behind the canvas."""

    ids: list[int]
    #: The canvas, with the mask id at positions to decode; empty: all masks.
    canvas_ids: list[int] = dataclasses.field(default_factory=list)
    #: The tokens behind the canvas (infilling).
    suffix_ids: list[int] = dataclasses.field(default_factory=list)
    #: [masks, K] int64; tokens whose log-probabilities to read at each mask of the canvas, −1 for
    #: none. The request then runs the model once at its masks, and decodes nothing.
    reads: npt.NDArray[np.int64] | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens outside the canvas."""
        return len(self.ids) + len(self.suffix_ids)


class PrefixChain:
    """The keys of a sequence's beginning in the prefix cache, one per unit of tokens.

    Each key is SHA-256 over the one before it and the unit's tokens.

    Args:
        unit: tokens of a unit.
        identity: all that keys and values depend on besides the tokens, and the request's salt.
    """

    def __init__(self, unit: int, identity: Iterable[str | int]) -> None:
        self.unit = unit
        self.keys: list[bytes] = []
        # `repr` writes no two lists of strings and numbers alike.
        self._last = hashlib.sha256(repr(list(identity)).encode()).digest()

    def extend(self, tokens: Sequence[int] | npt.NDArray[np.int64]) -> None:
        """Add the keys of further whole units.

        Args:
            tokens: the sequence from its beginning; the units that have a key are not read.
        """
        for end in range((len(self.keys) + 1) * self.unit, len(tokens) + 1, self.unit):
            content = np.asarray(tokens[end - self.unit : end], "<i8").tobytes()
            self._last = hashlib.sha256(self._last + content).digest()
            self.keys.append(self._last)


@dataclasses.dataclass(eq=False)
class Request:
    """One request inside the engine."""

    request_id: int
    prompt: Prompt
    params: SamplingParams
    #: Seconds between updates; 0: every step; None: only the final one.
    stream_interval: float | None = None
    #: 0 goes first; each level more counts as coming `PRIORITY_STEPS` steps later.
    priority: int = 0
    #: Run it while nothing else runs.
    exclusive: bool = False
    #: Seconds it may wait for a slot; None: for ever.
    timeout: float | None = None
    #: The caller's name for it, for the log and for cancelling; need not be unique.
    name: str = ""
    #: Requests share keys and values of equal beginnings only if their salts are equal.
    cache_salt: str = ""
    #: Which tokens its text may have; None: any.
    form: TokenAutomaton | None = None
    #: Pages of keys and values up to the end of its next step, and those that it holds.
    num_pages: int = 0
    pages: list[int] = dataclasses.field(default_factory=list)
    #: How many of `pages` the page table of its slot has.
    num_assigned: int = 0
    #: Whether `num_pages` may grow from step to step; the others reserve all at admission.
    grows: bool = False
    #: Keys of its beginning in the prefix cache; None: it takes no part.
    chain: PrefixChain | None = None
    #: Units of the chain whose keys and values are computed or came from the prefix cache.
    num_entered: int = 0
    #: Tokens of the prompt whose keys and values came from the prefix cache.
    cached_tokens: int = 0
    #: Whether its pages were taken away: it waits for pages, with its slot and its canvas.
    preempted: bool = False
    #: Row of the canvas table while running; None while waiting.
    slot: int | None = None
    #: Whether the canvas in its slot is its own; before, it is an earlier request's.
    has_canvas: bool = False
    steps_run: int = 0
    #: Whether it is in a step in flight.
    in_flight: bool = False
    #: Rows pushed through the model so far.
    rows_run: int = 0
    #: Rows of the next step of one sequence, and whether it is a Refresh; None: all, it is.
    next_rows: int | None = None
    next_is_refresh: bool = True
    #: The scheduler's step at its arrival, plus what its priority adds: lower goes first.
    arrival_order: int = 0
    #: The scheduler's step in which it ran last, or was admitted.
    ready_since: int = 0
    #: Tokens from the left that are final, short of an end-of-text token.
    num_ready: int = 0
    ended_by_token: bool = False
    #: When it was queued, and when its last update was made (seconds, monotonic).
    queued_at: float = 0.0
    #: When it got its slot.
    admitted_at: float = 0.0
    last_update: float = 0.0

    @property
    def length(self) -> int:
        """Prompt, canvas and suffix, in tokens."""
        given = self.prompt.num_tokens
        return given + self.params.gen_length

    @property
    def forwards_per_step(self) -> int:
        """Sequences per step: guidance needs a second, unconditional one."""
        return 2 if self.params.cfg_scale > 0 else 1

    @property
    def step_cost(self) -> int:
        """Rows of its next step."""
        rows = self.length if self.next_rows is None else self.next_rows
        return rows * self.forwards_per_step

    @property
    def mean_cost(self) -> float:
        """Mean rows per step: all steps so far, and one more block as planned."""
        rows, steps = self._planned_block
        total = self.rows_run + rows * self.forwards_per_step
        return total / (self.steps_run + steps)

    @functools.cached_property
    def _planned_block(self) -> tuple[float, int]:
        """Rows of one sequence and steps of a block, as a mean over its blocks."""
        params = self.params
        block_length = params.block_length or params.gen_length
        steps = max(1, (params.steps or params.gen_length) * block_length // params.gen_length)
        if params.cache == "block":  # once more to make the block final
            return block_length * (steps + 1), steps
        if params.cache in (None, "none"):
            return steps * self.length, steps
        first = 1 + (params.delay_steps or 0)
        again = (steps - first) // params.refresh_interval if params.refresh_interval else 0
        refreshes = min(steps, first + max(0, again))
        reuse: float = block_length
        if params.cache == "prefix":  # and the rows behind the block
            reuse = (block_length + params.gen_length) / 2 + len(self.prompt.suffix_ids)
        elif params.cache == "delayed":  # masked rows, and those committed last
            reuse = block_length / 2 + 1
        return refreshes * self.length + (steps - refreshes) * reuse, steps

    def is_due(self, now: float) -> bool:
        """Whether an update is due at `now` (seconds, monotonic); if so, counts it as sent.

        Waiting requests send updates too, so that clients can tell a long queue from a dead engine.
        """
        if self.stream_interval is None:
            return False
        shortest = WAITING_INTERVAL if self.slot is None or self.preempted else 0.0
        due = now - self.last_update >= max(self.stream_interval, shortest)
        if due:
            self.last_update = now
        return due


class FinishReason(enum.StrEnum):
    """Why a request ended."""

    #: End-of-text token or stop string.
    STOP = "stop"
    #: The whole canvas is decoded.
    LENGTH = "length"
    #: The client disconnected or cancelled.
    CANCELLED = "cancelled"
    #: What the request asked to read is read.
    READ = "read"


@dataclasses.dataclass(frozen=True)
class Usage:
    """The cost of a request so far."""

    prompt_tokens: int
    #: Tokens of the answer, the end-of-text token included.
    completion_tokens: int
    #: Denoising steps run.
    steps: int
    #: Sequences run through the model; with guidance two per step.
    forward_passes: int
    #: Tokens of the prompt whose keys and values came from the prefix cache.
    cached_tokens: int = 0


@dataclasses.dataclass(frozen=True)
class LogProbs:
    """Log-probabilities of a canvas: log-softmax of the model's logits at the step of commit.

    Nothing that shapes the choice of a token counts: temperature, filters, forbidden tokens. With
    guidance, the logits are those that guidance makes. The sum is over the whole vocabulary.
    """

    #: [gen_length] float32; of the committed token; NaN where no step committed one; 0 where a form
    #: left no choice, without a pass and so without alternatives.
    chosen: npt.NDArray[np.float32]
    #: [gen_length, K] float32; of the K most probable tokens but the mask token, descending.
    top: npt.NDArray[np.float32]
    #: [gen_length, K] int32; these tokens; −1 where no step committed one.
    top_tokens: npt.NDArray[np.int32]

    @classmethod
    def empty(cls, gen_length: int, num_top: int) -> LogProbs:
        """Those of a canvas of masks."""
        return cls(
            np.full(gen_length, np.nan, np.float32),
            np.full((gen_length, num_top), np.nan, np.float32),
            np.full((gen_length, num_top), -1, np.int32),
        )

    def beginning(self, count: int) -> LogProbs:
        """A copy of the first `count` positions."""
        return LogProbs(*(values[:count].copy() for values in vars(self).values()))


@dataclasses.dataclass(frozen=True)
class CanvasUpdate:
    """A request's canvas after a step. Text is made from it by `Tokenizer.answer`."""

    request_id: int
    #: [gen_length] int32; positions not decoded yet hold the mask id.
    token_ids: npt.NDArray[np.int32]
    #: [gen_length] float32; the probability each position was committed with, −1 while masked.
    confidence: npt.NDArray[np.float32]
    #: Tokens from the left that are final, short of an end-of-text token.
    num_ready: int
    usage: Usage
    seed: int
    #: None while running.
    finish_reason: FinishReason | None = None
    #: Set instead of a finish reason when the request failed.
    error: Exception | None = None
    #: [gen_length] int32; the step that committed the position, from 1; 0 where given, −1 while
    #: masked.
    reveal_steps: npt.NDArray[np.int32] = dataclasses.field(
        default_factory=lambda: np.zeros(0, np.int32)
    )
    #: None unless the request asks.
    log_probs: LogProbs | None = None
    #: [masks, K] float32; log-softmax of the raw logits for `Prompt.reads`, −∞ for no token.
    read: npt.NDArray[np.float32] | None = None

    @property
    def finished(self) -> bool:
        """Whether this is the request's last update."""
        return self.finish_reason is not None or self.error is not None


@dataclasses.dataclass(frozen=True)
class Trajectory:
    """When each position of a canvas was decoded."""

    #: The text that each position adds; "" for special tokens and what was never decoded.
    pieces: list[str]
    #: [gen_length] int32; the step that committed the position, from 1; 0 where the request gave
    #: the token; −1 where it was never decoded, since the answer ended before.
    steps: npt.NDArray[np.int32]
    #: [gen_length] float32; the probability it was committed with; 1 where given, −1 where never.
    confidence: npt.NDArray[np.float32]


@dataclasses.dataclass(frozen=True)
class DenoisingStep:
    """The canvas after a step, as `LLM.stream` yields it."""

    #: Denoising steps run so far.
    step: int
    #: [gen_length] int32; positions not decoded yet hold the mask id.
    token_ids: npt.NDArray[np.int32]
    #: [gen_length] float32; the probability each position was committed with, −1 elsewhere.
    confidence: npt.NDArray[np.float32]
    #: The positions that this step committed.
    committed: list[int]
    #: The text that each position shows now; None where it is masked.
    canvas: list[str | None]
    #: The beginning of the answer, which will not change.
    text: str


@dataclasses.dataclass(frozen=True)
class Completion:
    """A finished request, as `LLM.generate` returns it."""

    text: str
    token_ids: npt.NDArray[np.int32]
    confidence: npt.NDArray[np.float32]
    finish_reason: FinishReason
    usage: Usage
    seed: int
    #: None unless it was asked for.
    trajectory: Trajectory | None = None
    #: `Trajectory.steps`; None unless `SamplingParams.reveal_steps`.
    reveal_steps: npt.NDArray[np.int32] | None = None
    #: None unless `SamplingParams.logprobs`.
    log_probs: LogProbs | None = None
