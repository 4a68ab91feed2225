"""Runs the loops of block-wise models slowly and plainly: one request, no cache, whole passes.

Written from the definitions of SDAR's `block_diffusion_generate`, Fast-dLLM v2's `generate` and
Nemotron-Labs-Diffusion's `generate`, without their defects: a step never commits more than it has
masks, the mask is no candidate, and a prompt of exactly one block is read.
"""

from __future__ import annotations

import dataclasses

import torch
from dllm_engine import SamplingParams
from torch import Tensor

from .decoder import Decoder, Ids
from .native import MaskedForward, block_causal, causal_before


@dataclasses.dataclass(frozen=True)
class Kind:
    """How a family reads and writes blocks."""

    #: Whether blocks are counted from the end of the prompt; else from position 0.
    from_prompt_end: bool = False
    #: Whether a finished token sees no later one; else it sees its block.
    causal: bool = False
    #: Whether a row predicts the next position of its block; else its own.
    shifted: bool = False
    #: Whether the last finished row predicts a new block's first token.
    given: bool = False
    #: Parts of a block, decoded one after another; 0: one.
    part: int = 0
    #: Whether a step's share is counted by the block's length (SDAR); else by its masks.
    counts_length: bool = False
    #: Whether the dynamic rule falls back to the schedule's share; else to one position.
    falls_back_to_schedule: bool = False


KINDS = {
    "sdar": Kind(counts_length=True, falls_back_to_schedule=True),
    "fast_dllm": Kind(shifted=True, given=True, part=8),
    "nemotron": Kind(from_prompt_end=True, causal=True, given=True),
}


@dataclasses.dataclass
class BlockResult:
    """The answer's tokens, with masks behind its last block, and the steps that it took."""

    tokens: list[int]
    steps: int
    #: See `Decoder`, by position of the answer; −1 and None where no step committed any.
    reveal_steps: list[int]
    log_probs: list[Tensor | None]


class _Loop:
    def __init__(
        self,
        forward: MaskedForward,
        kind: Kind,
        prompt: list[int],
        params: SamplingParams,
        ids: Ids,
    ) -> None:
        assert params.block_length is not None
        assert params.steps is not None
        self.forward, self.kind, self.ids, self.params = forward, kind, ids, params
        self.tokens, self.masked = list(prompt), set[int]()
        self.size, self.first = params.block_length, len(prompt)
        self.end = self.first + params.gen_length
        part = min(kind.part or self.size, self.size)
        self.part = part
        self.steps_per_part = max(1, min(part, params.steps * part // params.gen_length))
        self.decoder = Decoder(params, ids, falls_back=kind.falls_back_to_schedule)
        self.steps = 0

    def run(self) -> BlockResult:
        origin = self.first if self.kind.from_prompt_end else 0
        start = origin + (self.first - origin) // self.size * self.size
        while start < self.end:
            stop = start + self.size
            if self.kind.from_prompt_end:
                stop = min(stop, self.end)
            self.decode_block(start, stop)
            answer = self.tokens[self.first : min(stop, self.end)]
            if not self.params.ignore_eos and set(answer) & set(self.ids.stop):
                break
            start = stop
        answer = self.tokens[self.first : self.end]
        missing = self.params.gen_length - len(answer)
        places, decoder = range(self.first, self.end), self.decoder
        return BlockResult(
            answer + [self.ids.mask] * missing,
            self.steps,
            [decoder.reveal_steps.get(p, -1) for p in places],
            [decoder.log_probs.get(p) for p in places],
        )

    def decode_block(self, start: int, stop: int) -> None:
        if self.kind.given and start >= self.first:
            logits = self.forward(torch.tensor(self.tokens), self.finished(len(self.tokens)))
            self.tokens.append(self.ids.mask)
            self.masked = {start}
            self.decoder.open_block(1, 1)
            self.commit(logits, 1, range(start, start + 1))
        new = range(len(self.tokens), stop)
        self.tokens += [self.ids.mask] * len(new)
        self.masked = set(new)
        for first in range(start, stop, self.part):
            part = range(first, min(first + self.part, stop))
            left = self.masked & set(part)
            count = len(part) if self.kind.counts_length else len(left)
            self.decoder.open_block(count, self.steps_per_part)
            while self.masked & set(part) and min(self.masked) < self.end:
                logits = self.forward(torch.tensor(self.tokens), self.active(start, stop))
                self.commit(logits, self.kind.shifted, part)

    def commit(self, logits: Tensor, shift: int, part: range) -> None:
        """Commit what the rule chooses; a row predicts the position `shift` behind it."""
        found = self.decoder.decide(lambda p: logits[p - shift], part, self.masked)
        for position, candidate in found.items():
            self.tokens[position] = candidate.token
            self.masked.remove(position)
        self.steps += 1

    def finished(self, length: int) -> Tensor:
        if self.kind.causal:
            return causal_before(length, length)
        return block_causal(length, self.size)

    def active(self, start: int, stop: int) -> Tensor:
        return causal_before(stop, start) if self.kind.causal else block_causal(stop, self.size)


def generate_blocks(
    forward: MaskedForward, kind: Kind, prompt: list[int], params: SamplingParams, ids: Ids
) -> BlockResult:
    """Decode one request; `params` must be resolved."""
    return _Loop(forward, kind, prompt, params, ids).run()


def generate_left_to_right(
    forward: MaskedForward, prompt: list[int], gen_length: int, ids: Ids
) -> list[int]:
    """The greedy answer of a causal model, one token at a time, up to the first stop token."""
    tokens = list(prompt)
    while len(tokens) < len(prompt) + gen_length:
        logits = forward(torch.tensor(tokens), causal_before(len(tokens), len(tokens)))
        tokens.append(_best(logits[-1], ids))
        if tokens[-1] in ids.stop:
            break
    return tokens[len(prompt) :]


def generate_speculatively(
    forward: MaskedForward,
    prompt: list[int],
    gen_length: int,
    ids: Ids,
    *,
    window: int,
) -> tuple[list[int], int]:
    """Nemotron's linear self-speculation: draft a block at once, keep what a causal pass confirms.

    Returns:
        The answer up to the first stop token, and the number of drafts.
    """
    tokens, drafts = list(prompt), 0
    logits = forward(torch.tensor(tokens), causal_before(len(tokens), len(tokens)))
    emitted = [_best(logits[-1], ids)]
    while len(emitted) < gen_length and not set(emitted) & set(ids.stop):
        start = len(prompt) + len(emitted) - 1
        block = [emitted[-1]] + [ids.mask] * (window - 1)
        sequence = [*tokens, *emitted[:-1], *block]
        logits = forward(torch.tensor(sequence), causal_before(len(sequence), start))
        draft = [emitted[-1], *(_best(row, ids) for row in logits[start + 1 :])]
        drafts += 1
        sequence = [*tokens, *emitted[:-1], *draft]
        logits = forward(torch.tensor(sequence), causal_before(len(sequence), len(sequence)))
        checked = [_best(row, ids) for row in logits[start:]]
        accepted = 1
        while accepted < window and checked[accepted - 1] == draft[accepted]:
            accepted += 1
        emitted += checked[:accepted]
    emitted = emitted[:gen_length]
    ends = [i for i, token in enumerate(emitted) if token in ids.stop]
    return emitted[: ends[0] + 1] if ends else emitted, drafts


def _best(logits: Tensor, ids: Ids) -> int:
    allowed = logits.clone()
    allowed[ids.mask] = -torch.inf
    return int(allowed.argmax())
