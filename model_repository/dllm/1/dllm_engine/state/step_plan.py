"""All that one step needs of the canvases, on the host."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from dllm_engine.ops.transfer import Array
from dllm_engine.state.slots import SlotState
from dllm_engine.structured.best_text import Span

#: Rows of Reuses are grouped by their number rounded up to a multiple of this.
_QUERY_MULTIPLE = 8


@dataclasses.dataclass(frozen=True)
class Blocks:
    """The active blocks of R requests, and their M masked positions.

    The positions are in row-major order of the [R, width] matrix of blocks. All arrays are int64
    unless noted.
    """

    #: [R, width] bool.
    masked: Array
    #: [M]; request, column in its block, and index in the flattened matrix.
    request: Array
    column: Array
    index: Array
    #: [M]; slot, and position in the sequence.
    slots: Array
    positions: Array


@dataclasses.dataclass(frozen=True)
class Sequences:
    """The sequences of a step, in the order of their packed rows.

    There are R requests, S sequences (two for a request with guidance) and N packed rows. All
    arrays are int64 unless noted.
    """

    #: The R requests; and [R], the first sequence of each.
    requests: SlotState
    first_copy: Array
    #: The S sequences; and [S], 1 for an unconditional one.
    state: SlotState
    uncond: Array
    #: [S]; the first packed row.
    query_starts: Array
    #: [S, 6]; consecutive sequences with equal rows form a group; None: they are not grouped.
    shape: Array | None
    #: [N]; sequence and position of each row.
    owner: Array
    positions: Array
    #: [S, width + 1] int64: the row of each position of a partial window, beginning before the
    #: block; [S] bool: which windows are partial. None: none is.
    _partial: tuple[Array, Array] | None

    @classmethod
    def of(
        cls,
        requests: SlotState,
        delayed_rows: Callable[[SlotState], Array],
        page_size: int | None,
    ) -> Sequences:
        """Pack the sequences of some requests.

        Args:
            delayed_rows: which positions of a window `delayed` computes.
            page_size: see `CanvasTable.plan_step`.
        """
        shape = None
        if page_size is not None:
            shape = _shape(page_size, requests)
            order = np.lexsort(shape.T[::-1])
            requests, shape = requests.take(order), shape[order]
        first_copy = np.arange(len(requests.slots))
        uncond = np.zeros_like(first_copy)
        state = requests
        if (requests.cfg_scale > 0).any():
            # Each unconditional sequence follows its own, so that equal shapes stay together.
            copies = 1 + (requests.cfg_scale > 0)
            first_copy = copies.cumsum() - copies
            which = np.repeat(np.arange(len(copies)), copies)
            uncond = np.arange(len(which)) - first_copy[which]
            state, shape = requests.take(which), None if shape is None else shape[which]
        num_rows = state.num_rows
        query_starts = num_rows.cumsum() - num_rows
        owner = np.repeat(np.arange(len(num_rows)), num_rows)
        positions = np.arange(len(owner)) + (state.first_row - query_starts)[owner]
        partial = None
        if (is_partial := state.partial).any():
            wanted = delayed_rows(state) & is_partial[:, None]
            sequence, column = wanted.nonzero()
            positions[is_partial[owner]] = state.block_start[sequence] - 1 + column
            partial = wanted.cumsum(axis=1) - 1, is_partial
        return cls(
            requests=requests,
            first_copy=first_copy,
            state=state,
            uncond=uncond,
            query_starts=query_starts,
            shape=shape,
            owner=owner,
            positions=positions,
            _partial=partial,
        )

    def row_of(self, sequence: Array, position: Array) -> Array:
        """Return the packed row of each position, which must be in the step; all [n]."""
        row: Array = position - self.state.first_row[sequence]
        if self._partial is not None:
            places, partial = self._partial
            column = np.clip(
                position - self.state.block_start[sequence] + 1, 0, places.shape[1] - 1
            )
            row = np.where(partial[sequence], places[sequence, column], row)
        packed: Array = self.query_starts[sequence] + row
        return packed

    @property
    def guided(self) -> bool:
        """Whether any sequence is an unconditional one."""
        return len(self.state.slots) > len(self.requests.slots)


def _shape(page_size: int, state: SlotState) -> Array:
    """Return what must be equal for two sequences to share a call: [R, 6] int64.

    For a Refresh: 0, length and, where it selects, block, window, kept rows and pooling. For a
    Reuse: 1, rows rounded up, pages, whether the last page is full, and whether rows before the
    window see fewer keys.
    """
    shape = np.zeros((len(state.slots), 6), np.int64)
    refresh, selects = state.refresh, state.selects
    shape[:, 0] = ~refresh
    rounded = -(-state.num_rows // _QUERY_MULTIPLE) * _QUERY_MULTIPLE
    shape[:, 1] = np.where(refresh, state.num_rows, rounded)
    if selects.any():
        end, window = state.block_end, state.block_end - state.window_start
        selecting = [end - state.block_start, window, state.keep, state.pool_kernel]
        shape[:, 2:] = np.where(selects, selecting, 0).T
    shape[:, 2] = np.where(refresh, shape[:, 2], -(-state.kv_lens // page_size))
    shape[:, 3] = np.where(refresh, shape[:, 3], state.kv_lens % page_size == 0)
    shape[:, 4] = np.where(refresh, shape[:, 4], state.first_row < state.window_start)
    return shape


@dataclasses.dataclass(frozen=True)
class FormRows:
    """Masked positions that automata decide."""

    #: Their places among the M masked positions, request by request.
    rows: list[int]
    #: Of each request with such positions.
    spans: list[Span]


@dataclasses.dataclass(frozen=True)
class LogProbPlan:
    """Which log-probabilities a step computes. None of a `StepPlan`: no request asks."""

    #: [M] bool; masked positions of requests that ask.
    asks: Array
    #: At most how many of these the step commits.
    count: int
    #: Whether alternatives are listed.
    lists: bool


@dataclasses.dataclass(frozen=True)
class StepPlan:
    """What a step computes; R requests, N packed rows, M masked positions in active blocks."""

    sequences: Sequences
    #: [N] int64.
    input_ids: Array
    #: [N] int64; how many keys of its sequence each row sees; None: all.
    key_limits: Array | None
    blocks: Blocks
    #: [M] int64: packed row that predicts each masked position; and its row in the unconditional
    #: sequence, equal to `rows` without guidance.
    rows: Array
    uncond_rows: Array
    #: [R]: positions to commit by the schedule, int64; Dream's share of the masks, float32.
    counts: Array
    chances: Array
    #: [R, width] float32: the confidence of committed positions of the active blocks, −1 where
    #: masked; None: no rule needs it.
    committed: Array | None
    log_probs: LogProbPlan | None
    #: Masked positions that automata decide; None: there are none.
    forms: FormRows | None = None
    #: [M, K] int64: tokens whose log-probabilities to read, −1 for none; None: no request reads.
    read_tokens: Array | None = None
