"""Says what a step of each request does: the three answers of a cache policy.

1. Which rows go through the model.
2. Which keys each of them sees.
3. Which keys and values are stored, and final from then on.

`CanvasScope` answers for models in which every token sees every other one: keys and values depend
on the whole canvas, so all but `none` keep approximations (`memory.cache_policy`). `BlockScope`
answers for block-wise models: no token sees a later block, so what is stored of a finished block is
exact and final. An engine serves one checkpoint and so has one of the two (docs/decisions/027).

The answers are columns of `SlotState`, computed for all requests of a step at once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Protocol

import numpy as np

from dllm_engine.memory.cache_policy import CachePolicy, kept_rows, phase_of
from dllm_engine.models.base import BlockAttention
from dllm_engine.ops.transfer import Array
from dllm_engine.state.slots import SlotState


class StepScope(Protocol):
    """What the next step of R requests does."""

    def next_step(self, state: SlotState, first_masked: Array) -> SlotState:
        """Set the columns of `state` that describe the next step.

        Args:
            state: the active blocks are open.
            first_masked: [R] int64; first masked position, the canvas's end if there is none.
        """

    def key_limits(self, state: SlotState, owner: Array, positions: Array) -> Array | None:
        """How many keys of its sequence each packed row sees: int64 [N]; None: all.

        Args:
            state: of the S sequences.
            owner, positions: [N]; sequence and position of each row.
        """

    def final_after(self, state: SlotState) -> Array:
        """Positions from the left whose keys and values are final once the step ran: int64 [R]."""


@dataclasses.dataclass(frozen=True)
class CanvasScope:
    """Steps over canvases in which every token sees every other one; see `cache_policy`."""

    #: Whether a hidden state predicts the next position.
    shifted: bool
    #: Counts the rows of partial windows (`cache_policy.delayed_rows`): [R].
    count_delayed: Callable[[SlotState], Array]

    def next_step(self, state: SlotState, _: Array) -> SlotState:
        """A Refresh of the whole sequence, or a Reuse of its active rows."""
        refresh, store = phase_of(
            state.cache, state.block_age, state.delay_steps, state.refresh_interval
        )
        state = state._replace(refresh=refresh, store=store)
        start = np.maximum(state.block_start - self.shifted, 0)
        first_row = np.where(refresh, 0, start)
        behind = refresh | (state.cache == int(CachePolicy.PREFIX))
        num_rows = np.where(behind, state.length, state.block_end) - first_row
        if (partial := state.partial).any():
            num_rows = np.where(partial, self.count_delayed(state), num_rows)
        keep, kv_lens = np.zeros_like(start), state.length
        if (sparse := state.cache == int(CachePolicy.SPARSE)).any():
            window = state.block_end - start
            kept = kept_rows(state.length - window, state.retention_ratio)
            keep = np.where(sparse, kept, 0)
            kv_lens = np.where(sparse, kept + window, state.length)
        return state._replace(
            window_start=start,
            window_end=state.block_end,
            first_row=first_row,
            num_rows=num_rows,
            keep=keep,
            kv_lens=kv_lens,
            decodes=np.ones_like(refresh),
        )

    def key_limits(self, *_: object) -> None:
        """Every row sees all keys."""

    def final_after(self, state: SlotState) -> Array:
        """Nothing is final while any token of the canvas may change."""
        return state.final


@dataclasses.dataclass(frozen=True)
class BlockScope:
    """Steps of block-wise models.

    A step computes the positions that are not final yet, up to the end of the active block: while
    a prompt is long, one chunk of whole blocks of it (prefill); then the active block, and in its
    first step the block before it, whose tokens are decided and whose keys and values become final.
    A block thus costs no more steps than its masks need.

    If a block's first token is given by the block before it, two steps take the place of that one:
    the first ends with the block before, and decodes that token alone.

    With `Rule.SPECULATIVE` a block begins at the last decided token. One step drafts the rest, and
    the next one reads the block left to right: rows of tokens that it confirms are final.
    """

    blocks: BlockAttention
    #: Rows of a prompt that one step computes; rounded down to whole blocks, at least one.
    chunk: int

    def next_step(self, state: SlotState, first_masked: Array) -> SlotState:
        """The rows from the first one that is not final to the end of the chunk or block."""
        size = state.window_length
        start = state.origin + (state.block_start - state.origin) // size * size
        speculates = state.speculates
        start = np.where(speculates, np.maximum(first_masked - 1, state.canvas_start), start)
        end = np.minimum(start + size, state.canvas_end)
        opens = np.zeros_like(state.refresh)
        if self.blocks.first_token_given:
            opens = (first_masked == start) & (start > 0)
        goal = np.where(opens, start, end)
        cached = state.cache != int(CachePolicy.NONE)
        # Chunks end at multiples of one length, wherever they begin, and do not depend on other
        # requests: nor do their sums, to the last bit.
        chunk = np.maximum(self.chunk // size, 1) * size
        whole = ~cached | (goal - state.final <= chunk)
        next_edge = np.minimum((state.final // chunk + 1) * chunk, start)
        row_end = np.where(whole, goal, next_edge)
        return state._replace(
            refresh=~cached,
            store=np.zeros_like(cached),
            window_start=np.where(speculates & state.verifies & ~opens, end, start),
            window_end=end,
            first_row=state.final,
            num_rows=row_end - state.final,
            keep=np.zeros_like(start),
            kv_lens=row_end,
            decodes=whole,
            opens=opens,
        )

    def key_limits(self, state: SlotState, owner: Array, positions: Array) -> Array | None:
        """Rows of the active block see it to its end; rows before it their block, or themselves.

        None if every row of the step belongs to an active block.
        """
        if (state.first_row >= state.window_start).all():
            return None
        if self.blocks.prompt_causal:
            limits = positions + 1
        else:
            size, origin = state.window_length[owner], state.origin[owner]
            limits = origin + ((positions - origin) // size + 1) * size
        active = positions >= state.window_start[owner]
        return np.where(active, state.window_end[owner], limits)

    def final_after(self, state: SlotState) -> Array:
        """All computed rows before the active block; with `none`, nothing is kept."""
        computed = np.minimum(state.first_row + state.num_rows, state.window_start)
        return np.where(state.refresh, 0, computed)
