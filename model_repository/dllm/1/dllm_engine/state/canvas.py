"""The state of every running request, as arrays on the host: one row ("slot") per request.

Canvases, masks, schedules and parameters lie side by side so that a step is planned and committed
for all requests with the same few operations, however many there are. The device is sent what a
step is made of and says what it has decoded (docs/decisions/023).
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np

from dllm_engine.config import EngineConfig
from dllm_engine.memory import Phases, unfinished
from dllm_engine.models import ModelSpec
from dllm_engine.ops import Array
from dllm_engine.request import Prompt
from dllm_engine.sampling import CreditLists
from dllm_engine.sampling.schedule import dream_chances, dream_count, linear_count
from dllm_engine.sampling_params import SamplingParams
from dllm_engine.state.slots import SlotState, SlotTable


@dataclasses.dataclass(frozen=True)
class StepResult:
    """What has become of each stepped request."""

    slots: list[int]
    #: Whether no mask is left in the canvas.
    complete: list[bool]
    #: Tokens from the left that are final, short of an end-of-text token.
    num_ready: list[int]
    #: Whether an end-of-text token is committed with nothing masked before it.
    ended: list[bool]
    #: Rows of the next step, of one sequence, and whether it is a Refresh.
    next_rows: list[int]
    next_is_refresh: list[bool]
    #: Whether a confidence is NaN or infinite: the model's logits were.
    not_finite: list[bool]


class Canvas(NamedTuple):
    """What stands on one request's canvas: [gen_length] int32 and float32."""

    tokens: Array
    #: −1 where masked.
    confidence: Array

    @classmethod
    def empty(cls, gen_length: int, mask: int) -> Canvas:
        """Nothing but masks."""
        return cls(np.full(gen_length, mask, np.int32), np.full(gen_length, -1.0, np.float32))


@dataclasses.dataclass(frozen=True)
class Blocks:
    """The active blocks of R requests, and the M positions that are masked in them.

    Those are in row-major order of the [R, width] matrix of blocks; all int64 unless said
    otherwise.
    """

    #: [R, width] bool.
    masked: Array
    #: [M]; request, and where in its block it stands; place in the matrix.
    request: Array
    column: Array
    index: Array
    #: [M]; slot, and position in the sequence.
    slots: Array
    positions: Array


