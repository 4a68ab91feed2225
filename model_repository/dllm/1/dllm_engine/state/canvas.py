"""Holds the state of all running requests as arrays on the host, one row ("slot") per request.

A step is planned and committed for all requests with the same few array operations, however many
requests there are. The device receives a step's inputs and returns the decoded tokens
(docs/decisions/023).
"""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from dllm_engine.config import EngineConfig
from dllm_engine.decoding import Rule
from dllm_engine.memory.cache_policy import CachePolicy, delayed_rows
from dllm_engine.models.base import BlockAttention, ModelSpec
from dllm_engine.ops.transfer import Array
from dllm_engine.request import LogProbs, Prompt
from dllm_engine.sampling.credit import CreditLists
from dllm_engine.sampling.schedule import dream_chances, dream_count, linear_count
from dllm_engine.sampling_params import SamplingParams
from dllm_engine.state.forms import Forms
from dllm_engine.state.scope import BlockScope, CanvasScope, StepScope
from dllm_engine.state.slots import SlotState, SlotTable
from dllm_engine.state.step_plan import Blocks, LogProbPlan, Sequences, StepPlan
from dllm_engine.structured.token_automaton import TokenAutomaton


@dataclasses.dataclass(frozen=True)
class StepResult:
    """The outcome of a step for each of its requests."""

    slots: list[int]
    #: Whether no mask is left in the answer.
    complete: list[bool]
    #: Tokens from the left that are final, short of an end-of-text token.
    num_ready: list[int]
    #: Whether an end-of-text token is committed with nothing masked before it; of a block-wise
    #: model, nor in its block.
    ended: list[bool]
    #: Rows of one sequence in the next step, and whether it is a Refresh.
    next_rows: list[int]
    next_is_refresh: list[bool]
    #: Whether a confidence is NaN or infinite: the model's logits were.
    not_finite: list[bool]
    #: Positions from the left whose stored keys and values are final; 0 unless block-wise.
    final: list[int]
    #: Positions from the left that the next step stores or reads.
    next_end: list[int]
    #: By slot, what the requests that read have read (`CanvasUpdate.read`).
    read: dict[int, Array] = dataclasses.field(default_factory=dict)


class Canvas(NamedTuple):
    """One request's canvas, by position: [gen_length]."""

    #: int32.
    tokens: Array
    #: float32; −1 where masked.
    confidence: Array
    #: int32; the step that committed the position, from 1; 0 where given, −1 where masked.
    reveal_steps: Array
    #: None unless the request asks.
    log_probs: LogProbs | None = None

    @classmethod
    def empty(cls, gen_length: int, mask: int) -> Canvas:
        """Make a canvas of masks."""
        nothing = np.full(gen_length, -1, np.int32)
        return cls(np.full_like(nothing, mask), nothing.astype(np.float32), nothing)


#: Tokens of the longest block of a block-wise model; the published ones have 4 to 64.
LONGEST_BLOCK = 256
#: Bytes per position of a sequence, and of a canvas, in a `CanvasTable`.
_SEQUENCE_BYTES, _CANVAS_BYTES = 8 + 1 + 4, 1 + 1 + 4 + 4
#: Positions that the table of a block-wise model begins with; it grows with its requests.
_FIRST_LENGTH = 1024


