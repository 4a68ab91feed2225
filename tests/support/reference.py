"""Runs the papers' decoding loop slowly and plainly, one request at a time.

Written from the definitions of LLaDA's `generate` and Dream's `_sample`: one full forward per step,
no batching, no cache. As in the engine, the last block may be shorter, and Dream's algorithms take
blocks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from dllm_engine import Prompt, SamplingParams
from torch import Tensor

from .decoder import Decoder, Ids

#: Token ids [length] to logits [length, vocab].
Forward = Callable[[Tensor], Tensor]


@dataclasses.dataclass
class ReferenceResult:
    """Tokens and confidences of the canvas."""

    tokens: list[int]
    confidence: list[float]
    forward_passes: int
    #: See `Decoder`, by position of the canvas; −1 and None where no step committed any.
    reveal_steps: list[int]
    log_probs: list[Tensor | None]


class Canvas:
    """Prompt, canvas and suffix of one request, and their masked positions."""

    def __init__(self, prompt: Prompt, params: SamplingParams, ids: Ids) -> None:
        canvas = prompt.canvas_ids or [ids.mask] * params.gen_length
        self.tokens = [*prompt.ids, *canvas, *prompt.suffix_ids]
        self.first, self.end = len(prompt.ids), len(prompt.ids) + len(canvas)
        self.masked = {self.first + i for i, token in enumerate(canvas) if token == ids.mask}
        self._given = set(range(len(self.tokens))) - self.masked
        self._ids = ids
        in_gap = bool(prompt.canvas_ids or prompt.suffix_ids)
        self._may_end = not (params.ignore_eos or in_gap)

    def blind(self) -> list[int]:
        """LLaDA's `un_x`: all given tokens replaced by masks."""
        hidden = self._ids.mask
        return [hidden if i in self._given else token for i, token in enumerate(self.tokens)]

    @property
    def ended(self) -> bool:
        """Whether an end token is committed with no mask before it."""
        for position in range(self.first, self.end):
            if position in self.masked:
                return False
            if self._may_end and self.tokens[position] in self._ids.stop:
                return True
        return False

    def result(self, decoder: Decoder, passes: int) -> ReferenceResult:
        """The current canvas."""
        canvas = range(self.first, self.end)
        return ReferenceResult(
            [self.tokens[p] for p in canvas],
            [decoder.committed.get(p, -1.0) for p in canvas],
            passes,
            [0 if p in self._given else decoder.reveal_steps.get(p, -1) for p in canvas],
            [decoder.log_probs.get(p) for p in canvas],
        )


def generate(forward: Forward, prompt: Prompt, params: SamplingParams, ids: Ids) -> ReferenceResult:
    """Decode one request by any rule; `params` must be resolved.

    For a shifted model (Dream), `forward` returns logits that are already shifted.
    """
    canvas, decoder = Canvas(prompt, params, ids), Decoder(params, ids)
    passes = 0
    for start, end, steps in decoder.blocks():
        block = range(canvas.first + start, canvas.first + end)
        decoder.open_block(len(canvas.masked & set(block)), steps)
        while left := len(canvas.masked & set(block)):
            decoder.skip_empty_steps(left)
            logits = forward(torch.tensor(canvas.tokens))
            passes += 1
            if params.cfg_scale > 0:
                unconditional = forward(torch.tensor(canvas.blind()))
                logits = unconditional + (params.cfg_scale + 1) * (logits - unconditional)
                passes += 1
            for position, found in decoder.decide(logits.__getitem__, block, canvas.masked).items():
                canvas.tokens[position] = found.token
                canvas.masked.remove(position)
            if canvas.ended:
                return canvas.result(decoder, passes)
    return canvas.result(decoder, passes)
