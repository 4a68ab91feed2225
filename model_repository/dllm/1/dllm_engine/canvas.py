"""The state of every running request, as tensors: one row ("slot") per request.

Canvases, masks, schedules and parameters lie side by side so that a step reads and commits all
requests with the same few tensor operations, however many there are.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor

from .cache.policy import ActiveState, CachePolicy, Phases
from .config import EngineConfig
from .decoding import Rule
from .models import ModelSpec
from .ops import upload
from .request import Prompt, SamplingParams
from .sampling import LISTED, Credits, SpecialTokens
from .sampling.commit import dream_chances, dream_count, linear_count
from .slot_facts import SlotFacts
from .slot_state import SlotState, SlotTable


@dataclasses.dataclass(frozen=True)
class StepResult:
    """What the host must know of each stepped request after a step."""

    slots: list[int]
    #: Whether no mask is left in the canvas.
    complete: list[bool]
    #: Tokens from the left that are final, short of an end-of-text token.
    num_ready: list[int]
    #: Whether an end-of-text token is committed with nothing masked before it.
    ended: list[bool]
    #: Rows of the next step, of one sequence, and whether it is a Refresh.
    next_rows: list[int]
    next_refresh: list[bool]


class Canvas(NamedTuple):
    """What stands on one request's canvas, on the CPU: [gen_length] int32 and float32."""

    tokens: Tensor
    #: −1 where masked.
    confidence: Tensor

    @classmethod
    def empty(cls, gen_length: int, mask: int) -> Canvas:
        """Nothing but masks."""
        tokens = torch.full((gen_length,), mask, dtype=torch.int32)
        return cls(tokens, torch.full((gen_length,), -1.0))


