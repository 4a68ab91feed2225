"""The state of every running request, as tensors: one row ("slot") per request.

Canvases, masks, schedules and parameters lie side by side so that a step reads and commits all
requests with the same few tensor operations, however many there are.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from .cache.policy import ActiveState, CachePolicy, Phases
from .request import Prompt, SamplingParams
from .sampling import LISTED, Credits, SamplingFlags, SpecialTokens, needs_whole_row
from .sampling.commit import (
    ALG,
    REMASKING,
    SPREAD_SCORES,
    Rule,
    Score,
    dream_chances,
    dream_count,
    linear_count,
)


@dataclasses.dataclass(frozen=True)
class StepResult:
    """What the host must know of each stepped request after a step."""

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
        # What the host must know of each slot to plan a step without asking the device.
        self._rules = [Rule.COUNT] * num_slots
        self._scores = [Score.CONFIDENCE] * num_slots
        self._draws = [False] * num_slots
        self._needs_spread = [False] * num_slots
        self._uses_credit = [False] * num_slots
        self._guided = [False] * num_slots
        self._flags = [SamplingFlags.of_all([])] * num_slots

    def fill(self, slot: int, prompt: Prompt, params: SamplingParams) -> None:
        """Lay out a new request in `slot`; `params` must be resolved."""
        assert params.block_length is not None
        assert params.steps is not None
        assert params.seed is not None
        start, end = len(prompt.ids), len(prompt.ids) + params.gen_length
        canvas = prompt.canvas_ids or [self.special.mask] * params.gen_length
        everything = torch.tensor([*prompt.ids, *canvas, *prompt.suffix_ids])
        length = len(everything)
        self.tokens[slot, :length] = everything
        self.masked[slot] = False
        self.masked[slot, start:end] = torch.tensor(canvas) == self.special.mask
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
        self._guided[slot] = params.cfg_scale > 0
        self._flags[slot] = _flags_of(params)
        self._fill_rule(slot, params)
        self._fill_cache(slot, params)
        self._fill_credit(slot, params)
        self.block_start[slot] = self.block_end[slot] = start
        opened = torch.tensor([slot], device=self.device)
        self._open_next_block(opened)
        self._skip_empty_steps(opened)

    def _fill_rule(self, slot: int, params: SamplingParams) -> None:
        rule, bound, second = _rule_of(params)
        self.rule[slot], self.bound[slot], self.second_bound[slot] = int(rule), bound, second
        score = ALG[params.alg] if params.alg else REMASKING[params.remasking]
        self.score[slot] = int(score)
        self._rules[slot], self._scores[slot] = rule, score
        self._draws[slot] = params.alg_temp > 0
        self._needs_spread[slot] = score in SPREAD_SCORES or rule is Rule.ENTROPY_BOUND
        self.tempered[slot], self.alg_temp[slot] = params.alg is not None, params.alg_temp
        if params.alg:
            chances = [dream_chances(steps) for _, _, steps in blocks_of(params)]
            self.chance[slot, : params.steps] = torch.cat(chances)

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
        self._uses_credit[slot] = params.credit
        if not params.credit:
            return
        if self._credit_tokens is None or self._credit_values is None:
            shape = (*self.tokens.shape, LISTED)
            self._credit_tokens = torch.full(shape, -1, dtype=torch.int64, device=self.device)
            self._credit_values = torch.zeros(shape, device=self.device)
        self._credit_tokens[slot], self._credit_values[slot] = -1, 0.0

    def credits(self, chosen: list[int], slots: Tensor, positions: Tensor) -> Credits | None:
        """Credit of the positions [n] of `slots` [n]; None where none of `chosen` uses any."""
        if not any(self._uses_credit[slot] for slot in chosen):
            return None
        assert self._credit_tokens is not None
        assert self._credit_values is not None
        uses = torch.tensor(self._uses_credit, device=self.device)
        return Credits(
            uses[slots],
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

    def active(self, slots: Tensor, phases: Phases) -> Tensor:
        """Positions that go through the model in the next step: bool [R, longest]."""
        width = int(self.length[slots].max())
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

    def rules_in_use(self, slots: list[int]) -> frozenset[Rule]:
        """The rules of these requests."""
        return frozenset(self._rules[slot] for slot in slots)

    def scores_in_use(self, slots: list[int]) -> frozenset[Score]:
        """The scores of these requests."""
        return frozenset(self._scores[slot] for slot in slots)

    def draws(self, slots: list[int]) -> bool:
        """Whether any of these requests draws positions at random by their scores."""
        return any(self._draws[slot] for slot in slots)

    def needs_spread(self, slots: list[int]) -> bool:
        """Whether any of these requests needs entropies or margins."""
        return any(self._needs_spread[slot] for slot in slots)

    def guided(self, slots: list[int]) -> bool:
        """Whether any of these requests has guidance."""
        return any(self._guided[slot] for slot in slots)

    def sampling_flags(self, slots: list[int]) -> SamplingFlags:
        """What occurs among the rows of these requests."""
        return SamplingFlags.of_all(self._flags[slot] for slot in slots)

    def block_positions(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Positions of the active blocks of `slots` and which of them are masked.

        Returns:
            int64 and bool, both [len(slots), longest active block]. Columns past the end of a
            shorter block repeat a valid position and are not masked.
        """
        start, end = self.block_start[slots], self.block_end[slots]
        width = int((end - start).max())
        positions = start.unsqueeze(1) + torch.arange(width, device=self.device)
        inside = positions < end.unsqueeze(1)
        positions = torch.where(inside, positions, start.unsqueeze(1))
        return positions, inside & self.masked[slots.unsqueeze(1), positions]

    def commit(
        self,
        stepped: Tensor,
        slots: Tensor,
        positions: Tensor,
        tokens: Tensor,
        confidence: Tensor,
    ) -> None:
        """Write what a step of the slots `stepped` decoded.

        Args:
            stepped: [R]; all that took part.
            slots, positions, tokens, confidence: [n]; one entry per decoded position.
        """
        self.recent[stepped] = False
        self.recent[slots, positions] = True
        self.tokens[slots, positions] = tokens
        self.confidence[slots, positions] = confidence.to(self.confidence.dtype)
        self.masked[slots, positions] = False

    def advance(self, slots: Tensor) -> StepResult:
        """Count the step, open the next block where one is done, and report what is finished."""
        self.step[slots] += 1
        self.block_step[slots] += 1
        self.block_age[slots] += 1
        self._open_next_block(slots)
        self._skip_empty_steps(slots)
        phases = self.phases(slots)
        next_rows = self.active(slots, phases).sum(dim=1)
        width = int(self.length[slots].max())
        columns = torch.arange(width, device=self.device)
        tokens, masked = self.tokens[slots, :width], self.masked[slots, :width]
        in_canvas = columns >= self.prompt_len[slots].unsqueeze(1)
        end = self.canvas_end[slots].unsqueeze(1)
        first_masked = torch.where(masked, columns, end).amin(dim=1)
        is_eos = (
            torch.isin(tokens, self.special.stop) & in_canvas & self.honours_eos[slots].unsqueeze(1)
        )
        is_eos &= ~masked & (columns < end)
        first_eos = torch.where(is_eos, columns, end).amin(dim=1)
        ready = torch.minimum(first_masked, first_eos) - self.prompt_len[slots]
        report = torch.stack(
            [
                first_masked == end.squeeze(1),
                ready,
                first_eos < first_masked,
                next_rows,
                phases.refresh,
            ]
        ).tolist()  # the step's one wait for the device
        complete, num_ready, ended, next_rows, next_refresh = report
        return StepResult(
            list(map(bool, complete)),
            num_ready,
            list(map(bool, ended)),
            next_rows,
            list(map(bool, next_refresh)),
        )

    def canvas(self, slot: int) -> tuple[Tensor, Tensor]:
        """Copies of a request's canvas: tokens int32 and confidences float32, on the CPU."""
        region = slice(int(self.prompt_len[slot]), int(self.canvas_end[slot]))
        tokens = self.tokens[slot, region].to("cpu", torch.int32, copy=True)
        return tokens, self.confidence[slot, region].to("cpu", torch.float32, copy=True)

    def _open_next_block(self, slots: Tensor) -> None:
        """Move each request whose block holds no mask to its next block that holds one.

        Blocks and their shares of the steps are those of `blocks_of`.
        """
        while True:
            done = ~self.block_positions(slots)[1].any(dim=1)
            slots = slots[done & (self.block_end[slots] < self.canvas_end[slots])]
            if not slots.numel():
                return
            start = self.block_end[slots]
            end = torch.minimum(start + self.block_length[slots], self.canvas_end[slots])
            self.block_start[slots], self.block_end[slots] = start, end
            gen_length = self.canvas_end[slots] - self.prompt_len[slots]
            before = (start - self.prompt_len[slots]) * self.steps[slots] // gen_length
            after = (end - self.prompt_len[slots]) * self.steps[slots] // gen_length
            self.block_steps[slots], self.block_step[slots] = after - before, 0
            self.block_age[slots] = 0
            self.block_first_step[slots] = before
            self.block_masks[slots] = self.block_positions(slots)[1].sum(dim=1)

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

    def _skip_empty_steps(self, slots: Tensor) -> None:
        """Pass over steps in which Dream's schedule commits nothing: no forward pass is needed."""
        slots = slots[self.tempered[slots] & (self.rule[slots] == int(Rule.COUNT))]
        while slots.numel():
            masked = self.block_positions(slots)[1]
            counts, _ = self.commit_counts(slots, masked)
            slots = slots[(counts == 0) & masked.any(dim=1)]
            self.block_step[slots] += 1
            self.step[slots] += 1


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


