"""The state of every running request, as tensors: one row ("slot") per request.

Canvases, masks, schedules and parameters lie side by side so that a step reads and commits all
requests with the same few tensor operations, however many there are.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from .cache.policy import ActiveState, CachePolicy, Phases
from .ops import upload
from .request import Prompt, SamplingParams
from .sampling import LISTED, Credits, SpecialTokens
from .sampling.commit import Rule, dream_chances, dream_count, linear_count
from .slot_facts import SlotFacts


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


class CanvasTable:
    """`num_slots` sequences of up to `max_len` tokens and what their denoising needs.

    All integers are int64, all on `device`.
    """

    def __init__(
        self,
        num_slots: int,
        max_len: int,
        *,
        special: SpecialTokens,
        shifted: bool,
        device: str,
    ) -> None:
        def column(dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(num_slots, dtype=dtype, device=device)

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
        self.length, self.prompt_len, self.canvas_end = column(), column(), column()
        self.block_length, self.block_start, self.block_end = column(), column(), column()
        # Schedule of the active block: masks when it began, its share of the steps, steps run.
        self.block_masks, self.block_steps, self.block_step = column(), column(), column()
        self.steps, self.step = column(), column()
        self.temperature, self.cfg_scale = column(torch.float64), column(torch.float64)
        self.bound, self.second_bound = column(torch.float64), column(torch.float64)
        self.top_p, self.alg_temp = column(torch.float64), column(torch.float64)
        self.top_k, self.seed = column(), column()
        self.score, self.rule = column(), column()
        self.tempered, self.honours_eos = column(torch.bool), column(torch.bool)
        self.no_eos, self.late_eos = column(torch.bool), column(torch.bool)
        #: [slots, max_len] float32; Dream's share of the masks for each step of the schedule.
        self.chance = torch.zeros(num_slots, max_len, device=device)
        # Place of the active block's first step in the schedule of the whole canvas.
        self.block_first_step = column()
        self.cache, self.retention_ratio = column(), column(torch.float64)
        self.delay_steps, self.refresh_interval, self.pool_kernel = column(), column(), column()
        #: Steps run in the active block.
        self.block_age = column()
        #: [slots, max_len] bool; positions that the step before committed.
        self.recent = torch.zeros(num_slots, max_len, dtype=torch.bool, device=device)
        #: [slots, max_len, listed] each; made when the first request asks for credit.
        self._credit_tokens: Tensor | None = None
        self._credit_values: Tensor | None = None
        self._facts: dict[int, SlotFacts] = {}

    def facts(self, slots: list[int]) -> list[SlotFacts]:
        """What the host knows of the requests in `slots`."""
        return [self._facts[slot] for slot in slots]

    def fill(self, slot: int, prompt: Prompt, params: SamplingParams) -> None:
        """Lay out a new request in `slot`; `params` must be resolved."""
        assert params.block_length is not None
        assert params.steps is not None
        assert params.seed is not None
        start, end = len(prompt.ids), len(prompt.ids) + params.gen_length
        canvas = prompt.canvas_ids or [self.special.mask] * params.gen_length
        everything = torch.tensor([*prompt.ids, *canvas, *prompt.suffix_ids])
        length = len(everything)
        self.tokens[slot, :length] = upload(everything, self.device)
        self.masked[slot] = False
        self.masked[slot, start:end] = self.tokens[slot, start:end] == self.special.mask
        self.given[slot] = ~self.masked[slot]
        self.confidence[slot] = -1.0
        self.length[slot], self.prompt_len[slot], self.canvas_end[slot] = length, start, end
        self.block_length[slot] = params.block_length
        self.steps[slot], self.step[slot] = params.steps, 0
        self.temperature[slot], self.cfg_scale[slot] = params.temperature, params.cfg_scale
        self.top_p[slot] = 1.0 if params.top_p is None else params.top_p
        self.top_k[slot] = params.top_k or 0
        self.seed[slot] = params.seed
        # In a gap, what stands behind it goes on whatever is decoded before.
        is_gap = bool(prompt.suffix_ids or prompt.canvas_ids)
        self.honours_eos[slot] = not (params.ignore_eos or is_gap)
        self.no_eos[slot] = params.logits_eos_inf
        self.late_eos[slot] = params.confidence_eos_eot_inf
        facts = self._facts[slot] = SlotFacts.of(prompt, params, self.special.mask)
        self._fill_rule(slot, params, facts)
        self._fill_cache(slot, params)
        self._fill_credit(slot, params)
        self.block_start[slot] = self.block_end[slot] = start
        self._enter_block(upload([slot], self.device), [slot])

    def _fill_rule(self, slot: int, params: SamplingParams, facts: SlotFacts) -> None:
        self.rule[slot], self.score[slot] = int(facts.rule), int(facts.score)
        self.bound[slot], self.second_bound[slot] = facts.bounds
        self.tempered[slot], self.alg_temp[slot] = params.alg is not None, params.alg_temp
        if params.alg:
            chances = [dream_chances(steps) for _, _, steps in blocks_of(params)]
            self.chance[slot, : params.steps] = upload(torch.cat(chances), self.device)

    def _fill_cache(self, slot: int, params: SamplingParams) -> None:
        assert params.cache is not None
        assert params.retention_ratio is not None
        assert params.pool_kernel is not None
        assert params.delay_steps is not None
        assert params.refresh_interval is not None
        self.cache[slot] = int(CachePolicy[params.cache.upper()])
        self.retention_ratio[slot] = params.retention_ratio
        self.pool_kernel[slot] = params.pool_kernel
        self.delay_steps[slot] = params.delay_steps
        self.refresh_interval[slot] = params.refresh_interval
        self.recent[slot] = False

    def _fill_credit(self, slot: int, params: SamplingParams) -> None:
        if not params.credit:
            return
        if self._credit_tokens is None or self._credit_values is None:
            shape = (*self.tokens.shape, LISTED)
            self._credit_tokens = torch.full(shape, -1, dtype=torch.int64, device=self.device)
            self._credit_values = torch.zeros(shape, device=self.device)
        self._credit_tokens[slot], self._credit_values[slot] = -1, 0.0

    def credits(self, chosen: list[int], slots: Tensor, positions: Tensor) -> Credits | None:
        """Credit of the positions [n] of `slots` [n]; None where none of `chosen` uses any."""
        used = [slot for slot in chosen if self._facts[slot].uses_credit]
        if not used:
            return None
        assert self._credit_tokens is not None
        assert self._credit_values is not None
        uses = torch.zeros(len(self.length), dtype=torch.bool)
        uses[used] = True
        return Credits(
            upload(uses, self.device)[slots],
            self._credit_tokens[slots, positions],
            self._credit_values[slots, positions],
        )

    def keep_credits(self, slots: Tensor, positions: Tensor, credits: Credits) -> None:
        """Write what `credits` has become; of slots that use none it means nothing."""
        assert self._credit_tokens is not None
        assert self._credit_values is not None
        self._credit_tokens[slots, positions] = credits.tokens
        self._credit_values[slots, positions] = credits.values

    def phases(self, slots: Tensor) -> Phases:
        """What the next step of `slots` is."""
        return Phases.of(
            self.cache[slots],
            self.block_age[slots],
            self.delay_steps[slots],
            self.refresh_interval[slots],
        )

    def window(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        """First position and end of the active blocks' windows (see `cache.policy`), [R]."""
        start = self.block_start[slots]
        return (start - 1).clamp(min=0) if self.shifted else start, self.block_end[slots]

    def active(self, slots: Tensor, phases: Phases, width: int) -> Tensor:
        """Positions below `width` that go through the model in the next step: bool [R, width]."""
        start, end = self.window(slots)
        return phases.active(
            ActiveState(
                self.length[slots],
                start,
                end,
                self.masked[slots, :width],
                self.recent[slots, :width],
                self.shifted,
            )
        )

    def block_positions(self, slots: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """Positions of the active blocks of `slots`, none longer than `width`; which are masked.

        Returns:
            int64 and bool, both [len(slots), width]. Columns past the end of a shorter block
            repeat a valid position and are not masked.
        """
        start, end = self.block_start[slots], self.block_end[slots]
        positions = start.unsqueeze(1) + torch.arange(width, device=self.device)
        inside = positions < end.unsqueeze(1)
        positions = torch.where(inside, positions, start.unsqueeze(1))
        return positions, inside & self.masked[slots.unsqueeze(1), positions]

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

    def advance(self, slots: Tensor, stepped: list[int]) -> Tensor:
        """Count the step, open the next block where one is done, and report what is finished.

        Args:
            slots: [R]; those of `stepped`, in any order.

        Returns:
            What `result` reads; on the device.
        """
        self.step[slots] += 1
        self.block_step[slots] += 1
        self.block_age[slots] += 1
        first_masked, num_masked = self._enter_block(slots, stepped)
        phases = self.phases(slots)
        width = self._longest(stepped)
        next_rows = self.active(slots, phases, width).sum(dim=1)
        first_eos = self._first_eos(slots, width)
        ready = torch.minimum(first_masked, first_eos) - self.prompt_len[slots]
        return torch.stack(
            [
                slots,
                first_masked == self.canvas_end[slots],
                ready,
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

    def _first_eos(self, slots: Tensor, width: int) -> Tensor:
        """Place of the first committed end-of-text token, the canvas's end where none is: [R]."""
        columns = torch.arange(width, device=self.device)
        end = self.canvas_end[slots].unsqueeze(1)
        in_canvas = (columns >= self.prompt_len[slots].unsqueeze(1)) & (columns < end)
        ends = torch.isin(self.tokens[slots, :width], self.special.stop) & in_canvas
        ends &= ~self.masked[slots, :width] & self.honours_eos[slots].unsqueeze(1)
        return torch.where(ends, columns, end).amin(dim=1)

    def _longest(self, slots: list[int]) -> int:
        return max(self._facts[slot].length for slot in slots)

    def canvas(self, slot: int) -> tuple[Tensor, Tensor]:
        """Copies of a request's canvas: tokens int32 and confidences float32, on the CPU."""
        region = slice(int(self.prompt_len[slot]), int(self.canvas_end[slot]))
        tokens = self.tokens[slot, region].to("cpu", torch.int32, copy=True)
        return tokens, self.confidence[slot, region].to("cpu", torch.float32, copy=True)

    def _enter_block(self, slots: Tensor, stepped: list[int]) -> tuple[Tensor, Tensor]:
        """Move each request whose block holds no mask to its next block that holds one.

        Blocks and their shares of the steps are those of `blocks_of`.

        Returns:
            int64 [R]: position of the first mask, the canvas's end where there is none; and masks
            in the block that is active now.
        """
        columns = torch.arange(self._longest(stepped), device=self.device)
        masked = self.masked[slots, : len(columns)]
        first, canvas_end = self.prompt_len[slots], self.canvas_end[slots]
        first_masked = torch.where(masked, columns, canvas_end.unsqueeze(1)).amin(dim=1)
        opens = (first_masked >= self.block_end[slots]) & (first_masked < canvas_end)
        block_length = self.block_length[slots]
        start = first + (first_masked - first) // block_length * block_length
        start = torch.where(opens, start, self.block_start[slots])
        end = torch.minimum(start + block_length, canvas_end)
        inside = (columns >= start.unsqueeze(1)) & (columns < end.unsqueeze(1))
        num_masked = (masked & inside).sum(dim=1)
        before = (start - first) * self.steps[slots] // (canvas_end - first)
        after = (end - first) * self.steps[slots] // (canvas_end - first)

        def renew(column: Tensor, value: Tensor | int) -> None:
            column[slots] = torch.where(opens, value, column[slots])

        self.block_start[slots] = start
        renew(self.block_end, end)
        renew(self.block_steps, after - before)
        renew(self.block_step, 0)
        renew(self.block_age, 0)
        renew(self.block_first_step, before)
        renew(self.block_masks, num_masked)
        if any(self._facts[slot].skips for slot in stepped):
            self._skip_empty_steps(slots, num_masked)
        return first_masked, num_masked

    def commit_counts(self, slots: Tensor, block_masked: Tensor) -> tuple[Tensor, Tensor]:
        """What the schedules say for the step at hand: counts int64 and Dream's chances, [R]."""
        linear = linear_count(
            self.block_masks[slots], self.block_steps[slots], self.block_step[slots]
        )
        # A threshold may take more steps than the schedule has; its chances do not matter then.
        place = self.block_first_step[slots] + self.block_step[slots]
        chance = self.chance[slots, place.clamp(max=self.chance.shape[1] - 1)]
        dream = dream_count(block_masked.sum(dim=1), chance)
        return torch.where(self.tempered[slots], dream, linear), chance

    def _skip_empty_steps(self, slots: Tensor, num_masked: Tensor) -> None:
        """Pass over steps in which Dream's schedule commits nothing: no forward pass is needed.

        A block's last step commits all that is left, so one is always found.
        """
        chance = self.chance[slots]
        places = torch.arange(chance.shape[1], device=self.device)
        place = self.block_first_step[slots] + self.block_step[slots]
        commits = dream_count(num_masked.unsqueeze(1), chance) > 0
        later = places >= place.unsqueeze(1)
        found = torch.where(commits & later, places, chance.shape[1]).amin(dim=1)
        skips = self.tempered[slots] & (self.rule[slots] == int(Rule.COUNT)) & (num_masked > 0)
        skipped = torch.where(skips, found - place, 0)
        self.block_step[slots] += skipped
        self.step[slots] += skipped


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