class CanvasTable:
    """The sequences in `num_slots` slots, of up to `max_len` tokens, and their denoising state.

    Canvases, and so blocks, are at most `max_canvas` long. Arrays by canvas begin with its first
    position, wherever in the sequence that is.

    Args:
        blocks: None: every token sees every other one, and a block is at most as long as a canvas.
        chunk: rows of a prompt that a step of a block-wise model computes.
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
        blocks: BlockAttention | None = None,
        chunk: int = 0,
    ) -> None:
        self.mask, self.shifted = mask, shifted
        self._stop = stop
        self._device = device
        self._blocks = blocks
        self._scope: StepScope
        max_block = max_canvas
        if blocks is None:
            self._scope = CanvasScope(shifted, self._count_delayed)
        else:
            self._scope = BlockScope(blocks, chunk)
            max_block = LONGEST_BLOCK
            # A canvas is whole blocks: some positions are behind the answer.
            max_canvas = min(max_canvas + 2 * LONGEST_BLOCK, max_len)
        self._num_slots, self._max_len, self._max_canvas = num_slots, max_len, max_canvas
        #: [slots, length] int64; prompt, canvas, suffix; the mask token where masked.
        self.tokens = np.zeros((num_slots, 0), np.int64)
        #: [slots, length] bool; positions given by the request.
        self.given = np.zeros((num_slots, 0), np.bool_)
        #: [slots, canvas] bool; positions still to be decoded. Not derived from the tokens: a
        #: mask token in a prompt is just a token.
        self._masked = np.zeros((num_slots, 0), np.bool_)
        #: [slots, canvas] bool; positions that the previous step committed.
        self._last_committed = np.zeros((num_slots, 0), np.bool_)
        #: [slots, canvas] float32; probability at commit, −1 elsewhere.
        self._confidence = np.zeros((num_slots, 0), np.float32)
        #: [slots, canvas] int32; see `Canvas.reveal_steps`.
        self._reveal_steps = np.zeros((num_slots, 0), np.int32)
        #: By slot, of the requests that ask for them.
        self._log_probs: dict[int, LogProbs] = {}
        #: [slots, length] float32; Dream's share of the masks for each step of the schedule.
        self._chance = np.zeros((num_slots, 0), np.float32)
        self._slots = SlotTable(num_slots)
        #: Structured outputs.
        self._forms = Forms()
        #: By slot, `Prompt.reads` of the requests that read.
        self._reads: dict[int, Array] = {}
        #: Credit of the active blocks; on the device.
        self.credits = CreditLists(num_slots, max_block, device)
        if blocks is None:
            self._grow(max_len, max_canvas)
        else:
            self._grow(_FIRST_LENGTH, _FIRST_LENGTH)

    @classmethod
    def of(
        cls,
        config: EngineConfig,
        spec: ModelSpec,
        stop_token_ids: tuple[int, ...],
        *,
        device: str,
        chunk: int,
    ) -> CanvasTable:
        """Make a table for all requests that `config` allows, of the longest length allowed."""
        longest = spec.max_model_len
        return cls(
            config.max_num_seqs,
            longest,
            min(config.max_gen_length or longest, longest),
            mask=spec.mask_token_id,
            stop=np.array(stop_token_ids, np.int64),
            shifted=spec.shifted,
            device=device,
            blocks=spec.blocks,
            chunk=chunk,
        )

    @property
    def num_bytes(self) -> int:
        """Device memory of the table once it holds the longest requests in all slots."""
        if self._device != "cpu":
            return self.credits.num_bytes
        by_slot = self._max_len * _SEQUENCE_BYTES + self._max_canvas * _CANVAS_BYTES
        return self.credits.num_bytes + self._num_slots * by_slot + self._slots.num_bytes

    def _grow(self, length: int, canvas: int) -> None:
        """Make the rows long enough for a sequence and a canvas of these lengths."""
        for name, wanted, most in (
            ("tokens", length, self._max_len),
            ("given", length, self._max_len),
            ("_chance", length, self._max_len),
            ("_masked", canvas, self._max_canvas),
            ("_last_committed", canvas, self._max_canvas),
            ("_confidence", canvas, self._max_canvas),
            ("_reveal_steps", canvas, self._max_canvas),
        ):
            old: Array = getattr(self, name)
            if wanted > old.shape[1]:
                wider = np.zeros((len(old), min(most, max(wanted, 2 * old.shape[1]))), old.dtype)
                wider[:, : old.shape[1]] = old
                setattr(self, name, wider)

    def fill(
        self,
        slot: int,
        prompt: Prompt,
        params: SamplingParams,
        num_cached: int = 0,
        form: TokenAutomaton | None = None,
    ) -> tuple[int, bool]:
        """Set up the canvas of a new request in `slot`; `params` must be resolved.

        Args:
            num_cached: positions from the left whose keys and values are stored and final.
            form: which tokens its text may have; None: any.

        Returns:
            Rows of one sequence in its first step, and whether that is a Refresh.
        """
        self._slots.fill(slot, prompt, params, self._blocks)
        self._reads.pop(slot, None)
        if prompt.reads is not None:
            self._reads[slot] = prompt.reads
        state = self._slots.read(np.array([slot]))
        start, end, length = (
            int(column[0]) for column in (state.canvas_start, state.canvas_end, state.length)
        )
        size = end - start
        self._grow(length, size)
        canvas = prompt.canvas_ids or [self.mask] * params.gen_length
        canvas = canvas + [self.mask] * (size - len(canvas))
        everything = np.array([*prompt.ids, *canvas, *prompt.suffix_ids], np.int64)
        masked = everything[start:end] == self.mask
        self.tokens[slot, :length] = everything
        self.given[slot] = True
        self.given[slot, start:end] = ~masked
        self._masked[slot] = False
        self._masked[slot, :size] = masked
        self._last_committed[slot] = False
        self._confidence[slot] = -1.0
        self._reveal_steps[slot, :size] = np.where(masked, -1, 0)
        self._log_probs.pop(slot, None)
        if params.logprobs is not None:
            self._log_probs[slot] = LogProbs.empty(size, params.logprobs)
        if params.alg:
            chances = list(map(dream_chances, steps_of_blocks(params)))
            self._chance[slot, : params.steps] = np.concatenate(chances)
        self._forms.fill(slot, form, start, int(state.answer_end[0]))
        if form is not None:
            most = None
            if self._blocks is not None:
                # It has pages for its first block alone, which so must not be finished yet.
                origin, width = int(state.origin[0]), int(state.window_length[0])
                most = origin + ((start - origin) // width + 1) * width - 1
                most = min(most, int(state.answer_end[0]))
            self._fix([slot], most, begins=True)
        return self.rewind(slot, num_cached)

    def rewind(self, slot: int, num_cached: int) -> tuple[int, bool]:
        """Let only the first `num_cached` positions of a sequence count as stored and final.

        Returns:
            See `fill`.
        """
        state = self._slots.read(np.array([slot]))
        state, _ = self._prepare_step(state._replace(final=np.array([num_cached])))
        self._slots.change(state)
        return int(state.num_rows[0]), bool(state.refresh[0])

    def plan_step(self, slots: list[int], *, page_size: int | None = None) -> StepPlan:
        """Plan the next step of the requests in `slots`; all that the step needs of the canvases.

        A request with guidance adds its sequence twice, the second time with all given tokens
        masked (LLaDA, generate.py: `un_x`). In a shifted model each position is predicted from the
        one before it, and the first one from itself (Dream).

        Args:
            page_size: orders requests so that sequences of equal shape stand together; None: keeps
                the order of the slots.
        """
        state = self._slots.read(np.array(slots, np.int64))
        sequences = Sequences.of(state, self._delayed_rows, page_size)
        requests = sequences.requests
        blocks = self._masked_positions(requests)
        counts, chances = self._commit_counts(requests, blocks)
        predictor = self._predictors(requests, blocks)
        conditional = sequences.first_copy[blocks.request]
        rows = uncond_rows = sequences.row_of(conditional, predictor)
        if sequences.guided:
            unconditional = conditional + (requests.cfg_scale[blocks.request] > 0)
            uncond_rows = sequences.row_of(unconditional, predictor)
        looks_back = (requests.rule == int(Rule.LOCAL_LEAP)).any()
        owner = sequences.owner
        return StepPlan(
            sequences=sequences,
            key_limits=self._scope.key_limits(sequences.state, owner, sequences.positions),
            input_ids=self._input_ids(sequences),
            blocks=blocks,
            rows=rows,
            uncond_rows=uncond_rows,
            counts=counts,
            chances=chances,
            committed=self._block_confidence(requests) if looks_back else None,
            forms=self._forms.rows(requests, blocks, self.tokens, self._masked),
            read_tokens=self._read_tokens(requests, blocks) if self._reads else None,
            log_probs=_plan_log_probs(requests, blocks, counts) if self._log_probs else None,
        )

    def _read_tokens(self, state: SlotState, blocks: Blocks) -> Array | None:
        """The tokens to read at each masked position: [M, K] int64, −1 for none."""
        slots = state.slots.tolist()
        reads = [(i, self._reads[slot]) for i, slot in enumerate(slots) if slot in self._reads]
        if not reads:
            return None
        # Kernels are compiled for each width.
        width = 1 << (max(tokens.shape[1] for _, tokens in reads) - 1).bit_length()
        found = np.full((len(blocks.request), width), -1, np.int64)
        for request, tokens in reads:
            first, end = np.searchsorted(blocks.request, [request, request + 1])
            # Behind the answer of a block-wise model are masks that no one reads.
            count = min(end - first, len(tokens))
            found[first : first + count, : tokens.shape[1]] = tokens[:count]
        return found

    def _fix(self, slots: list[int], end: int | None = None, *, begins: bool = False) -> None:
        """Commit the tokens that the forms of these slots leave no choice of.

        Args:
            end: see `Forms.fix`.
            begins: before the first step.
        """
        for slot in self._forms.holds(slots):
            state = self._slots.read(np.array([slot]))
            start, first_end = int(state.canvas_start[0]), int(state.first_end[0])
            before = self._masked[slot].copy()
            self._forms.fix(slot, self.tokens[slot], self._masked[slot], start, end)
            places = (before & ~self._masked[slot]).nonzero()[0]
            self._confidence[slot, places] = 1.0
            if (kept := self._log_probs.get(slot)) is not None:
                kept.chosen[places] = 0.0  # as certain as its confidence says: there is no other
            self._reveal_steps[slot, places] = 0 if begins else int(state.steps_run[0]) + 1
            self._last_committed[slot, places] = True
            tokens = self.tokens[slot, start + places]
            ends = places[(tokens[:, None] == self._stop).any(axis=1)]
            if len(ends) and state.honours_eos[0]:
                first_end = min(first_end, start + int(ends[0]))
                self._slots.change(state._replace(first_end=np.array([first_end])))

    def _predictors(self, state: SlotState, blocks: Blocks) -> Array:
        """The position whose hidden state predicts each masked one: int64 [M]."""
        if self._blocks is None:
            return np.asarray(np.maximum(blocks.positions - self.shifted, 0))
        shifts = self._blocks.shift_in_block | state.opens | state.verifies
        return np.asarray(blocks.positions - shifts[blocks.request])

    def _input_ids(self, sequences: Sequences) -> Array:
        slots, positions = sequences.state.slots[sequences.owner], sequences.positions
        ids: Array = self.tokens[slots, positions]
        if sequences.guided:
            hidden = (sequences.uncond[sequences.owner] == 1) & self.given[slots, positions]
            ids[hidden] = self.mask
        return ids

    def _delayed_rows(self, state: SlotState) -> Array:
        """What `delayed` computes of the windows (see `cache_policy`): bool [R, width + 1].

        The first column is the position before the block; it is true only if there is one.
        """
        inside, place = _block_places(state, before=1, behind=1)
        slots = state.slots[:, None]
        # The position behind the block is predicted by the block's last one.
        exists = (place >= 0) & (place < (state.canvas_end - state.canvas_start)[:, None])
        masked = exists & self._masked[slots, np.where(exists, place, 0)]
        recent = inside & self._last_committed[slots, np.where(inside, place, 0)]
        found = delayed_rows(masked, recent, shifted=self.shifted)
        found &= inside
        if self.shifted:
            found[:, 0] = (state.block_start > 0) & masked[:, 1]
        return found[:, :-1]

    def _count_delayed(self, state: SlotState) -> Array:
        count: Array = self._delayed_rows(state).sum(axis=1)
        return count

    def _masked_positions(self, state: SlotState) -> Blocks:
        inside, place = _block_places(state)
        masked = inside & self._masked[state.slots[:, None], np.where(inside, place, 0)]
        if self._blocks is not None:
            masked &= state.decodes[:, None]
            masked[:, 1:] &= ~state.opens[:, None]
        request, column = masked.nonzero()
        return Blocks(
            masked=masked,
            request=request,
            column=column,
            index=request * masked.shape[1] + column,
            slots=state.slots[request],
            positions=state.block_start[request] + column,
        )

    def _block_confidence(self, state: SlotState) -> Array:
        """Confidences at commit in the active blocks: float32 [R, width], −1 where masked."""
        inside, place = _block_places(state)
        known = self._confidence[state.slots[:, None], np.where(inside, place, 0)]
        return np.where(inside, known, np.float32(-1.0))

    def _commit_counts(self, state: SlotState, blocks: Blocks) -> tuple[Array, Array]:
        """How many positions the schedules commit now: counts int64 and Dream's chances, [R].

        The chances are used only for requests with Dream's statistics.
        """
        linear = linear_count(state.block_masks, state.block_steps, state.block_step)
        if self._blocks is not None:
            one = state.opens
            if not self._blocks.floor_is_schedule:
                one = one | (state.rule == int(Rule.DYNAMIC))
            linear = np.where(one, 1, linear)
        if not state.dream_statistics.any():
            return linear, np.zeros(len(linear), np.float32)
        # With a threshold a request may run longer than its schedule; its chances are unused.
        place = state.block_first_step + state.block_step
        chance = self._chance[state.slots, np.minimum(place, self._chance.shape[1] - 1)]
        dream = dream_count(blocks.masked.sum(axis=1), chance)
        return np.where(state.dream_statistics, dream, linear), chance

    def advance(
        self,
        plan: StepPlan,
        tokens: Array,
        confidence: Array,
        log_probs: Array | None = None,
        read: Array | None = None,
    ) -> StepResult:
        """Commit what the planned step decoded, and open the next block where one is done.

        Args:
            tokens: int [M]; the token of each masked position, −1 where it stays masked.
            confidence: float32 [M]; the probability it is committed with.
            log_probs: float32 [P, 1 + 2K]; of the positions that the plan asks for and the step
                decodes, in their order: the token's log-probability, those of its alternatives,
                and the bits of the alternatives' int32 tokens.
            read: float32 [M, K]; log-probabilities of `StepPlan.read_tokens`.
        """
        state, blocks = plan.sequences.requests, plan.blocks
        found = {} if read is None else self._take_read(state, blocks, read)
        if found:
            tokens = np.where(np.isin(blocks.slots, list(found)), -1, tokens)
        not_finite = np.zeros(len(state.slots), np.bool_)
        not_finite[blocks.request[~np.isfinite(confidence)]] = True
        picked = tokens >= 0
        number = None
        if log_probs is not None and plan.log_probs is not None:
            number = np.where(asked := plan.log_probs.asks & picked, np.cumsum(asked) - 1, -1)
        final = self._scope.final_after(state)
        if (speculates := state.speculates & state.decodes & ~state.opens).any():
            kept, final = self._check_drafts(state, blocks, tokens, speculates, final)
            picked &= kept
        slots, positions, tokens = blocks.slots[picked], blocks.positions[picked], tokens[picked]
        request = blocks.request[picked]
        places = positions - state.canvas_start[request]
        if (state.cache == int(CachePolicy.DELAYED)).any():
            self._last_committed[state.slots] = False
            self._last_committed[slots, places] = True
        self._masked[slots, places] = False
        self._confidence[slots, places] = confidence[picked]
        self._reveal_steps[slots, places] = state.steps_run[request] + 1
        if log_probs is not None and number is not None:
            self._note_log_probs(slots, places, number[picked], log_probs)
        self.tokens[slots, positions] = tokens
        first_end = state.first_end.copy()
        ends = (tokens[:, None] == self._stop).any(axis=1) & state.honours_eos[request]
        np.minimum.at(first_end, request[ends], positions[ends])
        if self._forms.holds(state.slots.tolist()):
            self._slots.change(state._replace(first_end=first_end))
            self._fix(state.slots.tolist())
            first_end = self._slots.read(state.slots).first_end
        # What opens a block, and what prefills a prompt, is no step of a block's schedule.
        counts = state.decodes & ~state.opens
        state, first_masked = self._prepare_step(
            state._replace(
                # Noise depends on it, so that of a prompt in any chunks, or cached, is the same.
                step=state.step + state.decodes,
                steps_run=state.steps_run + 1,
                block_step=state.block_step + counts,
                block_age=state.block_age + counts,
                first_end=first_end,
                final=final,
                verifies=state.verifies ^ speculates,
            )
        )
        self._slots.change(state)
        return StepResult(
            state.slots.tolist(),
            (first_masked >= state.answer_end).tolist(),
            (self._num_ready(state, first_masked)).tolist(),
            self._ended(state, first_masked).tolist(),
            state.num_rows.tolist(),
            state.refresh.tolist(),
            not_finite.tolist(),
            state.final.tolist(),
            state.kv_lens.tolist(),
            found,
        )

    def _take_read(self, state: SlotState, blocks: Blocks, read: Array) -> dict[int, Array]:
        """What each reading request has read, by slot; those that still prefill are left out."""
        found = {}
        for request, slot in enumerate(state.slots.tolist()):
            first, end = np.searchsorted(blocks.request, [request, request + 1])
            if slot in self._reads and end > first:
                count, width = self._reads[slot].shape
                found[slot] = read[first : first + count, :width].copy()
        return found

    def _note_log_probs(self, slots: Array, places: Array, number: Array, log_probs: Array) -> None:
        """Write the log-probabilities of committed positions.

        Args:
            slots, places, number: [n]; where, and the row of `log_probs`; −1 for none.
        """
        most = log_probs.shape[1] // 2
        values, tokens = log_probs[:, : 1 + most], log_probs[:, 1 + most :].view(np.int32)
        for slot in np.unique(slots[number >= 0]).tolist():
            kept, mine = self._log_probs[slot], (slots == slot) & (number >= 0)
            rows, where = number[mine], places[mine]
            count = min(kept.top.shape[1], most)
            kept.chosen[where] = values[rows, 0]
            kept.top[where, :count] = values[rows, 1 : 1 + count]
            kept.top_tokens[where, :count] = tokens[rows, :count]

    def _check_drafts(
        self, state: SlotState, blocks: Blocks, tokens: Array, speculates: Array, final: Array
    ) -> tuple[Array, Array]:
        """Write drafted blocks to the canvas, and find how much of the checked ones is right.

        A checked token is right if all drafted tokens before it are what was found for them.

        Args:
            tokens: [M]; what was found for each masked position.
            speculates: [R] bool; requests of which this step drafted or checked a block.
            final: [R]; see `SlotState`; that of checked blocks is found here.

        Returns:
            [M] bool, which tokens to commit; and [R], `final`.
        """
        checks = speculates & state.verifies
        request, slots, positions = blocks.request, blocks.slots, blocks.positions
        confirmed = np.ones_like(blocks.masked)
        confirmed[request, blocks.column] = self.tokens[slots, positions] == tokens
        before = np.logical_and.accumulate(confirmed, axis=1)
        before = np.roll(before, 1, axis=1)
        before[:, 0] = True
        kept = np.where(speculates, checks, True)[request]
        kept &= ~checks[request] | before[request, blocks.column]
        drafted = (speculates & ~checks)[request]
        self.tokens[slots[drafted], positions[drafted]] = tokens[drafted]
        # The last token's own row was computed with the draft in its place.
        last = np.zeros_like(final)
        np.maximum.at(last, request[kept], positions[kept])
        return kept, np.where(checks & ~state.refresh, last, final)

    def _num_ready(self, state: SlotState, first_masked: Array) -> Array:
        end = np.minimum(np.minimum(first_masked, state.first_end), state.answer_end)
        ready: Array = end - state.canvas_start
        return ready

    def _ended(self, state: SlotState, first_masked: Array) -> Array:
        """Whether the answer's end is decided: bool [R]."""
        decided = np.minimum(state.first_end + 1, state.answer_end)
        if self._blocks is not None:  # and the rest of its block
            size, origin = np.where(state.speculates, 1, state.window_length), state.origin
            block_end = origin + ((state.first_end - origin) // size + 1) * size
            decided = np.minimum(block_end, state.answer_end)
        ended: Array = (state.first_end < state.answer_end) & (first_masked >= decided)
        return ended

    def canvas(self, slot: int) -> Canvas:
        """A copy of the canvas in `slot`."""
        state = self._slots.read(np.array([slot]))
        start, end = int(state.canvas_start[0]), int(state.answer_end[0])
        confidence = self._confidence[slot, : end - start].copy()
        tokens = self.tokens[slot, start:end].astype(np.int32)
        tokens[self._masked[slot, : end - start]] = self.mask  # a draft is not shown
        steps, log_probs = self._reveal_steps[slot, : end - start].copy(), None
        if (kept := self._log_probs.get(slot)) is not None:
            log_probs = kept.beginning(end - start)
        return Canvas(tokens, confidence, steps, log_probs)

    def _first_masked(self, state: SlotState) -> Array:
        """Find the first masked position, the canvas's end if there is none: int64 [R].

        Nothing before the active block is masked.
        """
        width = 2 * int(state.block_length.max())
        masked = self._masked_between(state, state.block_start, state.block_start + width)
        some = masked.any(axis=1)
        found = np.where(some, state.block_start + masked.argmax(axis=1), state.canvas_end)
        if not some.all():  # also looks behind the next block, which may be given
            rest = (~some).nonzero()[0]
            slots, start = state.slots[rest], state.canvas_start[rest]
            masked = self._masked[slots, : int((state.canvas_end[rest] - start).max())]
            place = start + masked.argmax(axis=1)
            found[rest] = np.where(masked.any(axis=1), place, state.canvas_end[rest])
        return found

    def _masked_between(self, state: SlotState, start: Array, end: Array) -> Array:
        """Which positions from `start` to before `end`, on the canvas, are masked: bool [R, n]."""
        place = (start - state.canvas_start)[:, None] + np.arange(int((end - start).max()))
        inside = place < (np.minimum(end, state.canvas_end) - state.canvas_start)[:, None]
        masked: Array = inside & self._masked[state.slots[:, None], np.where(inside, place, 0)]
        return masked

    def _prepare_step(self, state: SlotState) -> tuple[SlotState, Array]:
        """Open the next block where one is done, and determine what the next step does.

        Returns:
            See `_enter_block`.
        """
        state, first_masked = self._enter_block(state)
        if (moves := state.speculates & (first_masked > state.canvas_start)).any():
            end = np.minimum(first_masked + state.window_length - 1, state.canvas_end)
            state = state._replace(
                block_start=np.where(moves, first_masked, state.block_start),
                block_end=np.where(moves, end, state.block_end),
            )
        return self._scope.next_step(state, first_masked), first_masked

    def _enter_block(self, state: SlotState) -> tuple[SlotState, Array]:
        """Move each request whose block holds no mask to its next block that holds one.

        Blocks and their shares of the steps are those of `steps_of_blocks`.

        Returns:
            The new state; int64 [R]: the position of the first mask, the canvas's end if there is
            none.
        """
        first, canvas_end = state.canvas_start, state.canvas_end
        first_masked = self._first_masked(state)
        opens = (first_masked >= state.block_end) & (first_masked < canvas_end)
        if opens.any():
            size, origin = state.window_length, state.origin
            window = origin + (first_masked - origin) // size * size
            length = state.block_length
            start = window + (first_masked - window) // length * length
            end = np.minimum(np.minimum(start + length, window + size), canvas_end)
            # Of a block that begins in the prompt the rest.
            start = np.where(opens, np.maximum(start, first), state.block_start)
            end = np.where(opens, end, state.block_end)
            before = (start - first) * state.steps // (canvas_end - first)
            after = (end - first) * state.steps // (canvas_end - first)
            steps, masks = after - before, self._masked_between(state, start, end).sum(axis=1)
            if (blocks := self._blocks) is not None:
                steps = state.steps_per_block
                if blocks.floor_is_schedule:
                    masks = state.block_length
                elif blocks.first_token_given:  # and is decoded before the schedule begins
                    masks = masks - (first_masked == window)
            state = state._replace(
                block_step=np.where(opens, 0, state.block_step),
                block_steps=np.where(opens, steps, state.block_steps),
                block_masks=np.where(opens, masks, state.block_masks),
                block_first_step=np.where(opens, before, state.block_first_step),
                block_age=np.where(opens, 0, state.block_age),
                block_start=start,
                block_end=end,
            )
        if state.has_empty_steps.any():
            state = self._skip_empty_steps(state)
        return state, first_masked

    def _skip_empty_steps(self, state: SlotState) -> SlotState:
        """Skip steps in which Dream's schedule commits nothing: they need no forward pass.

        A block's last step commits all masks that are left, so the search always succeeds.
        """
        num_masked = self._masked_positions(state).masked.sum(axis=1)
        chance = self._chance[state.slots]
        places = np.arange(chance.shape[1])
        place = state.block_first_step + state.block_step
        commits = dream_count(num_masked[:, None], chance) > 0
        later = commits & (places >= place[:, None])
        found = np.where(later.any(axis=1), later.argmax(axis=1), chance.shape[1])
        skipped = np.where(state.has_empty_steps & (num_masked > 0), found - place, 0)
        return state._replace(step=state.step + skipped, block_step=state.block_step + skipped)


def _plan_log_probs(state: SlotState, blocks: Blocks, counts: Array) -> LogProbPlan | None:
    """Find the masked positions whose requests ask, and bound how many of them are committed."""
    asks = state.logprobs >= 0
    if not asks.any():
        return None
    most = blocks.masked.sum(axis=1)
    most = np.where(state.rule == int(Rule.COUNT), np.minimum(counts, most), most)
    count = int(most[asks].sum())
    if not count:
        return None
    return LogProbPlan(asks[blocks.request], count, bool((state.logprobs > 0).any()))


def _block_places(state: SlotState, before: int = 0, behind: int = 0) -> tuple[Array, Array]:
    """Locate the columns of the blocks: whether inside the block, and where on the canvas.

    Returns:
        bool and int64, both [R, before + longest block + behind].
    """
    columns = np.arange(-before, int(state.block_length.max()) + behind)
    inside = (columns >= 0) & (columns < (state.block_end - state.block_start)[:, None])
    return inside, (state.block_start - state.canvas_start)[:, None] + columns


def steps_of_blocks(params: SamplingParams) -> list[int]:
    """List the steps of each block of a canvas; `params` must be resolved.

    Steps are spread evenly over the canvas: each of equal blocks gets steps / blocks, as in the
    reference, and a shorter last block gets a smaller share.
    """
    length, block_length, steps = params.gen_length, params.block_length, params.steps
    assert block_length is not None
    assert steps is not None
    ends = [*range(0, length, block_length), length]
    return [end * steps // length - start * steps // length for start, end in pairwise(ends)]