def _flags_of(params: SamplingParams) -> SamplingFlags:
    noisy = params.temperature > 0
    filtered = (params.top_p is not None and params.top_p < 1) or bool(params.top_k)
    return SamplingFlags(
        noisy=noisy,
        whole=needs_whole_row(noisy, filtered, params.alg is not None),
        no_eos=params.logits_eos_inf,
        late_eos=params.confidence_eos_eot_inf,
    )


def _rule_of(params: SamplingParams) -> tuple[Rule, float, float]:
    """The rule that decides how many positions are committed, and its two parameters."""
    if params.confidence_threshold is not None:
        if params.low_threshold is not None:
            return Rule.HIERARCHICAL, params.confidence_threshold, params.low_threshold
        return Rule.THRESHOLD, params.confidence_threshold, 0.0
    if params.factor is not None:
        return Rule.FACTOR, params.factor, 0.0
    if params.entropy_bound is not None:
        return Rule.ENTROPY_BOUND, params.entropy_bound, 0.0
    if params.anchor_threshold is not None:
        fair = 0.75 if params.neighbor_threshold is None else params.neighbor_threshold
        return Rule.LOCAL_LEAP, params.anchor_threshold, fair
    return (Rule.ORIGIN if params.alg == "origin" else Rule.COUNT), 0.0, 0.0
