"""The state of every running request, as tensors: one row ("slot") per request.

Canvases, masks, schedules and parameters lie side by side so that a step reads and commits all
requests with the same few tensor operations, however many there are.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from .request import SamplingParams
from .sampling.commit import RULES


@dataclasses.dataclass(frozen=True)
class StepResult:
    """What the host must know of each stepped request after a step."""

    #: Whether no mask is left in the canvas.
    complete: list[bool]
    #: Tokens from the left that are final, short of an end-of-text token.
    num_ready: list[int]
    #: Whether an end-of-text token is committed with nothing masked before it.
    ended: list[bool]


class CanvasTable:
    """`num_slots` sequences of up to `max_len` tokens and what their denoising needs.

    All integers are int64, all on `device`.
    """

    def __init__(
        self,
        num_slots: int,
        max_len: int,
        *,
        mask_token_id: int,
        eos_token_ids: tuple[int, ...],
        device: str,
    ) -> None:
        def column(dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(num_slots, dtype=dtype, device=device)

        self.mask_token_id = mask_token_id
        self.device = device
        self._eos = torch.tensor(eos_token_ids, dtype=torch.int64, device=device)
        #: [slots, max_len]; prompt, then canvas; `mask_token_id` where masked.
        self.tokens = torch.zeros(num_slots, max_len, dtype=torch.int64, device=device)
        #: [slots, max_len] bool; positions still to be decoded. Not read off the tokens, so
        #: that a mask token in a prompt stays what it is.
        self.masked = torch.zeros(num_slots, max_len, dtype=torch.bool, device=device)
        #: [slots, max_len] bool; positions that the request came with.
        self.given = torch.zeros(num_slots, max_len, dtype=torch.bool, device=device)
        #: [slots, max_len]; probability at commit, −1 elsewhere.
        self.confidence = torch.zeros(num_slots, max_len, device=device)
        self.length, self.prompt_len = column(), column()
        self.block_length, self.block_start, self.block_end = column(), column(), column()
        # Schedule of the active block: masks when it began, its share of the steps, steps run.
        self.block_masks, self.block_steps, self.block_step = column(), column(), column()
        self.steps, self.step = column(), column()
        self.temperature, self.cfg_scale = column(torch.float64), column(torch.float64)
        self.threshold, self.top_p = column(torch.float64), column(torch.float64)
        self.top_k, self.seed, self.rule = column(), column(), column()
        self.honours_eos = column(torch.bool)

    def fill(self, slot: int, prompt_ids: list[int], params: SamplingParams) -> None:
        """Lay out a new request in `slot`; `params` must be resolved."""
        assert params.block_length is not None
        assert params.steps is not None
        assert params.seed is not None
        start, end = len(prompt_ids), len(prompt_ids) + params.gen_length
        self.tokens[slot, :start] = torch.tensor(prompt_ids, dtype=torch.int64)
        self.tokens[slot, start:end] = self.mask_token_id
        self.masked[slot] = False
        self.masked[slot, start:end] = True
        self.given[slot] = False
        self.given[slot, :start] = True
        self.confidence[slot] = -1.0
        self.length[slot], self.prompt_len[slot] = end, start
        self.block_length[slot] = params.block_length
        self.steps[slot], self.step[slot] = params.steps, 0
        self.temperature[slot], self.cfg_scale[slot] = params.temperature, params.cfg_scale
        tau = params.confidence_threshold
        self.threshold[slot] = torch.inf if tau is None else tau
        self.top_p[slot] = 1.0 if params.top_p is None else params.top_p
        self.top_k[slot] = params.top_k or 0
        self.seed[slot] = params.seed
        self.rule[slot] = RULES[params.remasking]
        self.honours_eos[slot] = not params.ignore_eos
        self.block_start[slot] = self.block_end[slot] = start
        self._open_next_block(torch.tensor([slot], device=self.device))

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

    def commit(self, slots: Tensor, positions: Tensor, tokens: Tensor, confidence: Tensor) -> None:
        """Write decoded tokens; all arguments [n], naming (slot, position) pairs."""
        self.tokens[slots, positions] = tokens
        self.confidence[slots, positions] = confidence.to(self.confidence.dtype)
        self.masked[slots, positions] = False

    def advance(self, slots: Tensor) -> StepResult:
        """Count the step, open the next block where one is done, and report what is finished."""
        self.step[slots] += 1
        self.block_step[slots] += 1
        self._open_next_block(slots)
        width = int(self.length[slots].max())
        columns = torch.arange(width, device=self.device)
        tokens, masked = self.tokens[slots, :width], self.masked[slots, :width]
        in_canvas = columns >= self.prompt_len[slots].unsqueeze(1)
        end = self.length[slots].unsqueeze(1)
        first_masked = torch.where(masked, columns, end).amin(dim=1)
        is_eos = torch.isin(tokens, self._eos) & in_canvas & self.honours_eos[slots].unsqueeze(1)
        is_eos &= ~masked & (columns < end)
        first_eos = torch.where(is_eos, columns, end).amin(dim=1)
        ready = torch.minimum(first_masked, first_eos) - self.prompt_len[slots]
        report = torch.stack(
            [first_masked == end.squeeze(1), ready, first_eos < first_masked]
        ).tolist()  # the step's one wait for the device
        complete, num_ready, ended = report
        return StepResult(list(map(bool, complete)), num_ready, list(map(bool, ended)))

    def canvas(self, slot: int) -> tuple[Tensor, Tensor]:
        """Copies of a request's canvas: tokens int32 and confidences float32, on the CPU."""
        region = slice(int(self.prompt_len[slot]), int(self.length[slot]))
        tokens = self.tokens[slot, region].to("cpu", torch.int32, copy=True)
        return tokens, self.confidence[slot, region].to("cpu", torch.float32, copy=True)

    def _open_next_block(self, slots: Tensor) -> None:
        """Move each request whose block holds no mask to its next block that holds one.

        A block's share of the steps is what falls into it when all steps are spread evenly over
        the canvas: exactly steps / blocks where the reference allows it (equal blocks), and a
        smaller share for a shorter last block.
        """
        while slots.numel():
            done = ~self.block_positions(slots)[1].any(dim=1)
            slots = slots[done & (self.block_end[slots] < self.length[slots])]
            start = self.block_end[slots]
            end = torch.minimum(start + self.block_length[slots], self.length[slots])
            self.block_start[slots], self.block_end[slots] = start, end
            gen_length = self.length[slots] - self.prompt_len[slots]
            before = (start - self.prompt_len[slots]) * self.steps[slots] // gen_length
            after = (end - self.prompt_len[slots]) * self.steps[slots] // gen_length
            self.block_steps[slots], self.block_step[slots] = after - before, 0
            if slots.numel():
                self.block_masks[slots] = self.block_positions(slots)[1].sum(dim=1)