class CanvasTable:
    """`num_slots` sequences of up to `max_len` tokens and what their denoising needs.

    Canvases, and so blocks, are no longer than `max_canvas`. All arrays by canvas begin with its
    first position, wherever in the sequence that is.
    """

    def __init__(
        self,
        num_slots: int,
        max_len: int,
        max_canvas: int,
        *,
        mask: int,
        stop: Array,
        shifted: bool,
        device: str,
    ) -> None:
        self.mask, self.shifted = mask, shifted
        self._stop = stop
        self._device = device

        def by_canvas(value: float, dtype: type) -> Array:
            return np.full((num_slots, max_canvas), value, dtype)

        #: [slots, max_len] int64; prompt, canvas, suffix; the mask token where masked.
        self.tokens = np.zeros((num_slots, max_len), np.int64)
        #: [slots, max_len] bool; positions that the request came with.
        self.given = np.zeros((num_slots, max_len), np.bool_)
        #: [slots, max_canvas] bool; positions still to be decoded. Not read off the tokens, so
        #: that a mask token in a prompt stays what it is.
        self._masked = by_canvas(False, np.bool_)
        #: [slots, max_canvas] bool; positions that the step before committed.
        self._recent = by_canvas(False, np.bool_)
        #: [slots, max_canvas] bool; committed tokens that end the request.
        self._ends = by_canvas(False, np.bool_)
        #: [slots, max_canvas] float32; probability at commit, −1 elsewhere.
        self._confidence = by_canvas(-1.0, np.float32)
        #: [slots, max_len] float32; Dream's share of the masks for each step of the schedule.
        self._chance = np.zeros((num_slots, max_len), np.float32)
        self._slots = SlotTable(num_slots)
        #: Credit of the active blocks, on the device.
        self.credits = CreditLists(num_slots, max_canvas, device)

    @classmethod
    def of(
        cls, config: EngineConfig, spec: ModelSpec, stop_token_ids: tuple[int, ...], *, device: str
    ) -> CanvasTable:
        """For as many requests as `config` lets run, as long as it and the model let them be."""
        longest = spec.max_model_len
        return cls(
            config.max_num_seqs,
            longest,
            min(config.max_gen_length or longest, longest),
            mask=spec.mask_token_id,
            stop=np.array(stop_token_ids, np.int64),
            shifted=spec.shifted,
            device=device,
        )

    @property
    def num_bytes(self) -> int:
        """Device memory of the table, whatever runs: nothing is added later."""
        if self._device != "cpu":
            return self.credits.num_bytes
        by_slot = (self.tokens, self.given, self._masked, self._recent, self._ends)
        here = sum(each.nbytes for each in (*by_slot, self._confidence, self._chance))
        return self.credits.num_bytes + here + self._slots.num_bytes

    def fill(self, slot: int, prompt: Prompt, params: SamplingParams) -> None:
        """Lay out a new request in `slot`; `params` must be resolved."""
        canvas = prompt.canvas_ids or [self.mask] * params.gen_length
        everything = np.array([*prompt.ids, *canvas, *prompt.suffix_ids], np.int64)
        start, length = len(prompt.ids), params.gen_length
        masked = everything[start : start + length] == self.mask
        self.tokens[slot, : len(everything)] = everything
        self.given[slot] = True
        self.given[slot, start : start + length] = ~masked
        self._masked[slot] = False
        self._masked[slot, :length] = masked
        self._recent[slot] = False
        self._ends[slot] = False
        self._confidence[slot] = -1.0
        if params.alg:
            chances = [dream_chances(steps) for _, _, steps in blocks_of(params)]
            self._chance[slot, : params.steps] = np.concatenate(chances)
        self._slots.fill(slot, prompt, params)
        state, _ = self._enter_block(self.state([slot]))
        self._slots.change(state)

    def state(self, slots: list[int]) -> SlotState:
        """The numbers of the requests in `slots`."""
        return self._slots.read(np.array(slots, np.int64))

    def phases(self, state: SlotState) -> Phases:
        """What the next step of these requests is."""
        return Phases.of(state.cache, state.block_age, state.delay_steps, state.refresh_interval)

    def window(self, state: SlotState) -> tuple[Array, Array]:
        """First position and end of the active blocks' windows (see `cache.policy`), [R]."""
        start = state.block_start
        return (np.maximum(start - 1, 0) if self.shifted else start), state.block_end

    def unfinished(self, state: SlotState) -> Array:
        """What `delayed` computes of the windows (see `cache.policy`): bool [R, width + 1].

        The first column is the position before the block, which there must be if it is true.
        """
        inside, place = _block_places(state, before=1, behind=1)
        slots = state.slots[:, None]
        # What is behind the block is predicted by its last position.
        exists = (place >= 0) & (place < (state.canvas_end - state.canvas_start)[:, None])
        masked = exists & self._masked[slots, np.where(exists, place, 0)]
        recent = inside & self._recent[slots, np.where(inside, place, 0)]
        found = unfinished(masked, recent, shifted=self.shifted)
        found &= inside
        if self.shifted:
            found[:, 0] = (state.block_start > 0) & masked[:, 1]
        return found[:, :-1]

    def blocks(self, state: SlotState) -> Blocks:
        """The active blocks of these requests."""
        inside, place = _block_places(state)
        masked = inside & self._masked[state.slots[:, None], np.where(inside, place, 0)]
        request, column = masked.nonzero()
        return Blocks(
            masked=masked,
            request=request,
            column=column,
            index=request * masked.shape[1] + column,
            slots=state.slots[request],
            positions=state.block_start[request] + column,
        )

    def block_confidence(self, state: SlotState) -> Array:
        """What the active blocks were committed with: float32 [R, width], −1 where they are not."""
        inside, place = _block_places(state)
        known = self._confidence[state.slots[:, None], np.where(inside, place, 0)]
        return np.where(inside, known, np.float32(-1.0))

    def commit_counts(self, state: SlotState, blocks: Blocks) -> tuple[Array, Array]:
        """What the schedules say for the step at hand: counts int64 and Dream's chances, [R].

        The chances mean nothing for a request without Dream's statistics.
        """
        linear = linear_count(state.block_masks, state.block_steps, state.block_step)
        if not state.dream_statistics.any():
            return linear, np.zeros(len(linear), np.float32)
        # A threshold may take more steps than the schedule has; its chances do not matter then.
        place = state.block_first_step + state.block_step
        chance = self._chance[state.slots, np.minimum(place, self._chance.shape[1] - 1)]
        dream = dream_count(blocks.masked.sum(axis=1), chance)
        return np.where(state.dream_statistics, dream, linear), chance

    def advance(
        self, state: SlotState, blocks: Blocks, tokens: Array, confidence: Array
    ) -> StepResult:
        """Commit what a step has decoded, and open the next block where one is done.

        Args:
            state, blocks: of the requests that took part, as they were before the step.
            tokens: int [M]; of each masked position the token, −1 where it stays masked.
            confidence: float32 [M]; what it is committed with.
        """
        not_finite = np.zeros(len(state.slots), np.bool_)
        not_finite[blocks.request[~np.isfinite(confidence)]] = True
        picked = tokens >= 0
        slots, positions, tokens = blocks.slots[picked], blocks.positions[picked], tokens[picked]
        places = positions - state.canvas_start[blocks.request[picked]]
        self._recent[state.slots] = False
        self._recent[slots, places] = True
        self._masked[slots, places] = False
        self._ends[slots, places] = (tokens[:, None] == self._stop).any(axis=1)
        self._confidence[slots, places] = confidence[picked]
        self.tokens[slots, positions] = tokens
        state, first_masked = self._enter_block(
            state._replace(
                step=state.step + 1,
                block_step=state.block_step + 1,
                block_age=state.block_age + 1,
            )
        )
        self._slots.change(state)
        first_end = self._first_end(state)
        phases = self.phases(state)
        return StepResult(
            state.slots.tolist(),
            (first_masked == state.canvas_end).tolist(),
            (np.minimum(first_masked, first_end) - state.canvas_start).tolist(),
            (first_end < first_masked).tolist(),
            self.num_rows(state, phases).tolist(),
            phases.refresh.tolist(),
            not_finite.tolist(),
        )

    def num_rows(self, state: SlotState, phases: Phases) -> Array:
        """Rows that go through the model in the next step, of one sequence: [R]."""
        start, end = phases.span(state.length, *self.window(state))
        partial = phases.partial
        if not partial.any():
            return end - start
        return np.where(partial, self.unfinished(state).sum(axis=1), end - start)

    def canvas(self, slot: int) -> Canvas:
        """A copy of the canvas in `slot`."""
        state = self._slots.read(np.array([slot]))
        start, end = int(state.canvas_start[0]), int(state.canvas_end[0])
        confidence = self._confidence[slot, : end - start].copy()
        return Canvas(self.tokens[slot, start:end].astype(np.int32), confidence)

    def _width(self, state: SlotState) -> int:
        return int((state.canvas_end - state.canvas_start).max())

    def _first_end(self, state: SlotState) -> Array:
        """Position of the first committed end-of-text token, the canvas's end where none is."""
        ends = self._ends[state.slots, : self._width(state)]
        ended = ends.any(axis=1) & state.honours_eos
        return np.where(ended, state.canvas_start + ends.argmax(axis=1), state.canvas_end)

    def _enter_block(self, state: SlotState) -> tuple[SlotState, Array]:
        """Move each request whose block holds no mask to its next block that holds one.

        Blocks and their shares of the steps are those of `blocks_of`.

        Returns:
            The state then; int64 [R]: position of the first mask, the canvas's end where there is
            none.
        """
        masked = self._masked[state.slots, : self._width(state)]
        first, canvas_end = state.canvas_start, state.canvas_end
        first_masked = np.where(masked.any(axis=1), first + masked.argmax(axis=1), canvas_end)
        opens = (first_masked >= state.block_end) & (first_masked < canvas_end)
        if opens.any():
            start = first + (first_masked - first) // state.block_length * state.block_length
            start = np.where(opens, start, state.block_start)
            end = np.minimum(start + state.block_length, canvas_end)
            columns = first[:, None] + np.arange(masked.shape[1])
            inside = (columns >= start[:, None]) & (columns < end[:, None])
            before = (start - first) * state.steps // (canvas_end - first)
            after = (end - first) * state.steps // (canvas_end - first)
            state = state._replace(
                block_step=np.where(opens, 0, state.block_step),
                block_steps=np.where(opens, after - before, state.block_steps),
                block_masks=np.where(opens, (masked & inside).sum(axis=1), state.block_masks),
                block_first_step=np.where(opens, before, state.block_first_step),
                block_age=np.where(opens, 0, state.block_age),
                block_start=start,
                block_end=np.where(opens, end, state.block_end),
            )
        if state.skips.any():
            state = self._skip_empty_steps(state)
        return state, first_masked

    def _skip_empty_steps(self, state: SlotState) -> SlotState:
        """Pass over steps in which Dream's schedule commits nothing: no forward pass is needed.

        A block's last step commits all that is left, so one is always found.
        """
        num_masked = self.blocks(state).masked.sum(axis=1)
        chance = self._chance[state.slots]
        places = np.arange(chance.shape[1])
        place = state.block_first_step + state.block_step
        commits = dream_count(num_masked[:, None], chance) > 0
        later = commits & (places >= place[:, None])
        found = np.where(later.any(axis=1), later.argmax(axis=1), chance.shape[1])
        skipped = np.where(state.skips & (num_masked > 0), found - place, 0)
        return state._replace(step=state.step + skipped, block_step=state.block_step + skipped)


def _block_places(state: SlotState, before: int = 0, behind: int = 0) -> tuple[Array, Array]:
    """Which columns of the blocks are in them, and where on the canvas all columns are.

    Returns:
        bool and int64, both [R, before + longest block + behind].
    """
    columns = np.arange(-before, int(state.block_length.max()) + behind)
    inside = (columns >= 0) & (columns < (state.block_end - state.block_start)[:, None])
    return inside, (state.block_start - state.canvas_start)[:, None] + columns


def blocks_of(params: SamplingParams) -> list[tuple[int, int, int]]:
    """(start, end, steps) of each block of a canvas; `params` must be resolved.

    A block's share of the steps is what falls into it when all are spread evenly over the canvas:
    exactly steps / blocks where the reference allows it (equal blocks), and a smaller share for a
    shorter last block.
    """
    length, block_length, steps = params.gen_length, params.block_length, params.steps
    assert block_length is not None
    assert steps is not None
    found = []
    for start in range(0, length, block_length):
        end = min(start + block_length, length)
        found.append((start, end, end * steps // length - start * steps // length))
    return found