class CanvasTable:
    """`num_slots` sequences of up to `max_len` tokens and what their denoising needs.

    All integers are int64 unless said otherwise, all on `device`. Blocks are no longer than
    `max_block`.
    """

    def __init__(
        self,
        num_slots: int,
        max_len: int,
        max_block: int,
        *,
        special: SpecialTokens,
        shifted: bool,
        device: str,
    ) -> None:
        self.special = special
        self.shifted = shifted
        self.device = device
        #: [slots, max_len]; prompt, canvas, suffix; the mask token where masked.
        self.tokens = torch.zeros(num_slots, max_len, dtype=torch.int64, device=device)
        #: [slots, max_len] bool; positions still to be decoded. Not read off the tokens, so
        #: that a mask token in a prompt stays what it is.
        self.masked = torch.zeros(num_slots, max_len, dtype=torch.bool, device=device)
        #: [slots, max_len] bool; positions that the request came with.
        self.given = torch.zeros(num_slots, max_len, dtype=torch.bool, device=device)
        #: [slots, max_len]; probability at commit, −1 elsewhere.
        self.confidence = torch.zeros(num_slots, max_len, device=device)
        self._slots = SlotTable(num_slots, device)
        #: [slots, max_len] float32; Dream's share of the masks for each step of the schedule.
        self.chance = torch.zeros(num_slots, max_len, device=device)
        #: [slots, max_len] bool; positions that the step before committed.
        self.recent = torch.zeros(num_slots, max_len, dtype=torch.bool, device=device)
        #: [slots, max_block, listed] int32 and float32; credit in the active block. Of a block's
        #: first step, and of requests without credit, it means nothing and is never read.
        listed = (num_slots, max_block, LISTED)
        self._credit_tokens = torch.empty(listed, dtype=torch.int32, device=device)
        self._credit_values = torch.empty(listed, device=device)
        self._facts: dict[int, SlotFacts] = {}

    @classmethod
    def of(
        cls, config: EngineConfig, spec: ModelSpec, *, special: SpecialTokens, device: str
    ) -> CanvasTable:
        """For as many requests as `config` lets run, as long as it and the model let them be."""
        longest = spec.max_model_len
        block = min(config.max_gen_length or longest, longest)
        return cls(
            config.max_num_seqs,
            longest,
            block,
            special=special,
            shifted=spec.shifted,
            device=device,
        )

    @property
    def num_bytes(self) -> int:
        """Memory of the table, whatever runs: nothing is added later."""
        mine = sum(each.nbytes for each in vars(self).values() if isinstance(each, Tensor))
        return mine + self._slots.num_bytes

    def facts(self, slots: list[int]) -> list[SlotFacts]:
        """What the host knows of the requests in `slots`."""
        return [self._facts[slot] for slot in slots]

    def fill(self, slot: int, prompt: Prompt, params: SamplingParams) -> None:
        """Lay out a new request in `slot`; `params` must be resolved."""
        facts = self._facts[slot] = SlotFacts.of(prompt, params, self.special.mask)
        region = facts.canvas
        canvas = prompt.canvas_ids or [self.special.mask] * params.gen_length
        everything = torch.tensor([*prompt.ids, *canvas, *prompt.suffix_ids])
        self.tokens[slot, : facts.length] = upload(everything, self.device)
        self.masked[slot] = False
        self.masked[slot, region] = self.tokens[slot, region] == self.special.mask
        self.given[slot] = ~self.masked[slot]
        self.confidence[slot] = -1.0
        self.recent[slot] = False
        self._slots.fill(slot, _numbers(prompt, params, facts))
        if params.alg:
            chances = [dream_chances(steps) for _, _, steps in blocks_of(params)]
            self.chance[slot, : params.steps] = upload(torch.cat(chances), self.device)
        first = self.state([slot])
        self._slots.change(first.slots, self._enter_block(first, [slot])[0])

    def credits(self, chosen: list[int], state: SlotState, column: Tensor) -> Credits | None:
        """Credit of positions in active blocks; None where none of `chosen` uses any.

        Args:
            state: of each position's request, [M].
            column: [M]; where in its block it stands.
        """
        used = [slot for slot in chosen if self._facts[slot].uses_credit]
        if not used:
            return None
        uses = torch.zeros(len(self.tokens), dtype=torch.bool)
        uses[used] = True
        uses = upload(uses, self.device)[state.slots]
        # A block begins with none; what stands there is another block's.
        empty = (~uses | (state.block_age == 0)).unsqueeze(1)
        tokens = self._credit_tokens[state.slots, column].to(torch.int64)
        values = self._credit_values[state.slots, column]
        return Credits(uses, tokens.masked_fill_(empty, -1), values.masked_fill_(empty, 0.0))

    def keep_credits(self, slots: Tensor, column: Tensor, credits: Credits) -> None:
        """Write what `credits` has become; of slots that use none it means nothing."""
        self._credit_tokens[slots, column] = credits.tokens.to(torch.int32)
        self._credit_values[slots, column] = credits.values

    def state(self, slots: list[int]) -> SlotState:
        """The numbers of the requests in `slots`."""
        return self._slots.read(upload(slots, self.device))

    def phases(self, state: SlotState) -> Phases:
        """What the next step of these requests is."""
        return Phases.of(state.cache, state.block_age, state.delay_steps, state.refresh_interval)

    def window(self, state: SlotState) -> tuple[Tensor, Tensor]:
        """First position and end of the active blocks' windows (see `cache.policy`), [R]."""
        start = state.block_start
        return (start - 1).clamp(min=0) if self.shifted else start, state.block_end

    def active(self, state: SlotState, phases: Phases, width: int) -> Tensor:
        """Positions below `width` that go through the model in the next step: bool [R, width]."""
        start, end = self.window(state)
        return phases.active(
            ActiveState(
                state.length,
                start,
                end,
                self.masked[state.slots, :width],
                self.recent[state.slots, :width],
                self.shifted,
            )
        )

    def block_positions(self, state: SlotState, width: int) -> tuple[Tensor, Tensor]:
        """Positions of the active blocks, none longer than `width`; which are masked.

        Returns:
            int64 and bool, both [R, width]. Columns past the end of a shorter block repeat a
            valid position and are not masked.
        """
        start = state.block_start.unsqueeze(1)
        positions = start + torch.arange(width, device=self.device)
        inside = positions < state.block_end.unsqueeze(1)
        positions = torch.where(inside, positions, start)
        return positions, inside & self.masked[state.slots.unsqueeze(1), positions]

    def block_confidence(self, state: SlotState, positions: Tensor) -> Tensor:
        """What positions from `block_positions` were committed with: [R, width].

        −1 where they are masked, and in columns past the end of a shorter block.
        """
        width = torch.arange(positions.shape[1], device=self.device)
        inside = width < (state.block_end - state.block_start).unsqueeze(1)
        known = self.confidence[state.slots.unsqueeze(1), positions]
        return torch.where(inside, known, -1.0)

    def commit(
        self,
        stepped: Tensor,
        slots: Tensor,
        positions: Tensor,
        picked: Tensor,
        tokens: Tensor,
        confidence: Tensor,
    ) -> None:
        """Write what a step of the slots `stepped` decoded.

        Args:
            stepped: [R]; all that took part.
            slots, positions: [M]; one entry per position that was masked.
            picked: bool [M]; whether it is decoded now, …
            tokens, confidence: [M]; … and with what.
        """
        self.recent[stepped] = False
        self.recent[slots, positions] = picked
        self.masked[slots, positions] = ~picked
        self.tokens[slots, positions] = torch.where(picked, tokens, self.special.mask)
        known = confidence.to(self.confidence.dtype)
        self.confidence[slots, positions] = torch.where(picked, known, -1.0)

    def advance(self, state: SlotState, stepped: list[int]) -> Tensor:
        """Count the step, open the next block where one is done, and report what is finished.

        Args:
            state: of the slots in `stepped`, in any order, as it was before the step.

        Returns:
            What `result` reads; on the device.
        """
        state = state._replace(
            step=state.step + 1,
            block_step=state.block_step + 1,
            block_age=state.block_age + 1,
        )
        columns, first_masked, num_masked = self._enter_block(state, stepped)
        self._slots.change(state.slots, columns)
        state = state.changed(columns)
        phases = self.phases(state)
        width = self._longest(stepped)
        next_rows = self.active(state, phases, width).sum(dim=1)
        first_eos = self._first_eos(state, width)
        return torch.stack(
            [
                state.slots,
                first_masked == state.canvas_end,
                torch.minimum(first_masked, first_eos) - state.prompt_len,
                first_eos < first_masked,
                next_rows,
                phases.refresh,
                num_masked,
            ]
        )

    def result(self, report: Tensor) -> StepResult:
        """Read what `advance` returned: a step's one wait for the device."""
        order, complete, num_ready, ended, rows, refresh, masked = report.tolist()
        for slot, *size in zip(order, rows, refresh, masked, strict=True):
            facts = self._facts[slot]
            facts.rows, facts.refresh, facts.masked = size[0], bool(size[1]), size[2]
        return StepResult(
            order,
            list(map(bool, complete)),
            num_ready,
            list(map(bool, ended)),
            rows,
            list(map(bool, refresh)),
        )

    def _first_eos(self, state: SlotState, width: int) -> Tensor:
        """Place of the first committed end-of-text token, the canvas's end where none is: [R]."""
        columns = torch.arange(width, device=self.device)
        end = state.canvas_end.unsqueeze(1)
        in_canvas = (columns >= state.prompt_len.unsqueeze(1)) & (columns < end)
        ends = torch.isin(self.tokens[state.slots, :width], self.special.stop) & in_canvas
        ends &= ~self.masked[state.slots, :width] & state.honours_eos.unsqueeze(1)
        return torch.where(ends, columns, end).amin(dim=1)

    def _longest(self, slots: list[int]) -> int:
        return max(self._facts[slot].length for slot in slots)

    def canvases(self, slots: list[int]) -> dict[int, Canvas]:
        """Copies of the canvases in `slots`; one wait for the device, however many there are."""
        if not slots:
            return {}
        index, width = upload(slots, self.device), self._longest(slots)
        held = self.tokens[index, :width].to(torch.int32)
        known = self.confidence[index, :width].to(torch.float32)
        tokens, known = torch.stack([held, known.view(torch.int32)]).to("cpu").unbind(0)
        regions = [self._facts[slot].canvas for slot in slots]
        return {
            slot: Canvas(tokens[i, region], known[i, region].view(torch.float32))
            for i, (slot, region) in enumerate(zip(slots, regions, strict=True))
        }

    def _enter_block(self, state: SlotState, stepped: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Move each request whose block holds no mask to its next block that holds one.

        Blocks and their shares of the steps are those of `blocks_of`.

        Returns:
            Columns to write, [len(CHANGING), R]; int64 [R]: position of the first mask, the
            canvas's end where there is none; and masks in the block that is active now.
        """
        columns = torch.arange(self._longest(stepped), device=self.device)
        masked = self.masked[state.slots, : len(columns)]
        first, canvas_end = state.prompt_len, state.canvas_end
        first_masked = torch.where(masked, columns, canvas_end.unsqueeze(1)).amin(dim=1)
        opens = (first_masked >= state.block_end) & (first_masked < canvas_end)
        start = first + (first_masked - first) // state.block_length * state.block_length
        start = torch.where(opens, start, state.block_start)
        end = torch.minimum(start + state.block_length, canvas_end)
        inside = (columns >= start.unsqueeze(1)) & (columns < end.unsqueeze(1))
        num_masked = (masked & inside).sum(dim=1)
        before = (start - first) * state.steps // (canvas_end - first)
        after = (end - first) * state.steps // (canvas_end - first)
        zero = torch.zeros_like(start)
        opened = state._replace(
            block_step=zero,
            block_steps=after - before,
            block_masks=num_masked,
            block_first_step=before,
            block_age=zero,
            block_start=start,
            block_end=end,
        )
        written = torch.where(opens, opened.changing, state.changing)
        if any(self._facts[slot].skips for slot in stepped):
            written = self._skip_empty_steps(state.changed(written), num_masked)
        return written, first_masked, num_masked

    def commit_counts(
        self, state: SlotState, block_masked: Tensor, *, tempered: bool
    ) -> tuple[Tensor, Tensor]:
        """What the schedules say for the step at hand: counts int64 and Dream's chances, [R].

        The chances mean nothing where no request is `tempered`.
        """
        linear = linear_count(state.block_masks, state.block_steps, state.block_step)
        if not tempered:
            return linear, torch.zeros_like(linear, dtype=torch.float32)
        # A threshold may take more steps than the schedule has; its chances do not matter then.
        place = state.block_first_step + state.block_step
        chance = self.chance[state.slots, place.clamp(max=self.chance.shape[1] - 1)]
        dream = dream_count(block_masked.sum(dim=1), chance)
        return torch.where(state.tempered, dream, linear), chance

    def _skip_empty_steps(self, state: SlotState, num_masked: Tensor) -> Tensor:
        """Pass over steps in which Dream's schedule commits nothing: no forward pass is needed.

        A block's last step commits all that is left, so one is always found.

        Returns:
            Columns to write, [len(CHANGING), R].
        """
        chance = self.chance[state.slots]
        places = torch.arange(chance.shape[1], device=self.device)
        place = state.block_first_step + state.block_step
        commits = dream_count(num_masked.unsqueeze(1), chance) > 0
        later = places >= place.unsqueeze(1)
        found = torch.where(commits & later, places, chance.shape[1]).amin(dim=1)
        skips = state.tempered & (state.rule == int(Rule.COUNT)) & (num_masked > 0)
        skipped = torch.where(skips, found - place, 0)
        passed = state._replace(step=state.step + skipped, block_step=state.block_step + skipped)
        return passed.changing


def _numbers(prompt: Prompt, params: SamplingParams, facts: SlotFacts) -> dict[str, float | bool]:
    """The columns of a request, before its first block is opened."""
    assert params.block_length is not None
    assert params.steps is not None
    assert params.seed is not None
    assert params.cache is not None
    assert params.retention_ratio is not None
    assert params.pool_kernel is not None
    assert params.delay_steps is not None
    assert params.refresh_interval is not None
    start, end = facts.canvas.start, facts.canvas.stop
    # In a gap, what stands behind it goes on whatever is decoded before.
    is_gap = bool(prompt.suffix_ids or prompt.canvas_ids)
    return {
        "block_start": start,
        "block_end": start,
        "length": facts.length,
        "prompt_len": start,
        "canvas_end": end,
        "block_length": params.block_length,
        "steps": params.steps,
        "top_k": params.top_k or 0,
        "seed": params.seed,
        "score": int(facts.score),
        "rule": int(facts.rule),
        "cache": int(CachePolicy[params.cache.upper()]),
        "delay_steps": params.delay_steps,
        "refresh_interval": params.refresh_interval,
        "pool_kernel": params.pool_kernel,
        "temperature": params.temperature,
        "cfg_scale": params.cfg_scale,
        "bound": facts.bounds[0],
        "second_bound": facts.bounds[1],
        "top_p": 1.0 if params.top_p is None else params.top_p,
        "alg_temp": params.alg_temp,
        "retention_ratio": params.retention_ratio,
        "tempered": params.alg is not None,
        "honours_eos": not (params.ignore_eos or is_gap),
        "no_eos": params.logits_eos_inf,
        "late_eos": params.confidence_eos_eot_inf,
    }


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
